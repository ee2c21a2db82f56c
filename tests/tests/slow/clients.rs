// SPDX-License-Identifier: PostgreSQL
//! DTM's own clients, unchanged: Go's, with its barrier in the table of the extension, and Python's.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use dtm_tests::cluster::Cluster;
use dtm_tests::dtm_api::DtmServer;
use dtm_tests::process;
use dtm_tests::receiver::Receiver;

async fn shop() -> (Cluster, Receiver, DtmServer) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let receiver = Receiver::start().await;
    let server = DtmServer::start(&cluster, "token = { env = \"DTM_TEST_TOKEN\" }").await;
    (cluster, receiver, server)
}

/// What DTM's clients are given: a token has no other place there.
fn url_with_token(server: &mut DtmServer) -> String {
    server.show(Some("Bearer open sesame"));
    server.url().replace("http://", "http://dtm:open%20sesame@")
}

fn folder() -> PathBuf {
    std::env::var_os("DTM_CLIENTS")
        .map(PathBuf::from)
        .expect("DTM_CLIENTS is not set: run this by cargo xtask")
}

/// How often the branches of a transaction were called.
fn calls(receiver: &Receiver, gid: &str) -> usize {
    let gid = format!("?gid={gid}&");
    receiver.received().iter().filter(|request| request.target.contains(&gid)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_the_go_client_are_called_if_and_only_if_its_transactions_commit() {
    let (cluster, receiver, mut server) = shop().await;
    let client = cluster.connect("shop").await;
    client.batch_execute("CREATE TABLE booking (gid text PRIMARY KEY)").await.expect("a table");
    let mut service = Command::new(folder().join("go"));
    service.arg(url_with_token(&mut server));
    service.arg(format!("{}?sslmode=disable", cluster.url("shop"))).arg(receiver.url());
    let mut service = service.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the Go client");
    let output = BufReader::new(service.stdout.take().expect("its output"));
    let told = tokio::task::spawn_blocking(move || {
        let lines = output.lines().map_while(Result::ok);
        lines.take_while(|line| line != "done").collect::<Vec<_>>()
    });
    let told: Vec<String> = told.await.expect("its output");
    // Its logger writes there, too.
    let said = |name: &str| {
        let line = told.iter().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("{name} in {told:#?}"))
    };
    for name in ["committed", "crashed", "waiting"] {
        assert_eq!(said(name), "<nil>", "{name}");
    }
    assert_eq!(said("refused"), "FAILURE");
    assert_eq!(said("broken"), "the service is out of order");
    assert_eq!(said("crashed-before"), "the service is out of order");
    assert!(said("again").contains("cannot prepare"), "{}", said("again"));
    for (gid, status, times) in [
        ("committed", "succeed", 1),
        ("refused", "failed", 0),
        ("broken", "failed", 0),
        ("crashed", "succeed", 1),
        ("crashed-before", "failed", 0),
        ("waiting", "succeed", 1),
    ] {
        server.wait_for_status(gid, status).await;
        assert_eq!(calls(&receiver, gid), times, "{gid}");
    }
    let booked = "SELECT string_agg(gid, ' ' ORDER BY gid) FROM booking";
    let booked: String = client.query_one(booked, &[]).await.expect("bookings").get(0);
    assert_eq!(booked, "committed crashed");
    drop(service.stdin.take());
    assert!(service.wait().expect("its end").success());
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_the_python_client_are_called() {
    let (_cluster, receiver, mut server) = shop().await;
    let mut script = Command::new("python3");
    script.env("PYTHONPATH", folder().join("python"));
    script.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/clients/python/client.py"));
    script.arg(url_with_token(&mut server)).arg(receiver.url());
    let told = tokio::task::spawn_blocking(move || process::run(&mut script)).await.expect("the script");
    for line in [
        "prepare: None",
        "submit: None",
        "wait: None",
        "refused: DTMFailureError no stock",
        "wrong: Exception bad result",
        "gid: 36",
    ] {
        assert!(told.lines().any(|found| found == line), "{line} in {told}");
    }
    for (gid, status, times) in
        [("py-prepared", "succeed", 2), ("py-wait", "succeed", 2), ("py-refused", "failed", 0)]
    {
        server.wait_for_status(gid, status).await;
        assert_eq!(calls(&receiver, gid), times, "{gid}");
    }
    let received = receiver.received();
    let of_one = received.iter().filter(|request| request.target.contains("py-prepared"));
    let bodies: Vec<_> = of_one.map(|request| request.body.clone()).collect();
    assert_eq!(bodies, [&b"{\"amount\": 30}"[..], b"{\"amount\": 40}"]);
}
