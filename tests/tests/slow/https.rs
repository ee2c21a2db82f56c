// SPDX-License-Identifier: PostgreSQL
//! Endpoints over https: trusted by an authority of one's own, in the version that they offer, and given secrets that nobody
//! else sees.

use std::path::PathBuf;
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::{self, Relay};
use http::Version;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_postgres::Client;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::numbered::{DEADLINE, arrived, number, publish, times, wait_for_all};

/// Every attempt that is charged is the last one.
const ONE_ATTEMPT: &str = r#"{"retry_base": "20ms", "retry_cap": "100ms", "retry_attempts": 1}"#;

/// An authority that nobody else knows, and an endpoint's certificate by it.
struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn make() -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = parameters.self_signed(&key).expect("a certificate");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let authority = Authority { folder, issuer: Issuer::new(parameters, key) };
        std::fs::write(authority.file(), root.pem()).expect("a file");
        authority
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// An endpoint that offers these protocols.
    async fn endpoint(&self, protocols: &[&str]) -> Receiver {
        let key = KeyPair::generate().expect("a key");
        let parameters = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
        let certificate = parameters.signed_by(&key, &self.issuer).expect("a certificate");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let builder = ServerConfig::builder_with_provider(ring::default_provider().into());
        let builder = builder.with_safe_default_protocol_versions().expect("versions").with_no_client_auth();
        let mut config =
            builder.with_single_cert(vec![certificate.der().clone()], key).expect("a configuration");
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Receiver::start_tls(config).await
    }
}

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

async fn subscribe(client: &Client, receiver: &Receiver, options: &str) {
    let sql = format!("SELECT dtm.subscribe('s', 't', $1, '{options}')");
    client.execute(&sql, &[&receiver.url()]).await.expect("subscribe");
}

/// Settings before the database, and the database.
fn configuration(settings: &str, cluster: &Cluster) -> String {
    format!("{settings}\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"))
}

fn trusting(authority: &Authority, cluster: &Cluster) -> String {
    configuration(&format!("ca_file = \"{}\"", authority.file().display()), cluster)
}

async fn count(client: &Client, table: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await.expect("a count").get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_gets_the_version_of_http_that_it_offers() {
    let (cluster, client) = shop().await;
    let authority = Authority::make();
    let mut relay = Relay::start_configured(&trusting(&authority, &cluster));
    let offers: [(&[&str], Version); 3] =
        [(&["h2", "http/1.1"], Version::HTTP_2), (&["http/1.1"], Version::HTTP_11), (&[], Version::HTTP_11)];
    let mut last = 0;
    for (protocols, version) in offers {
        let receiver = authority.endpoint(protocols).await;
        subscribe(&client, &receiver, "{}").await;
        relay.wait_for_log(&receiver.url()).await;
        publish(&client, "t", last + 1, last + 30).await;
        last += 30;
        let all = |received: &[_]| arrived(received).len() == 30;
        receiver.wait_until("all", DEADLINE, all).await;
        for request in receiver.received() {
            assert_eq!(request.version, version, "it offers {protocols:?}");
            assert_eq!(
                (request.method.as_str(), &request.target[request.target.len() - 7..]),
                ("POST", "/events")
            );
        }
    }
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_not_trusted_counts_as_down_and_costs_no_event_an_attempt() {
    let (cluster, client) = shop().await;
    let (ours, strangers) = (Authority::make(), Authority::make());
    let receiver = strangers.endpoint(&["h2"]).await;
    subscribe(&client, &receiver, ONE_ATTEMPT).await;
    let distrusting = format!("log_level = \"debug\"\nca_file = \"{}\"", ours.file().display());
    let mut relay = Relay::start_configured(&configuration(&distrusting, &cluster));
    publish(&client, "t", 1, 20).await;
    relay.wait_for_log("the endpoint is down").await;
    // It is asked again and again meanwhile.
    let asked = || relay.log().matches("the endpoint is to blame").count() > 10;
    assert!(process::holds_within(DEADLINE, asked).await, "{}", relay.log());
    assert!(relay.log().contains("certificate"), "it says why: {}", relay.log());
    assert_eq!(receiver.count(), 0);
    assert!(relay.terminate().await.success());
    assert_eq!((count(&client, "dtm.retry").await, count(&client, "dtm.dead_letter").await), (0, 0));
    relay.configure(&trusting(&strangers, &cluster));
    relay.restart();
    wait_for_all(&receiver, 20).await;
    assert!(relay.terminate().await.success());
    assert_eq!(times(&receiver, 20), [1; 20]);
    assert_eq!((count(&client, "dtm.retry").await, count(&client, "dtm.dead_letter").await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_handshake_hangs_counts_as_down_and_costs_no_event_an_attempt() {
    let (cluster, client) = shop().await;
    // The system accepts connections, and nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("https://{}/events", silent.local_addr().expect("its address"));
    let options = r#"{"retry_base": "20ms", "retry_cap": "100ms", "retry_attempts": 1, "timeout": "500ms"}"#;
    let sql = format!("SELECT dtm.subscribe('s', 't', $1, '{options}')");
    client.execute(&sql, &[&url]).await.expect("subscribe");
    publish(&client, "t", 1, 20).await;
    let mut relay = Relay::start_configured(&configuration("log_level = \"debug\"", &cluster));
    relay.wait_for_log("the endpoint is down").await;
    let asked = || relay.log().matches("the endpoint is to blame").count() > 5;
    assert!(process::holds_within(DEADLINE, asked).await, "{}", relay.log());
    assert!(relay.log().contains("no connection within 0.5 s"), "it says why: {}", relay.log());
    assert!(relay.terminate().await.success());
    assert_eq!((count(&client, "dtm.retry").await, count(&client, "dtm.dead_letter").await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_authorities_that_cannot_be_used_is_said_and_ends_the_relay() {
    let (cluster, _client) = shop().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let empty = folder.path().join("empty.crt");
    std::fs::write(&empty, "no certificate\n").expect("a file");
    for file in [empty, folder.path().join("missing.crt")] {
        let settings = format!("ca_file = \"{}\"", file.display());
        let mut relay = Relay::start_configured(&configuration(&settings, &cluster));
        let ended = relay.ended(DEADLINE).await.expect("it ends");
        assert_eq!(ended.code(), Some(1));
        let told = relay.log().lines().filter(|line| line.contains(&file.display().to_string())).count();
        assert_eq!(told, 1, "{}", relay.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_a_failure_and_is_not_followed() {
    let (cluster, client) = shop().await;
    let authority = Authority::make();
    let (receiver, elsewhere) = (authority.endpoint(&["h2"]).await, authority.endpoint(&["h2"]).await);
    let to = elsewhere.url();
    receiver.behave(move |request| match number(request) {
        7 => Reply::Status(308, vec![("location", to.clone())], Duration::ZERO),
        _ => Reply::status(200),
    });
    subscribe(&client, &receiver, ONE_ATTEMPT).await;
    let mut relay = Relay::start_configured(&trusting(&authority, &cluster));
    let mut last = 0;
    let dead = process::eventually(DEADLINE, || {
        last += 5;
        let (client, from, to) = (&client, last - 4, last);
        async move {
            // Whose fault it is, the others tell: they go on all the time.
            publish(client, "t", from, to).await;
            (count(client, "dtm.dead_letters").await == 1).then_some(())
        }
    });
    dead.await.expect("a dead letter");
    let sql = "SELECT payload::text, last_status, last_error FROM dtm.dead_letters";
    let row = client.query_one(sql, &[]).await.expect("a dead letter");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i32>(1)), ("7", 308));
    assert!(row.get::<_, &str>(2).contains("redirects are not followed"), "{}", row.get::<_, &str>(2));
    let all_but_one = |received: &[_]| arrived(received).len() == last as usize - 1;
    receiver.wait_until("all but the redirected one", DEADLINE, all_but_one).await;
    assert_eq!(elsewhere.count(), 0, "it was followed");
    assert!(relay.terminate().await.success());
}

/// Texts of all rows of all tables and views that have a text in them.
async fn found_in_tables(client: &Client, text: &str) -> Vec<String> {
    let sql = "SELECT relname::text FROM pg_class WHERE relnamespace = 'dtm'::regnamespace AND relkind IN ('r', 'v')";
    let mut found = Vec::new();
    let relations = client.query(sql, &[]).await.expect("relations");
    assert!(relations.len() > 10);
    for relation in relations.iter().map(|row| row.get::<_, String>(0)) {
        let sql = format!("SELECT count(*) FROM dtm.{relation} r WHERE strpos(r::text, $1) > 0");
        if client.query_one(&sql, &[&text]).await.expect("a search").get::<_, i64>(0) > 0 {
            found.push(relation);
        }
    }
    found
}

const TOKEN: &str = "Bearer 3f9a-of-the-environment";
const API_KEY: &str = "77c1-of-a-file";
const WITH_SECRETS: &str = r#"{"headers": {"authorization": "secret:token", "X-Api-Key": "secret:api.key", "x-plain": "seen"},
    "retry_base": "20ms", "retry_cap": "100ms", "retry_attempts": 1}"#;

#[tokio::test(flavor = "multi_thread")]
async fn secrets_arrive_in_headers_and_stand_neither_in_logs_nor_in_tables() {
    let (cluster, client) = shop().await;
    let authority = Authority::make();
    let file = authority.folder.path().join("key");
    std::fs::write(&file, format!("{API_KEY}\n")).expect("a file");
    // Everything that any of the libraries has to say, too.
    let settings = format!(
        "log_level = \"trace,dtm_relay=trace\"\nca_file = \"{}\"\n\
         [secret.token]\nenv = \"SHOP_TOKEN\"\n[secret.\"api.key\"]\nfile = \"{}\"",
        authority.file().display(),
        file.display()
    );
    let configuration = configuration(&settings, &cluster);
    let mut relay = Relay::start_configured_with(&configuration, &[("SHOP_TOKEN", TOKEN)]);
    for protocols in [&["h2"][..], &[]] {
        let receiver = authority.endpoint(protocols).await;
        // One is a dead letter, so that there is something about it in tables and logs.
        receiver.behave(|request| Reply::status(if number(request) == 3 { 422 } else { 200 }));
        subscribe(&client, &receiver, WITH_SECRETS).await;
        relay.wait_for_log(&receiver.url()).await;
        publish(&client, "t", 1, 2).await;
        receiver.wait_for(2).await;
        publish(&client, "t", 3, 10).await;
        let all_but_one = |received: &[_]| arrived(received).len() == 9;
        receiver.wait_until("all but the refused one", DEADLINE, all_but_one).await;
        for request in receiver.received() {
            let headers =
                ["authorization", "x-api-key", "x-plain"].map(|name| request.header(name).to_owned());
            assert_eq!(headers, [TOKEN, API_KEY, "seen"]);
        }
    }
    let dead = process::eventually(DEADLINE, || async {
        (count(&client, "dtm.dead_letters").await == 2).then_some(())
    });
    dead.await.expect("dead letters");
    let (fine, said) = relay::run(&["status", "--json", "--database-url", &cluster.url("shop")]);
    assert!(fine && said.contains("secret:token"), "{said}");
    assert!(relay.terminate().await.success());
    let log = relay.log();
    assert!(log.contains("TRACE"), "it logs everything");
    for secret in [TOKEN, API_KEY, &TOKEN["Bearer ".len()..]] {
        assert!(!log.contains(secret), "the log has {secret}");
        assert!(!said.contains(secret));
        assert_eq!(found_in_tables(&client, secret).await, Vec::<String>::new(), "tables with {secret}");
    }
    assert!(!found_in_tables(&client, "secret:token").await.is_empty(), "what is searched for is found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_names_a_missing_secret_is_not_delivered_and_the_log_and_check_say_why() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    subscribe(&client, &receiver, r#"{"headers": {"authorization": "secret:token"}}"#).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let check = |settings: &str| {
        let file = folder.path().join("relay.toml");
        std::fs::write(&file, configuration(settings, &cluster)).expect("a configuration file");
        relay::run(&["check", "--config", &file.display().to_string()])
    };
    let (fine, said) = check("");
    assert!(!fine && said.contains("WRONG  subscription \"s\"") && said.contains("[secret.token]"), "{said}");
    publish(&client, "t", 1, 5).await;
    let mut relay = Relay::start_configured(&configuration("", &cluster));
    relay.wait_for_log("it is not delivered").await;
    assert!(relay.log().contains("[secret.token]"), "{}", relay.log());
    assert!(relay.terminate().await.success());
    assert_eq!(receiver.count(), 0);
    // The path of a file is no secret; the file is.
    let file = folder.path().join("token");
    std::fs::write(&file, "Bearer abc").expect("a file");
    let settings = format!("[secret.token]\nfile = \"{}\"", file.display());
    let (fine, said) = check(&settings);
    assert!(fine && !said.contains("Bearer abc"), "{said}");
    relay.configure(&configuration(&settings, &cluster));
    relay.restart();
    wait_for_all(&receiver, 5).await;
    assert!(receiver.received().iter().all(|request| request.header("authorization") == "Bearer abc"));
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_sends_a_secret_to_the_servers_that_the_configuration_names_and_nowhere_else() {
    let (cluster, client) = shop().await;
    let (receiver, stranger) = (Receiver::start().await, Receiver::start().await);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("token");
    std::fs::write(&file, TOKEN).expect("a file");
    let server = receiver.url().trim_end_matches("/events").to_owned();
    let settings = format!("[secret.token]\nfile = \"{}\"\nservers = [\"{server}\"]", file.display());
    let mut relay = Relay::start_configured(&configuration(&settings, &cluster));
    for (gid, url) in [("theirs", receiver.url()), ("strange", stranger.url())] {
        let options = r#"{"branch_headers": {"authorization": "secret:token"}}"#;
        let sql =
            format!(r#"SELECT dtm.msg_send('[{{"action": "{url}", "payload": 1}}]', '{gid}', '{options}')"#);
        client.batch_execute(&sql).await.expect("msg_send");
    }
    receiver.wait_for(1).await;
    assert_eq!(receiver.received()[0].header("authorization"), TOKEN);
    let refused = process::eventually(DEADLINE, || async {
        let sql = "SELECT last_error FROM dtm.transactions WHERE gid = 'strange'";
        let error: Option<String> = client.query_one(sql, &[]).await.expect("a transaction").get(0);
        error.filter(|error| error.contains("[secret.token]"))
    });
    refused.await.expect("an error that says why");
    assert!(relay.terminate().await.success());
    assert_eq!(stranger.count(), 0);
}
