// SPDX-License-Identifier: PostgreSQL
//! From SQL to an endpoint: the form in which an event arrives, and what does not hold it up.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(30);

async fn shop(preload: bool) -> (Cluster, Client, Receiver) {
    let builder = Cluster::builder().config("max_prepared_transactions", "10");
    let cluster = if preload { builder.preload() } else { builder }.start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    let subscribe = "SELECT dtm.subscribe('s', '>', $1, '{\"retry_base\": \"50ms\"}')";
    client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    (cluster, client, receiver)
}

fn types(received: &[Received]) -> Vec<&str> {
    received.iter().map(|request| request.header("ce-type")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_as_a_cloudevent_in_binary_mode() {
    let (cluster, client, receiver) = shop(true).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    let sql = r#"
        SELECT dtm.publish('orders.created', '{"id": 42, "id": 43}', key => 'Zürich "1"',
            headers => '{"ce-subject": "orders/42 €", "x-tenant": "7", "ce-traceparent": "00-a"}',
            id => '018f2f6e-7c1a-7cc0-a3a5-1f0a3c2b9d11');
        SELECT dtm.publish_bytes('images.made', '\x00ff89504e47', 'image/png');
        SELECT dtm.publish('orders.deleted', NULL);
        SELECT dtm.publish('orders.emptied', 'null');"#;
    client.batch_execute(sql).await.expect("publish");
    receiver.wait_for(4).await;
    let mut received = receiver.received();
    received.sort_by_key(|request| request.header("ce-type").to_owned());
    let [images, created, deleted, emptied] = received.try_into().expect("four");

    assert_eq!((created.method.as_str(), created.target.as_str()), ("POST", "/events"));
    let expected = [
        ("ce-specversion", "1.0"),
        ("ce-type", "orders.created"),
        ("ce-source", "/pg_dtm/shop"),
        ("ce-id", "018f2f6e-7c1a-7cc0-a3a5-1f0a3c2b9d11"),
        ("ce-partitionkey", "Z%C3%BCrich%20%221%22"),
        ("ce-subject", "orders/42%20%E2%82%AC"),
        ("ce-traceparent", "00-a"),
        ("x-tenant", "7"),
        ("content-type", "application/json"),
    ];
    for (name, value) in expected {
        assert_eq!(created.header(name), value, "{name}");
    }
    let stored = "SELECT to_char(published_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') \
                  FROM dtm.events WHERE topic = 'orders.created'";
    let time: String = client.query_one(stored, &[]).await.expect("its time").get(0);
    assert_eq!(created.header("ce-time"), time);
    let jsonb: String =
        client.query_one("SELECT '{\"id\": 43}'::jsonb::text", &[]).await.expect("jsonb").get(0);
    assert_eq!(created.body, jsonb.as_bytes());

    assert_eq!(images.header("content-type"), "image/png");
    assert_eq!(&images.body[..], b"\x00\xff\x89PNG");
    assert_eq!((deleted.header("content-type"), deleted.body.len()), ("", 0));
    assert!(deleted.headers.get("ce-partitionkey").is_none() && deleted.headers.get("ce-subject").is_none());
    assert_eq!((emptied.header("content-type"), &emptied.body[..]), ("application/json", &b"null"[..]));
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_commits_is_delivered_and_what_rolls_back_never_is() {
    let (cluster, client, receiver) = shop(false).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    for statement in [
        "BEGIN; SELECT dtm.publish('no.rollback', '1'); ROLLBACK",
        "BEGIN; SELECT dtm.publish('yes.first', '1'); SAVEPOINT s; SELECT dtm.publish('no.savepoint', '1'); \
         ROLLBACK TO s; SELECT dtm.publish('yes.after', '1'); COMMIT",
        "BEGIN; SELECT dtm.publish('no.prepared', '1'); PREPARE TRANSACTION 'a'",
        "ROLLBACK PREPARED 'a'",
        "BEGIN; SELECT dtm.publish('yes.prepared', '1'); PREPARE TRANSACTION 'b'",
        "COMMIT PREPARED 'b'",
        "DO $$ BEGIN PERFORM dtm.publish('no.exception', '1'); RAISE 'x'; EXCEPTION WHEN OTHERS THEN \
         PERFORM dtm.publish('yes.handler', '1'); END $$",
        "SELECT dtm.publish('yes.last', '1')",
    ] {
        // Statement by statement: what is sent as one string would be one transaction.
        for part in statement.split_inclusive(';').filter(|_| !statement.starts_with("DO")) {
            client.batch_execute(part).await.unwrap_or_else(|error| panic!("{part}: {error}"));
        }
        if statement.starts_with("DO") {
            client.batch_execute(statement).await.expect("DO");
        }
    }
    receiver.wait_until("the last", DEADLINE, |received| types(received).contains(&"yes.last")).await;
    assert!(relay.terminate().await.success());
    let received = receiver.received();
    let mut found = types(&received);
    found.sort_unstable();
    assert_eq!(found, ["yes.after", "yes.first", "yes.handler", "yes.last", "yes.prepared"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_delivery_is_tried_again_with_the_same_id_and_its_key_waits_for_it() {
    let (cluster, client, receiver) = shop(true).await;
    let mut failures = 4;
    receiver.behave(move |request| {
        let fail = request.header("ce-type") == "first" && failures > 0;
        failures -= i32::from(fail);
        Reply::status(if fail { 503 } else { 200 })
    });
    let _relay = Relay::start(&cluster.url("shop"));
    for topic in ["first", "second"] {
        client.execute("SELECT dtm.publish($1, '1', key => 'k')", &[&topic]).await.expect("publish");
    }
    client.execute("SELECT dtm.publish('other', '1', key => 'l')", &[]).await.expect("publish");
    receiver
        .wait_until("all", DEADLINE, |received| received.iter().filter(|r| r.accepted).count() == 3)
        .await;
    let received = receiver.received();
    let of_key: Vec<_> = received.iter().filter(|r| r.header("ce-partitionkey") == "k").collect();
    let types: Vec<_> = of_key.iter().map(|request| request.header("ce-type")).collect();
    assert_eq!(types, ["first", "first", "first", "first", "first", "second"]);
    assert!(of_key[..5].iter().all(|request| request.id() == of_key[0].id()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_stays_open_and_a_reader_that_pins_the_horizon_delay_only_their_own() {
    let (cluster, client, receiver) = shop(true).await;
    let (writer, pinning) = (cluster.connect("shop").await, cluster.connect("shop").await);
    let pin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM dtm.events";
    pinning.batch_execute(pin).await.expect("a snapshot");
    writer.batch_execute("BEGIN; SELECT dtm.publish('open', '1')").await.expect("publish");
    let mut relay = Relay::start(&cluster.url("shop"));
    for n in 1..=50i32 {
        let sql = "SELECT dtm.publish('t', to_jsonb($1::int), key => 'k')";
        client.execute(sql, &[&n]).await.expect("publish");
        if n == 25 {
            // Also over a restart, which goes on from a stored position with the writer in it.
            receiver.wait_for(25).await;
            assert!(relay.terminate().await.success());
            relay.restart();
        }
    }
    receiver.wait_for(50).await;
    assert!(!types(&receiver.received()).contains(&"open"));
    writer.batch_execute("COMMIT").await.expect("commit");
    receiver.wait_for(51).await;
    assert_eq!(types(&receiver.received()).last(), Some(&"open"));
    let bodies: Vec<_> = receiver.received()[..50].iter().map(|request| request.body.clone()).collect();
    let expected: Vec<_> = (1..=50).map(|n: i32| bytes::Bytes::from(n.to_string())).collect();
    assert_eq!(bodies, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_event_arrives_within_a_second_of_its_time_and_not_before() {
    let (cluster, client, receiver) = shop(false).await;
    let _relay = Relay::start(&cluster.url("shop"));
    let sql =
        "SELECT dtm.publish('now', '1'), dtm.publish('past', '1', deliver_at => now() - interval '1 h')";
    client.execute(sql, &[]).await.expect("publish");
    receiver.wait_for(2).await;
    // Server, relay and receiver read one clock here.
    let (now, since_epoch) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).expect("a time"));
    let times = [700, 1_100, 1_500, 2_300].map(Duration::from_millis);
    for (n, time) in (0i32..).zip(times) {
        let due = (since_epoch + time).as_secs_f64();
        let sql = "SELECT dtm.publish('later', to_jsonb($1::int), deliver_at => to_timestamp($2))";
        client.execute(sql, &[&n, &due]).await.expect("publish");
    }
    receiver.wait_for(2 + times.len()).await;
    for (n, request) in receiver.received()[2..].iter().enumerate() {
        assert_eq!(request.body, n.to_string(), "in the order of their times");
        let at = request.at - now;
        // The two clocks that are read above are a moment apart, and PostgreSQL counts microseconds.
        assert!(at + Duration::from_millis(5) > times[n], "due after {:?}, it came after {at:?}", times[n]);
        assert!(at < times[n] + Duration::from_secs(1), "due after {:?}, it came after {at:?}", times[n]);
    }
}

#[tokio::test]
async fn one_relay_at_a_time_moves_due_events() {
    let (cluster, client, _receiver) = shop(false).await;
    let due = "SELECT dtm.publish('t', to_jsonb(n), key => 'k', deliver_at => clock_timestamp() + interval '1 ms') \
               FROM generate_series(1, 4) n";
    client.execute(due, &[]).await.expect("publish");
    let (first, second) = (cluster.connect("shop").await, cluster.connect("shop").await);
    let relay_due = |client: Client, rows: i32| async move {
        let row =
            client.query_one("SELECT moved, next_in FROM dtm.relay_due($1)", &[&rows]).await.expect("due");
        (client, (row.get::<_, i32>(0), row.get::<_, Option<f64>>(1)))
    };
    let all_due = process::eventually(DEADLINE, || async {
        let sql = "SELECT max(due) < clock_timestamp() FROM dtm.delayed";
        client.query_one(sql, &[]).await.expect("delayed").get::<_, bool>(0).then_some(())
    });
    assert!(all_due.await.is_some());
    first.batch_execute("BEGIN").await.expect("BEGIN");
    let (first, (moved, _)) = relay_due(first, 2).await;
    assert_eq!(moved, 2);
    let (second, (moved, next_in)) = relay_due(second, 2).await;
    assert_eq!(moved, 0, "another one is at it");
    assert!(next_in.is_some_and(|seconds| seconds > 0.0 && seconds < 0.5), "it looks again soon");
    first.batch_execute("COMMIT").await.expect("COMMIT");
    let (_, moved) = relay_due(second, 10).await;
    assert_eq!(moved, (2, None));
    let sql = "SELECT array_agg(payload::int ORDER BY seq) FROM dtm.events";
    assert_eq!(client.query_one(sql, &[]).await.expect("events").get::<_, Vec<i32>>(0), [1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_event_arrives_byte_by_byte_as_it_was_published() {
    let (cluster, client, receiver) = shop(false).await;
    // Random, so that no compression makes it small: it is stored out of line.
    let body: Vec<u8> = (0..500_000).map(|_| rand::random()).collect();
    let sql = "CREATE TABLE document (body bytea)";
    client.batch_execute(sql).await.expect("a table");
    client.execute("INSERT INTO document VALUES ($1)", &[&body]).await.expect("a document");
    let sql = "SELECT dtm.publish_bytes('now', $1, 'application/octet-stream'), \
               dtm.publish_bytes('later', $1, 'application/octet-stream', deliver_at => now() + interval '300 ms'), \
               dtm.publish_bytes('stored', (SELECT body FROM document), 'application/octet-stream'), \
               dtm.publish('json', to_jsonb(encode($1, 'hex')), deliver_at => now() + interval '300 ms')";
    client.execute(sql, &[&body]).await.expect("publish");
    let _relay = Relay::start(&cluster.url("shop"));
    receiver.wait_for(4).await;
    let hex: String = body.iter().map(|byte| format!("{byte:02x}")).collect();
    let quoted = format!("\"{hex}\"").into_bytes();
    let received = receiver.received();
    let mut found = types(&received);
    found.sort_unstable();
    assert_eq!(found, ["json", "later", "now", "stored"]);
    for request in &received {
        let expected = if request.header("ce-type") == "json" { &quoted } else { &body };
        assert!(request.body == expected[..], "{} is not what was published", request.header("ce-type"));
    }
}
