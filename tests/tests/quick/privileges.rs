// SPDX-License-Identifier: PostgreSQL
//! Who may do what: a publisher can publish and read nothing, a relay needs what the README says.

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

/// The statements of the README's snippet that follows a line.
fn readme(after: &str) -> String {
    let text = include_str!("../../../README.md");
    let (_, rest) = text
        .split_once(&format!("\n{after}\n\n```sql\n"))
        .unwrap_or_else(|| panic!("{after:?} in the README"));
    rest.split_once("```").expect("the snippet's end").0.to_owned()
}

async fn names(client: &Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).await.expect("names").iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_publisher_publishes_and_can_read_nothing() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("store").await;
    let admin = cluster.connect("store").await;
    admin.batch_execute("CREATE ROLE shop LOGIN").await.expect("a role");
    admin.batch_execute("CREATE ROLE nobody LOGIN").await.expect("a role");
    let snippet = readme("`PUBLIC` may do nothing. A publisher can publish and read nothing:");
    admin.batch_execute(&snippet).await.expect("the README's grants");
    let shop = cluster.connect_as("shop", "store").await;
    let sql = "SELECT dtm.publish('t', '1', 'k', '{\"x\": \"y\"}'), dtm.publish('t', '1', id => gen_random_uuid()), \
               dtm.publish('t', '1', deliver_at => now() + interval '1 h')";
    shop.execute(sql, &[]).await.expect("publish");

    let relations = "SELECT oid::regclass::text FROM pg_class \
                     WHERE relnamespace = 'dtm'::regnamespace AND relkind IN ('r', 'v', 'S')";
    let relations = names(&admin, relations).await;
    assert!(relations.len() > 15);
    for relation in &relations {
        let error = shop.execute(&format!("SELECT * FROM {relation}"), &[]).await.expect_err(relation);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{relation}");
    }
    let callable = "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'dtm'::regnamespace \
                    AND has_function_privilege('shop', oid, 'EXECUTE') AND proname <> 'publish' \
                    AND proname NOT IN ('receipts_kept', 'barriers_kept')"; // settings, which all may SHOW
    assert!(names(&admin, callable).await.is_empty());
    let nobody = cluster.connect_as("nobody", "store").await;
    let error = nobody.execute("SELECT dtm.publish('t', '1')", &[]).await.expect_err("nobody");
    assert_eq!(error.code().map(|code| code.code()), Some("42501"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readmes_grants_are_all_that_a_relay_needs() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("store").await;
    let admin = cluster.connect("store").await;
    admin.batch_execute(&readme("A relay:")).await.expect("the README's grants");
    let receiver = Receiver::start().await;
    admin.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url_as("dtm_relay", "store"));
    let sql = "SELECT dtm.publish('t', '1'), dtm.publish('t', '2', deliver_at => now()), dtm.publish('t', '3', id => gen_random_uuid())";
    admin.execute(sql, &[]).await.expect("publish");
    receiver.wait_for(3).await;
    assert!(relay.terminate().await.success());
    assert!(!relay.log().contains("42501"), "{}", relay.log());
    let stored = "SELECT count(*) FROM dtm.cursor_log WHERE token > 0";
    assert!(
        admin.query_one(stored, &[]).await.expect("cursors").get::<_, i64>(0) > 0,
        "no cursor was stored"
    );
    let relay = cluster.connect_as("dtm_relay", "store").await;
    relay.execute("SELECT dtm.purge()", &[]).await.expect("purge");
}

#[tokio::test]
async fn a_receiver_needs_only_the_function() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("store").await;
    let admin = cluster.connect("store").await;
    let sql = "CREATE ROLE consumer LOGIN; GRANT USAGE ON SCHEMA dtm TO consumer; \
               GRANT EXECUTE ON FUNCTION dtm.receive TO consumer";
    admin.batch_execute(sql).await.expect("grants");
    let consumer = cluster.connect_as("consumer", "store").await;
    // What stands in the way of a definer's rights: a path of the caller's.
    consumer
        .batch_execute("CREATE TEMP TABLE receipts (a int); SET search_path = pg_temp, dtm")
        .await
        .expect("a path");
    let sql = "SELECT dtm.receive('c', '018f2f6e-7c1a-7cc0-a3a5-1f0a3c2b9d11')";
    assert!(consumer.query_one(sql, &[]).await.expect("receive").get::<_, bool>(0));
    let error = consumer.execute("SELECT * FROM dtm.receipts", &[]).await.expect_err("no rights");
    assert_eq!(error.code().map(|code| code.code()), Some("42501"));
}
