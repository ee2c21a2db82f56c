// SPDX-License-Identifier: PostgreSQL
//! Connection URLs as users of libpq know them, against servers that insist.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use dtm_tests::cluster::{Builder, Cluster, temporary_folder};
use dtm_tests::process;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::{self, Relay};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// An authority and the certificate that it made out to 127.0.0.1.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn make() -> Certificates {
        let folder = temporary_folder();
        process::give_to_server(folder.path());
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let authority_key = KeyPair::generate().expect("a key");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = authority.self_signed(&authority_key).expect("a certificate");
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().expect("a key");
        let server = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
        let server = server.signed_by(&key, &issuer).expect("a certificate");
        let files = Certificates { folder };
        files.write("root.crt", &root.pem(), 0o644);
        files.write("server.crt", &server.pem(), 0o644);
        files.write("server.key", &key.serialize_pem(), 0o600);
        files
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a file");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        process::give_to_server(&path);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&self, builder: Builder) -> Builder {
        builder
            .config("ssl", "on")
            .config("ssl_cert_file", &self.path("server.crt").display().to_string())
            .config("ssl_key_file", &self.path("server.key").display().to_string())
    }
}

fn check(url: &str) -> (bool, String) {
    relay::run(&["check", "--database-url", url])
}

async fn assert_delivers(cluster: &Cluster, url: &str) {
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(url);
    client.execute("SELECT dtm.publish('t', '1')", &[]).await.expect("publish");
    receiver.wait_for(1).await;
    assert!(relay.terminate().await.success());
    client.execute("SELECT dtm.unsubscribe('s')", &[]).await.expect("unsubscribe");
}

#[tokio::test(flavor = "multi_thread")]
async fn sslmode_up_to_verify_full_means_what_it_means_in_libpq() {
    let (ours, strangers) = (Certificates::make(), Certificates::make());
    let cluster = ours.serve(Cluster::builder()).start().await;
    cluster.create_database("shop").await;
    let url = |host: &str, more: &str| format!("postgres://postgres@{host}:{}/shop?{more}", cluster.port());
    let root = format!("sslrootcert={}", ours.path("root.crt").display());
    let other_root = format!("sslrootcert={}", strangers.path("root.crt").display());

    for mode in ["prefer", "require", "verify-ca", "verify-full"] {
        let (fine, said) = check(&url("127.0.0.1", &format!("sslmode={mode}&{root}")));
        assert!(fine && said.contains("over TLS"), "{mode}: {said}");
    }
    let (fine, said) = check(&url("127.0.0.1", "sslmode=disable"));
    assert!(fine && said.contains("without TLS"), "{said}");
    let (fine, said) = check(&url("127.0.0.1", "sslmode=require"));
    assert!(fine && said.contains("over TLS"), "require alone trusts whoever answers: {said}");
    for (host, more) in [
        ("127.0.0.1", format!("sslmode=verify-full&{other_root}")),
        ("127.0.0.1", format!("sslmode=verify-ca&{other_root}")),
        ("localhost", format!("sslmode=verify-full&{root}")),
        ("127.0.0.1", "sslmode=verify-full&sslrootcert=/nowhere/root.crt".to_owned()),
    ] {
        let (fine, said) = check(&url(host, &more));
        assert!(!fine && said.to_lowercase().contains("cert"), "{host} {more}: {said}");
    }
    let (fine, said) = check(&url("localhost", &format!("sslmode=verify-ca&{root}")));
    assert!(fine, "verify-ca does not look at the name: {said}");
    assert_delivers(&cluster, &url("127.0.0.1", &format!("sslmode=verify-full&{root}"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_where_tls_was_asked_for() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (fine, said) = check(&format!("{}?sslmode=require", cluster.url("shop")));
    assert!(!fine && said.contains("TLS"), "{said}");
    assert!(check(&format!("{}?sslmode=prefer", cluster.url("shop"))).0);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_come_from_a_passfile_and_a_wrong_one_is_named_as_such() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let sql = "CREATE ROLE relay LOGIN SUPERUSER PASSWORD 'a b:c'";
    client.batch_execute(sql).await.expect("a role");
    let lines = "host all relay 127.0.0.1/32 scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n";
    std::fs::write(cluster.data().join("pg_hba.conf"), lines).expect("pg_hba.conf");
    client.execute("SELECT pg_reload_conf()", &[]).await.expect("reload");
    let folder = tempfile::tempdir().expect("a folder");
    let passfile = |name: &str, text: &str, mode: u32| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a passfile");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        format!("{}?passfile={}", cluster.url_as("relay", "shop"), path.display())
    };
    let entry = format!("# ours\nelsewhere:*:*:relay:x\n127.0.0.1:{}:shop:relay:a b\\:c\n", cluster.port());
    let good = passfile("good", &entry, 0o600);
    let refused = process::eventually(std::time::Duration::from_secs(10), || async {
        // Until the server has read its file again it lets everybody in.
        let wrong = passfile("wrong", "*:*:*:*:wrong\n", 0o600);
        let (fine, said) = check(&wrong);
        (!fine).then_some(said)
    });
    let said = refused.await.expect("a refusal");
    assert!(said.contains("28P01") && !said.contains("wrong\""), "{said}");
    assert_delivers(&cluster, &good).await;
    let (fine, said) = check(&passfile("open", &entry, 0o644));
    assert!(!fine, "a passfile that others can read is not used: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_hosts_the_primary_is_taken_and_a_standby_alone_is_refused() {
    let primary = Cluster::builder().start().await;
    primary.create_database("shop").await;
    let folder = temporary_folder();
    let standby = Cluster::builder().start_standby(&primary, folder.path()).await;
    let (first, second) = (standby.port(), primary.port());
    let hosts = format!("postgres://postgres@127.0.0.1:1,127.0.0.1:{first},127.0.0.1:{second}/shop");
    assert_delivers(&primary, &hosts).await;
    let replayed = process::eventually(std::time::Duration::from_secs(30), || async {
        let sql = "SELECT FROM pg_extension WHERE extname = 'pg_dtm'";
        (!standby.connect("shop").await.query(sql, &[]).await.ok()?.is_empty()).then_some(())
    });
    assert!(replayed.await.is_some());
    let error = standby.connect("shop").await.batch_execute("SELECT dtm.publish('t', '1')").await;
    let error = error.expect_err("published on a standby");
    let error = error.as_db_error().expect("an error of the database");
    assert_eq!((error.code().code(), error.detail()), ("25006", Some("The server is a standby.")));
    assert!(error.hint().is_some());
    let (fine, said) = check(&standby.url("shop"));
    assert!(!fine && said.contains("standby") && said.contains("to mend it"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_a_host_and_options_reach_the_server() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let socket = cluster.sockets().display().to_string().replace('/', "%2F");
    let url = |options: &str| {
        format!("postgres://postgres@{socket}:{}/shop?options=-c%20{options}", cluster.port())
    };
    let hello = "dtm.relay_hello";
    assert_delivers(&cluster, &url("log_statement%3Dnone")).await;
    assert!(!cluster.log().contains(hello), "statements are not logged unless somebody asks for it");
    assert_delivers(&cluster, &url("log_statement%3Dall")).await;
    assert!(cluster.log().contains(hello), "the options did not reach the server");
}
