// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay check` and `dtm-relay adopt`: what they find wrong, and that what they say mends it.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::{self, Relay};

fn check(url: &str) -> (bool, String) {
    relay::run(&["check", "--database-url", url])
}

#[tokio::test(flavor = "multi_thread")]
async fn check_names_missing_privileges_and_its_grants_are_all_that_was_missing() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    client.batch_execute("CREATE ROLE dtm_relay LOGIN").await.expect("a role");
    let url = cluster.url_as("dtm_relay", "shop");
    let mut granted = 0;
    loop {
        let (fine, said) = check(&url);
        if fine {
            break;
        }
        let grants: Vec<&str> = said
            .match_indices("GRANT ")
            .filter_map(|(at, _)| said[at..].split_inclusive(';').next())
            .collect();
        assert!(!grants.is_empty() && granted < 20, "no way to mend it: {said}");
        granted += grants.len();
        client.batch_execute(&grants.concat()).await.expect("the grants that it names");
    }
    assert!(granted > 0);
    let receiver = Receiver::start().await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&url);
    client.execute("SELECT dtm.publish('t', '1')", &[]).await.expect("publish");
    receiver.wait_for(1).await;
    assert!(relay.terminate().await.success());
    assert!(!relay.log().contains("42501"), "{}", relay.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_is_wrong_and_fails() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    cluster.connect("postgres").await.batch_execute("CREATE DATABASE empty").await.expect("a database");
    let shop = cluster.url("shop");
    for (arguments, part) in [
        (vec!["check"], "no database to deliver from"),
        (vec!["check", "--database-url", "postgres://u@h/d?sslmode=no"], "sslmode=no"),
        (vec!["check", "--database-url", &shop, "--config", "/nowhere.toml"], "/nowhere.toml"),
        (vec!["check", "--database-url", &cluster.url("nowhere")], "\"nowhere\" does not exist"),
        (vec!["check", "--database-url", &cluster.url("empty")], "CREATE EXTENSION pg_dtm"),
        (vec!["check", "--database-url", "postgres://postgres@127.0.0.1:1/shop"], "refused"),
    ] {
        let (fine, said) = relay::run(&arguments);
        assert!(!fine && said.contains(part), "{arguments:?}: {part:?} in {said}");
    }
    let (fine, said) = check(&shop);
    assert!(fine && said.contains("nothing is wrong") && said.contains("no subscriptions"), "{said}");
    // A check leaves nothing behind: no environment either.
    assert!(relay::run(&["check", "--database-url", &shop, "--environment", "another"]).0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_database_delivers_nothing_until_it_is_adopted() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    let subscribe = "SELECT dtm.subscribe('waits', 't', $1), \
                     dtm.subscribe('goes_on', 't', $1, '{\"on_restore\": \"continue\"}')";
    client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    // Published in the original and not delivered yet: it is the original's to deliver.
    client.execute("SELECT dtm.publish('t', '1')", &[]).await.expect("publish");
    drop(client);
    let admin = cluster.connect("postgres").await;
    let ended = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'shop'";
    let alone = process::eventually(Duration::from_secs(10), || async {
        let sessions: i64 = admin.query_one(ended, &[]).await.expect("sessions").get(0);
        (sessions == 0).then_some(())
    });
    alone.await.expect("sessions end");
    admin.batch_execute("CREATE DATABASE copy TEMPLATE shop").await.expect("a copy");

    let url = cluster.url("copy");
    let (fine, said) = check(&url);
    assert!(!fine && said.contains("copy of another") && said.contains("dtm-relay adopt"), "{said}");
    let mut relay = Relay::start(&url);
    relay.wait_for_log("not delivering").await;
    assert!(relay.terminate().await.success());
    assert_eq!(receiver.count(), 0);

    let (fine, said) = relay::run(&["adopt", "--database-url", &url, "--environment", "staging"]);
    assert!(fine && said.contains("paused: waits"), "{said}");
    let (fine, said) = check(&url);
    assert!(!fine && said.contains("environment"), "it belongs to another environment now: {said}");
    let mut relay = Relay::start_with(&["--database-url", &url, "--environment", "staging"]);
    let copy = cluster.connect("copy").await;
    copy.execute("SELECT dtm.publish('t', '2')", &[]).await.expect("publish");
    receiver
        .wait_until("what the copy has published", Duration::from_secs(30), |received| {
            received.iter().any(|request| &request.body[..] == b"2")
        })
        .await;
    copy.execute("SELECT dtm.resume('waits')", &[]).await.expect("resume");
    receiver
        .wait_until("the other too", Duration::from_secs(30), |received| {
            received.iter().filter(|request| &request.body[..] == b"2").count() == 2
        })
        .await;
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn adopting_tries_again_until_those_who_publish_have_ended() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (client, publisher) = (cluster.connect("shop").await, cluster.connect("shop").await);
    publisher.batch_execute("BEGIN; SELECT dtm.publish('t', '1')").await.expect("publish");
    let url = cluster.url("shop");
    let adopting = tokio::task::spawn_blocking(move || {
        relay::run(&["adopt", "--database-url", &url, "--environment", "staging"])
    });
    let in_the_way = "transactions that have published, or changed subscriptions, are still open";
    let tried = process::holds_within(Duration::from_secs(10), || cluster.log().contains(in_the_way));
    assert!(tried.await, "it was not in the way:\n{}", cluster.log());
    publisher.batch_execute("COMMIT").await.expect("COMMIT");
    let (fine, said) = adopting.await.expect("it ends");
    assert!(fine && said.contains("adopted"), "{said}");
    let eras = "SELECT count(DISTINCT era) FROM (SELECT era FROM dtm.log UNION ALL SELECT era FROM dtm.installation) e";
    assert_eq!(client.query_one(eras, &[]).await.expect("eras").get::<_, i64>(0), 2);
}

#[tokio::test]
async fn check_refuses_a_memory_of_receivers_that_is_shorter_than_what_is_tried_again() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let subscribe = "SELECT dtm.subscribe('patient', 't', 'http://127.0.0.1:9/', '{\"retry_schedule\": [\"2d\", \"20d\"]}')";
    client.execute(subscribe, &[]).await.expect("subscribe");
    assert!(check(&cluster.url("shop")).0);
    let settings =
        "ALTER DATABASE shop SET dtm.barriers_kept = '1h'; ALTER DATABASE shop SET dtm.receipts_kept = '21d'";
    client.batch_execute(settings).await.expect("settings");
    let (fine, said) = check(&cluster.url("shop"));
    assert!(
        !fine && said.contains("raise dtm.barriers_kept") && said.contains("\"patient\" may try"),
        "{said}"
    );
}

#[tokio::test]
async fn check_refuses_a_target_that_forgets_before_its_calls_are_given_up() {
    let cluster = Cluster::builder().start().await;
    for database in ["shop", "stock"] {
        cluster.create_database(database).await;
    }
    let (client, stock) = (cluster.connect("shop").await, cluster.connect("stock").await);
    let objects = "CREATE FUNCTION f(event jsonb) RETURNS void LANGUAGE sql AS ''; CREATE ROLE relay LOGIN;
        GRANT USAGE ON SCHEMA dtm TO relay;
        GRANT EXECUTE ON FUNCTION dtm.receive, dtm.call_events, dtm.call_branch, dtm.barrier, dtm.query_prepared TO relay";
    stock.batch_execute(objects).await.expect("objects");
    let subscribe = "SELECT dtm.subscribe('patient', 't', 'postgres://stock/public.f', '{\"retry_schedule\": [\"2d\", \"5d\"]}')";
    client.execute(subscribe, &[]).await.expect("subscribe");
    let configuration = format!(
        "[database.shop]\nurl = \"{}\"\n[postgres.stock]\nurl = \"{}\"\n",
        cluster.url("shop"),
        cluster.url_as("relay", "stock")
    );
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), &configuration).expect("a file");
    let check = || relay::run(&["check", "--config", &file.path().display().to_string()]);
    let (fine, said) = check();
    assert!(fine && !said.contains("may change subscriptions"), "{said}");
    let settings = "ALTER DATABASE stock SET dtm.barriers_kept = '15d'; ALTER DATABASE stock SET dtm.receipts_kept = '6d'";
    client.batch_execute(settings).await.expect("settings");
    let (fine, said) = check();
    assert!(
        !fine
            && said.contains("kept by postgres.stock for 1296000 s")
            && said.contains("\"patient\" may try"),
        "{said}"
    );
}
