// SPDX-License-Identifier: PostgreSQL
//! The server for DTM's clients: whom and what it refuses, and that it outlives the database.

use std::sync::Arc;
use std::time::Duration;

use dtm_tests::dtm_api::DtmServer;
use dtm_tests::process;
use dtm_tests::receiver::Reply;
use dtm_tests::relay::Relay;
use http::Method;
use rcgen::{CertificateParams, KeyPair};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::dtm_server::{message, shop};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_with_its_reason() {
    let (cluster, receiver) = shop().await;
    let server = DtmServer::start(&cluster, "").await;
    let good = message("g", &receiver);
    let with = |name: &str, value: serde_json::Value| {
        let mut message = good.clone();
        message[name] = value;
        message
    };
    for (name, body, status) in [
        ("submit", with("gid", json!("")), 400),
        ("submit", with("gid", json!(7)), 400),
        ("submit", with("gid", json!("x".repeat(129))), 400),
        ("submit", with("steps", json!(null)), 400),
        ("submit", with("steps", json!([{"action": ""}])), 400),
        ("submit", with("steps", json!([{"action": "topic://nobody"}])), 400),
        ("submit", with("custom_data", json!("{")), 400),
        ("submit", with("request_timeout", json!(-1)), 400),
        ("submit", with("payloads", json!(["x".repeat(1_200_000)])), 400),
        ("submit", with("branch_headers", json!({"x": "secret:a"})), 400),
        ("submit", with("trans_type", json!("saga")), 501),
        ("submit", with("protocol", json!("grpc")), 501),
        ("prepare", with("query_prepared", json!("")), 400),
        ("registerBranch", json!({}), 501),
        ("prepareWorkflow", json!({}), 501),
        ("nothing", json!({}), 404),
        ("newGid", json!({}), 405),
    ] {
        let refused = server.post(name, &body).await;
        assert_eq!(refused.status, status, "{name} {refused:?}");
        assert!(refused.json()["message"].as_str().is_some_and(|why| why.len() > 10), "{refused:?}");
    }
    for (name, value) in [("origin", "https://evil.example"), ("host", "evil.example")] {
        let refused = server.call_with("/api/dtmsvr/submit", (name, value), good.to_string()).await;
        assert_eq!(refused.status, 403, "{name} {refused:?}");
    }
    let broken = server.call(Method::POST, "/api/dtmsvr/submit", "{").await;
    assert_eq!((broken.status, broken.text.contains("cannot be read")), (400, true), "{broken:?}");
    let large = server.call(Method::POST, "/api/dtmsvr/submit", vec![b' '; 5 << 20]).await;
    assert_eq!(large.status, 413);
    assert_eq!(server.get("all?limit=x").await.status, 400);
    assert_eq!(server.get("query").await.json(), json!({"message": "no gid specified"}));
    assert_eq!(server.get("all").await.json()["transactions"], json!([]), "nothing was made");

    assert!(server.get("version").await.json()["version"].as_str().is_some_and(|v| v.starts_with('v')));
    let ping = server.call(Method::POST, "/api/ping", "").await;
    assert_eq!((ping.status, ping.json()), (200, json!({"msg": "pong"})));
    let metrics = server.call(Method::GET, "/api/metrics", "").await;
    assert!(metrics.headers["content-type"].to_str().expect("text").starts_with("text/plain"));
    let lines = [
        "{endpoint=\"unknown\",status=\"404\"} 1",
        "_count{endpoint=\"submit\"} ",
        "\ndtm_transactions_stuck 0\n",
    ];
    for line in lines {
        assert!(metrics.text.contains(line), "{line} in {}", metrics.text);
    }
    // Unknown names are no errors, and breaks are taken out of a gid.
    let odd = json!({"gid": "o;d\r\nd", "trans_type": "msg", "whatever": [1], "status": "failed", "concurrent": null,
                     "steps": [{"action": receiver.url(), "data": "legacy"}]});
    assert_eq!(server.post("submit", &odd).await.status, 200);
    server.wait_for_status("odd", "succeed").await;
    assert_eq!(&receiver.received()[0].body[..], b"legacy");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_know_the_token_gets_nothing() {
    let (cluster, receiver) = shop().await;
    let mut server = DtmServer::start(&cluster, "token = { env = \"DTM_TEST_TOKEN\" }").await;
    for shown in
        [None, Some("Bearer wrong"), Some("Bearer open"), Some("open sesame"), Some("Basic ZHRtOm9wZW4=")]
    {
        server.show(shown);
        for name in ["newGid", "query?gid=g", "nothing"] {
            let refused = server.get(name).await;
            assert_eq!((refused.status, refused.json()["message"].is_string()), (401, true), "{shown:?}");
            assert_eq!(refused.headers["www-authenticate"], "Bearer");
        }
        assert_eq!(server.post("submit", &message("g", &receiver)).await.status, 401);
        assert_eq!(server.call(Method::GET, "/api/ping", "").await.status, 200);
    }
    // "dtm:open sesame"
    for shown in ["Bearer open sesame", "Basic ZHRtOm9wZW4gc2VzYW1l"] {
        server.show(Some(shown));
        assert_eq!(server.get("query?gid=g").await.json()["transaction"], json!(null));
    }
    assert!(!server.relay.log().contains("sesame"));
    let url = cluster.url("shop");
    let open = format!("[database.shop]\nurl = \"{url}\"\n[dtm_server]\nlisten = \"0.0.0.0:1\"\n");
    let mut relay = Relay::start_configured(&open);
    assert_eq!(relay.ended(Duration::from_secs(20)).await.and_then(|status| status.code()), Some(1));
    assert!(relay.log().contains("dtm_server.token: it is missing"), "{}", relay.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_it_answers_and_without_it_does_not() {
    let (cluster, _receiver) = shop().await;
    let key = KeyPair::generate().expect("a key");
    let parameters = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    let certificate = parameters.self_signed(&key).expect("a certificate");
    let folder = tempfile::tempdir().expect("a folder");
    let (cert_file, key_file) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert_file, certificate.pem()).expect("a file");
    std::fs::write(&key_file, key.serialize_pem()).expect("a file");
    let settings = format!("tls_cert = \"{}\"\ntls_key = \"{}\"", cert_file.display(), key_file.display());
    let server = DtmServer::start(&cluster, &settings).await;
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).expect("a root");
    let builder = ClientConfig::builder_with_provider(ring::default_provider().into());
    let builder = builder.with_safe_default_protocol_versions().expect("versions");
    let connector = TlsConnector::from(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()));
    let plain = TcpStream::connect(server.address()).await.expect("a connection");
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = connector.connect(name, plain).await.expect("TLS");
    let answer = server.call_over(stream, Method::GET, "/api/dtmsvr/newGid", "").await;
    assert_eq!((answer.status, &answer.json()["dtm_result"]), (200, &json!("SUCCESS")));
    let mut plain = TcpStream::connect(server.address()).await.expect("a connection");
    plain.write_all(b"GET /api/ping HTTP/1.1\r\nhost: h\r\n\r\n").await.expect("a request");
    let mut answer = Vec::new();
    // A reset is an answer, too.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("pong"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_said_to_be_and_a_shutdown_waits_for_answers() {
    let (mut cluster, receiver) = shop().await;
    let mut server = DtmServer::start(&cluster, "").await;
    assert_eq!(server.post("prepare", &message("kept", &receiver)).await.status, 200);
    cluster.stop().await;
    let away = server.post("submit", &message("kept", &receiver)).await;
    assert_eq!(away.status, 503, "{away:?}");
    assert!(away.json()["message"].as_str().is_some_and(|why| why.contains("database")), "{away:?}");
    assert_eq!(server.get("newGid").await.status, 200);
    cluster.start().await;
    let back = process::eventually(Duration::from_secs(20), || async {
        (server.post("submit", &message("kept", &receiver)).await.status == 200).then_some(())
    });
    back.await.expect("it is back");
    server.wait_for_status("kept", "succeed").await;

    receiver.behave(|_| Reply::slow(200, Duration::from_secs(1)));
    let mut last = message("last", &receiver);
    last["wait_result"] = json!(true);
    let body = last.to_string();
    let stream = TcpStream::connect(server.address()).await.expect("a connection");
    let waiting = server.call_over(stream, Method::POST, "/api/dtmsvr/submit", body);
    let ended = async {
        receiver.wait_until("called", Duration::from_secs(20), |received| received.len() == 2).await;
        process::signal(server.relay.pid(), rustix::process::Signal::TERM);
    };
    let (answer, ()) = tokio::join!(waiting, ended);
    assert!([200, 425].contains(&answer.status), "{answer:?}");
    assert!(server.relay.ended(Duration::from_secs(30)).await.is_some_and(|status| status.success()));
}
