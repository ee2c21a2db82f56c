// SPDX-License-Identifier: PostgreSQL
//! Positions where it is easy to get them wrong: at the very beginning, in a transaction of one's own, at the end of a page
//! of the WAL, and while waiting.

use std::time::{Duration, Instant};

use dtm_tests::cluster::Cluster;
use dtm_tests::process::eventually;
use futures_util::future::join_all;
use tokio_postgres::Client;

use crate::reading;

const DEADLINE: Duration = Duration::from_secs(30);

async fn publish(client: &Client, n: i32) {
    client.execute("SELECT dtm.publish('t', to_jsonb($1::int))", &[&n]).await.expect("publish");
}

async fn subscribe(client: &Client, name: &str) {
    client
        .execute("SELECT dtm.subscribe($1, '>', 'http://127.0.0.1:9/')", &[&name])
        .await
        .expect("subscribe");
}

#[tokio::test]
async fn the_very_first_event_of_a_database_is_read() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let before: String = client.query_one("SELECT dtm.relay_poll(NULL)", &[]).await.expect("head").get(0);
    let same: Option<String> =
        client.query_one("SELECT dtm.relay_poll($1)", &[&before]).await.expect("head").get(0);
    assert_eq!(same, None);
    subscribe(&client, "s").await;
    publish(&client, 1).await;
    let head: Option<String> =
        client.query_one("SELECT dtm.relay_poll($1)", &[&before]).await.expect("head").get(0);
    let head = head.expect("the head has moved");
    assert_eq!(reading::window(&client, &before, &head, 0, &[">".to_owned()]).await, ["1"]);
    assert_eq!(reading::pending(&client, "s").await, ["1"]);
}

#[tokio::test]
async fn a_subscription_gets_what_its_own_transaction_publishes_whatever_commits_in_between() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let (client, other) = (cluster.connect("shop").await, cluster.connect("shop").await);
    publish(&other, 1).await;
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let (after, before) = (format!("after-{}", &isolation[..4]), format!("before-{}", &isolation[..4]));
        client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).await.expect("BEGIN");
        subscribe(&client, &after).await;
        publish(&other, 2).await;
        publish(&client, 3).await;
        publish(&other, 4).await;
        client.batch_execute("COMMIT").await.expect("COMMIT");
        assert_eq!(reading::pending(&client, &after).await, ["2", "3", "4"], "{isolation}");

        client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).await.expect("BEGIN");
        publish(&client, 5).await;
        publish(&other, 6).await;
        subscribe(&client, &before).await;
        publish(&other, 7).await;
        publish(&client, 8).await;
        client.batch_execute("COMMIT").await.expect("COMMIT");
        assert_eq!(reading::pending(&client, &before).await, ["5", "7", "8"], "{isolation}");
    }
    client.batch_execute("BEGIN; SAVEPOINT s").await.expect("BEGIN");
    subscribe(&client, "undone").await;
    client.batch_execute("ROLLBACK TO s; COMMIT").await.expect("COMMIT");
    let count = "SELECT count(*) FROM dtm.subscription WHERE name = 'undone'";
    assert_eq!(client.query_one(count, &[]).await.expect("count").get::<_, i64>(0), 0);
}

#[tokio::test]
async fn a_position_can_be_flushed_where_the_wal_ends_at_the_end_of_a_page() {
    let cluster = Cluster::builder().config("autovacuum", "off").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let at = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
    let message = "SELECT 1 FROM pg_logical_emit_message(false, 'x', repeat('x', $1::int))";
    // What a record takes beyond its text; the least of a few, since one may lie across the header of a page.
    let mut overhead = i64::MAX;
    for _ in 0..4 {
        let here: i64 = client.query_one(at, &[]).await.expect("lsn").get(0);
        client.execute(message, &[&1000]).await.expect("a message");
        let there: i64 = client.query_one(at, &[]).await.expect("lsn").get(0);
        overhead = overhead.min(there - here - 1000);
    }
    let mut hits = 0;
    for _ in 0..400 {
        let here: i64 = client.query_one(at, &[]).await.expect("lsn").get(0);
        let room = 8192 - here % 8192;
        let length = i32::try_from(room - overhead).expect("a length");
        if length < 8 {
            client.execute(message, &[&500]).await.expect("a message");
            continue;
        }
        client.execute(message, &[&length]).await.expect("a message");
        let there: i64 = client.query_one(at, &[]).await.expect("lsn").get(0);
        hits += i32::from(there % 8192 == 24);
        client.query_one("SELECT dtm.relay_poll(NULL)", &[]).await.expect("a flushed position");
    }
    assert!(hits >= 50, "only {hits} positions were read at the end of a page");
}

#[tokio::test]
async fn a_relay_that_waits_holds_no_snapshot_and_leaves_its_place_when_it_is_killed() {
    let cluster = Cluster::builder().preload().config("max_connections", "100").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let head: String = client.query_one("SELECT dtm.relay_poll(NULL)", &[]).await.expect("head").get(0);
    // More than there are places, a few at a time.
    for _ in 0..4 {
        let sessions = join_all((0..20).map(|_| cluster.connect("shop"))).await;
        let waiting: Vec<_> = sessions
            .into_iter()
            .map(|waiter| {
                let head = head.clone();
                tokio::spawn(async move {
                    waiter.execute("CALL dtm.relay_wait($1, 10000)", &[&head]).await.is_ok()
                })
            })
            .collect();
        let all_wait = eventually(DEADLINE, || async {
            let sql = "SELECT count(*), count(backend_xmin), count(backend_xid) FROM pg_stat_activity \
                       WHERE query LIKE 'CALL dtm.relay_wait%' AND wait_event_type IS NOT NULL AND state = 'active'";
            let row = client.query_one(sql, &[]).await.expect("pg_stat_activity");
            let counts: (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
            (counts == (20, 0, 0)).then_some(())
        });
        assert!(all_wait.await.is_some(), "a waiting backend holds a snapshot");
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'CALL dtm.relay_wait%'";
        client.execute(sql, &[]).await.expect("terminate");
        for waiter in waiting {
            assert!(!waiter.await.expect("a waiter"), "it was not killed");
        }
    }
    publish(&client, 1).await;
    client.execute("CALL dtm.relay_wait($1, 10000)", &[&head]).await.expect("a place to wait");
    client.batch_execute("BEGIN").await.expect("BEGIN");
    let error = client.execute("CALL dtm.relay_wait($1, 10)", &[&head]).await.expect_err("in a transaction");
    assert_eq!(error.code().map(|code| code.code()), Some("25001"));
}

/// How long the commit of an event takes to end the wait of a session that waits for it already.
async fn wake_up(client: &Client, waiter: Client, pid: i32, head: &str) -> (Client, Duration) {
    let waiting = {
        let head = head.to_owned();
        tokio::spawn(async move {
            waiter.execute("CALL dtm.relay_wait($1, 10000)", &[&head]).await.expect("to wait");
            (waiter, Instant::now())
        })
    };
    let asleep = eventually(DEADLINE, || async {
        let sql = "SELECT FROM pg_stat_activity \
                   WHERE pid = $1 AND query LIKE 'CALL%' AND state = 'active' AND wait_event_type = 'Extension'";
        (!client.query(sql, &[&pid]).await.expect("pg_stat_activity").is_empty()).then_some(())
    });
    assert!(asleep.await.is_some(), "nobody waits");
    let committing = Instant::now();
    publish(client, 1).await;
    let (waiter, woken) = waiting.await.expect("a waiter");
    (waiter, woken - committing)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_wakes_who_waits_for_it() {
    const ROUNDS: usize = 21;
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let mut waiter = cluster.connect("shop").await;
    let pid: i32 = waiter.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get(0);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let head: String = client.query_one("SELECT dtm.relay_poll(NULL)", &[]).await.expect("head").get(0);
        let (back, time) = wake_up(&client, waiter, pid, &head).await;
        waiter = back;
        times.push(time);
    }
    // One that is not woken looks by itself 100 ms after it fell asleep. A single time says nothing, their middle does.
    times.sort_unstable();
    assert!(times[ROUNDS / 2] < Duration::from_millis(40), "they were woken after {times:?}");
}
