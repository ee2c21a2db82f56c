// SPDX-License-Identifier: PostgreSQL
//! Subscriptions: where they begin, what they match, and what happens to their cursors.

use dtm_tests::cluster::Cluster;
use tokio_postgres::Client;

use crate::reading::pending;

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

async fn publish(client: &Client, topic: &str, n: i32) {
    client.execute("SELECT dtm.publish($1, to_jsonb($2::int))", &[&topic, &n]).await.expect("publish");
}

async fn leased(client: &Client) -> Vec<String> {
    let sql =
        "SELECT name FROM dtm.relay_lease('00000000-0000-0000-0000-0000000000cc', 'test', 60) ORDER BY name";
    client.query(sql, &[]).await.expect("leases").iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn it_begins_now_at_the_earliest_event_or_at_a_time() {
    let (_cluster, client) = shop().await;
    for n in 1..=4 {
        publish(&client, "t", n).await;
    }
    let third: String = client
        .query_one("SELECT published_at::text FROM dtm.events WHERE payload = '3'", &[])
        .await
        .expect("a time")
        .get(0);
    for (name, start_at) in [("now", "now"), ("earliest", "earliest"), ("third", &*third)] {
        let sql = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/', start_at => $2)";
        client.execute(sql, &[&name, &start_at]).await.expect("subscribe");
    }
    publish(&client, "t", 5).await;
    assert_eq!(pending(&client, "now").await, ["5"]);
    assert_eq!(pending(&client, "earliest").await, ["1", "2", "3", "4", "5"]);
    // A page is asked for with the subscription's time; this reads what lies in the window without it.
    let sql = "SELECT since = $1::text::timestamptz FROM dtm.subscriptions WHERE name = 'third'";
    assert!(client.query_one(sql, &[&third]).await.expect("since").get::<_, bool>(0));
    let sql = "SELECT dtm.relay_page(c.\"position\", dtm.relay_poll(NULL), 0, s.topics, s.since, 100, 100000) \
               FROM dtm.subscription s, dtm.relay_cursor(s.id, 0, s.epoch) c WHERE s.name = 'third'";
    let page: Vec<u8> = client.query_one(sql, &[]).await.expect("a page").get(0);
    let page = dtm_core::page::Page::decode(page.into()).expect("a page");
    let found: Vec<_> = page.events.iter().map(|event| event.payload.clone().expect("a payload")).collect();
    assert_eq!(found, ["3", "4", "5"]);
}

#[tokio::test]
async fn it_matches_by_patterns() {
    let (_cluster, client) = shop().await;
    for (name, topics) in [
        ("exact", vec!["orders.created"]),
        ("one", vec!["orders.*"]),
        ("rest", vec!["orders.>"]),
        ("two", vec!["users.created", "orders.eu.*"]),
        ("all", vec![">"]),
    ] {
        let sql = "SELECT dtm.subscribe($1, $2::text[], 'http://127.0.0.1:9/')";
        client.execute(sql, &[&name, &topics]).await.expect("subscribe");
    }
    for (n, topic) in
        ["orders.created", "orders.eu.created", "orders", "users.created", "orders.paid"].iter().enumerate()
    {
        publish(&client, topic, n as i32).await;
    }
    for (name, expected) in [
        ("exact", vec!["0"]),
        ("one", vec!["0", "4"]),
        ("rest", vec!["0", "1", "4"]),
        ("two", vec!["1", "3"]),
        ("all", vec!["0", "1", "2", "3", "4"]),
    ] {
        assert_eq!(pending(&client, name).await, expected, "{name}");
    }
}

#[tokio::test]
async fn subscribing_again_changes_it_and_keeps_its_cursor() {
    let (_cluster, client) = shop().await;
    let subscribe = "SELECT dtm.subscribe('s', $1, $2, $3::text::jsonb, $4)";
    let first: i64 = client
        .query_one(subscribe, &[&"a", &"http://127.0.0.1:9/", &"{}", &"now"])
        .await
        .expect("subscribe")
        .get(0);
    publish(&client, "a", 1).await;
    publish(&client, "b", 2).await;
    let again: i64 = client
        .query_one(subscribe, &[&"b", &"http://127.0.0.1:10/", &"{\"timeout\": \"3s\"}", &"earliest"])
        .await
        .expect("subscribe again")
        .get(0);
    assert_eq!(first, again);
    assert_eq!(pending(&client, "s").await, ["2"], "from where it stood");
    let sql = "SELECT (topics, destination, options, state, epoch) = \
               ('{b}'::text[], 'http://127.0.0.1:10/', '{\"timeout\": \"3s\"}'::jsonb, 'active', 1::bigint) FROM dtm.subscriptions";
    assert!(client.query_one(sql, &[]).await.expect("it").get::<_, bool>(0));
}

#[tokio::test]
async fn pause_resume_rewind_and_unsubscribe_do_what_they_say() {
    let (_cluster, client) = shop().await;
    for name in ["a", "b"] {
        let sql = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/')";
        client.execute(sql, &[&name]).await.expect("subscribe");
    }
    publish(&client, "t", 1).await;
    assert_eq!(leased(&client).await, ["a", "b"]);
    client.execute("SELECT dtm.pause('a')", &[]).await.expect("pause");
    assert_eq!(leased(&client).await, ["b"], "a relay lets go of what is paused");
    publish(&client, "t", 2).await;
    client.execute("SELECT dtm.resume('a')", &[]).await.expect("resume");
    assert_eq!(leased(&client).await, ["a", "b"]);
    assert_eq!(pending(&client, "a").await, ["1", "2"], "it goes on where it stood");

    client.execute("SELECT dtm.rewind('a', 'now')", &[]).await.expect("rewind");
    assert!(pending(&client, "a").await.is_empty());
    client.execute("SELECT dtm.rewind('a', 'earliest')", &[]).await.expect("rewind");
    assert_eq!(pending(&client, "a").await, ["1", "2"]);
    let sql = "SELECT epoch FROM dtm.subscriptions WHERE name = 'a'";
    assert_eq!(client.query_one(sql, &[]).await.expect("epoch").get::<_, i64>(0), 3);

    client.execute("SELECT dtm.unsubscribe('a')", &[]).await.expect("unsubscribe");
    assert_eq!(leased(&client).await, ["b"]);
    client.execute("SELECT dtm.subscribe('a', 't', 'http://127.0.0.1:9/')", &[]).await.expect("subscribe");
    assert!(pending(&client, "a").await.is_empty(), "a new one of the same name begins anew");
}

#[tokio::test]
async fn the_view_tells_state_owner_and_lag() {
    let (_cluster, client) = shop().await;
    client.execute("SELECT dtm.subscribe('s', 't', 'http://127.0.0.1:9/')", &[]).await.expect("subscribe");
    let sql = "SELECT state, owner, lag_seconds, lag_events FROM dtm.subscriptions";
    let row = client.query_one(sql, &[]).await.expect("it");
    let state: (String, Option<String>, f64, i64) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(state, ("active".to_owned(), None, 0.0, 0));
    for n in 0..5 {
        publish(&client, "t", n).await;
    }
    leased(&client).await;
    let row = client.query_one(sql, &[]).await.expect("it");
    assert_eq!((row.get::<_, &str>(1), row.get::<_, i64>(3)), ("test", 5));
    assert!(row.get::<_, f64>(2) > 0.0);
}

/// The lag in seconds, and in events.
async fn lag(client: &Client) -> (Option<f64>, Option<i64>) {
    let row =
        client.query_one("SELECT lag_seconds, lag_events FROM dtm.subscriptions", &[]).await.expect("it");
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn the_lag_counts_what_a_transaction_published_that_ended_after_the_cursor_had_passed() {
    let (cluster, client) = shop().await;
    client.execute("SELECT dtm.subscribe('s', 't', 'http://127.0.0.1:9/')", &[]).await.expect("subscribe");
    let open = cluster.connect("shop").await;
    open.batch_execute("BEGIN; SELECT dtm.publish('t', '1')").await.expect("publish");
    for n in 2..=4 {
        publish(&client, "t", n).await;
    }
    leased(&client).await;
    let save = "SELECT dtm.relay_move(ARRAY[dtm.relay_poll(NULL)], ARRAY[s.id], ARRAY[0], ARRAY[s.epoch], ARRAY[o.token], \
                ARRAY[-1::bigint], ARRAY[NULL::bigint], ARRAY[0::bigint]) \
                FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id";
    client.execute(save, &[]).await.expect("a cursor");
    assert_eq!(lag(&client).await, (Some(0.0), Some(0)), "what is not committed is not late");
    open.batch_execute("COMMIT").await.expect("COMMIT");
    let (seconds, events) = lag(&client).await;
    assert!(seconds.is_some_and(|seconds| seconds > 0.0) && events.is_some_and(|events| events >= 1));
    client.execute("DELETE FROM dtm.cursor_log_1", &[]).await.expect("delete");
    assert_eq!(lag(&client).await, (None, None), "without a cursor there is nothing to measure from");
}
