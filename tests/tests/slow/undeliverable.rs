// SPDX-License-Identifier: PostgreSQL
//! Subscriptions that cannot be delivered are told of, and how to mend them.

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::{self, Relay};

use crate::numbered::{publish, subscribe, wait_for_all};

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_without_a_usable_cursor_is_found_by_check_and_delivered_after_a_rewind() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    subscribe(&client, "s", "t", &receiver).await;
    publish(&client, "t", 1, 3).await;
    client.execute("DELETE FROM dtm.cursor_log_1", &[]).await.expect("delete");
    let (fine, said) = relay::run(&["check", "--database-url", &cluster.url("shop")]);
    assert!(!fine && said.contains("\"s\" has no cursor") && said.contains("dtm.rewind"), "{said}");
    let mut relay = Relay::start(&cluster.url("shop"));
    relay.wait_for_log("it has no cursor").await;
    client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    wait_for_all(&receiver, 3).await;
    assert!(relay.terminate().await.success());
    let (fine, said) = relay::run(&["check", "--database-url", &cluster.url("shop")]);
    assert!(fine, "{said}");
    let sql = "TRUNCATE dtm.log_1, dtm.log_2, dtm.log_3; DELETE FROM dtm.eras; \
               UPDATE dtm.installation SET era = era + 1; UPDATE dtm.subscription SET era = era + 1; \
               INSERT INTO dtm.eras (era, ordinal) SELECT era, 1 FROM dtm.installation";
    client.batch_execute(sql).await.expect("an era that nobody knows any more");
    let (fine, said) = relay::run(&["check", "--database-url", &cluster.url("shop")]);
    assert!(!fine && said.contains("\"s\" has a cursor in an era"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_shows_the_subscriptions_of_a_restored_database_as_a_relay_will_find_them_and_changes_nothing()
{
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    subscribe(&client, "s", "t", &receiver).await;
    let url = cluster.url("shop");
    let mut relay = Relay::start(&url);
    relay.wait_for_log("connected to").await;
    assert!(relay.terminate().await.success());
    // As a restore from a dump leaves it: a row of its own, with a new era.
    client.execute("UPDATE dtm.installation SET era = era + 1", &[]).await.expect("update");
    for _ in 0..2 {
        let (fine, said) = relay::run(&["check", "--database-url", &url]);
        assert!(fine && said.contains("\"s\" is paused (the database was restored or copied)"), "{said}");
        let state = client.query_one("SELECT state FROM dtm.subscription", &[]).await.expect("state");
        assert_eq!(state.get::<_, &str>(0), "active");
    }
}
