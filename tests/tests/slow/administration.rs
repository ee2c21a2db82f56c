// SPDX-License-Identifier: PostgreSQL
//! What administrators do to a database while it is delivered from: the relay says what is wrong, harms nothing, and goes on as
//! soon as it can.

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::numbered::{DEADLINE, publish, subscribe, wait_for_all};

async fn shop(receiver: &Receiver) -> (Cluster, Client) {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    subscribe(&client, "s", "t", receiver).await;
    (cluster, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn drop_extension_ends_delivery_and_create_extension_begins_anew() {
    let receiver = Receiver::start().await;
    let (cluster, client) = shop(&receiver).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    publish(&client, "t", 1, 5).await;
    wait_for_all(&receiver, 5).await;
    client.batch_execute("DROP EXTENSION pg_dtm").await.expect("DROP EXTENSION");
    relay.wait_for_log("CREATE EXTENSION pg_dtm").await;
    client.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    subscribe(&client, "s", "t", &receiver).await;
    publish(&client, "t", 6, 10).await;
    wait_for_all(&receiver, 10).await;
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn whoever_writes_control_data_is_in_no_deadlock_with_drop_extension() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (dropping, writing) = (cluster.connect("shop").await, cluster.connect("shop").await);
    // As DROP EXTENSION does: all tables, in the order in which they were made.
    dropping.batch_execute("BEGIN; LOCK dtm.installation").await.expect("a lock");
    let writer = tokio::spawn(async move { writing.batch_execute("SELECT dtm.control_segment()").await });
    let waits = process::eventually(DEADLINE, async || {
        let sql = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        (dropping.query_one(sql, &[]).await.expect("a count").get::<_, i64>(0) > 0).then_some(())
    });
    waits.await.expect("the writer waits");
    dropping.batch_execute("LOCK dtm.rotation NOWAIT; ROLLBACK").await.expect("nobody has it");
    writer.await.expect("a task").expect("the writer goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn unsubscribe_while_events_are_on_their_way_ends_their_delivery_and_no_other() {
    let (slow, other) = (Receiver::start_with(|_| Reply::Hang).await, Receiver::start().await);
    let (cluster, client) = shop(&slow).await;
    subscribe(&client, "other", "t", &other).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    publish(&client, "t", 1, 20).await;
    slow.wait_for(1).await;
    client.execute("SELECT dtm.unsubscribe('s')", &[]).await.expect("unsubscribe");
    relay.wait_for_log("no longer delivered here").await;
    publish(&client, "t", 21, 40).await;
    wait_for_all(&other, 40).await;
    slow.behave(|_| Reply::status(200));
    // Made anew, it is another subscription: it begins now.
    subscribe(&client, "s", "t", &slow).await;
    publish(&client, "t", 41, 45).await;
    slow.wait_until("what came after", DEADLINE, |received| {
        received.iter().filter(|request| request.accepted).count() == 5
    })
    .await;
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_database_goes_on_under_its_new_name() {
    let receiver = Receiver::start().await;
    let (cluster, client) = shop(&receiver).await;
    let toml = |name: &str| format!("[database.shop]\nurl = \"{}\"\n", cluster.url(name));
    let mut relay = Relay::start_configured(&toml("shop"));
    publish(&client, "t", 1, 5).await;
    wait_for_all(&receiver, 5).await;
    assert!(relay.terminate().await.success());
    publish(&client, "t", 6, 10).await;
    drop(client);
    let admin = cluster.connect("postgres").await;
    let renamed = process::eventually(DEADLINE, || async {
        admin.batch_execute("ALTER DATABASE shop RENAME TO store").await.ok()
    });
    renamed.await.expect("everybody has gone");
    relay.restart();
    relay.wait_for_log("does not exist").await;
    assert!(relay.terminate().await.success());
    relay.configure(&toml("store"));
    relay.restart();
    wait_for_all(&receiver, 10).await;
    assert!(relay.terminate().await.success());
    assert_eq!(receiver.count(), 10, "nothing is repeated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_under_another_role_says_what_it_lacks_and_goes_on_once_it_has_it() {
    let receiver = Receiver::start().await;
    let (cluster, client) = shop(&receiver).await;
    client.batch_execute("CREATE ROLE dtm_relay LOGIN").await.expect("a role");
    let mut relay = Relay::start(&cluster.url_as("dtm_relay", "shop"));
    publish(&client, "t", 1, 5).await;
    relay.wait_for_log("permission denied").await;
    assert!(relay.log().contains("dtm-relay check"), "it says what to do: {}", relay.log());
    let grants = "GRANT USAGE ON SCHEMA dtm TO dtm_relay; \
                  GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA dtm TO dtm_relay; \
                  GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA dtm TO dtm_relay; \
                  GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dtm TO dtm_relay";
    client.batch_execute(grants).await.expect("the grants of the README");
    wait_for_all(&receiver, 5).await;
    assert!(relay.terminate().await.success());
    // Its upkeep, too, is done with these rights.
    assert!(!relay.log().contains("rotating"), "{}", relay.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_upgraded_first_waits_for_the_extension_and_delivers_what_waited() {
    let receiver = Receiver::start().await;
    let cluster = Cluster::builder().preload().start().await;
    cluster.connect("postgres").await.batch_execute("CREATE DATABASE shop").await.expect("a database");
    let client = cluster.connect("shop").await;
    client.batch_execute("CREATE EXTENSION pg_dtm VERSION '0.1'").await.expect("the version before");
    subscribe(&client, "s", "t", &receiver).await;
    publish(&client, "t", 1, 10).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    relay.wait_for_log("ALTER EXTENSION pg_dtm UPDATE").await;
    publish(&client, "t", 11, 20).await;
    assert_eq!(receiver.count(), 0);
    client.batch_execute("ALTER EXTENSION pg_dtm UPDATE").await.expect("the upgrade");
    publish(&client, "t", 21, 30).await;
    wait_for_all(&receiver, 30).await;
    assert!(relay.terminate().await.success());
    assert_eq!(receiver.count(), 30, "nothing is repeated");
}
