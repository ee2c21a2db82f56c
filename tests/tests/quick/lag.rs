// SPDX-License-Identifier: PostgreSQL
//! How far a subscription lags behind, who looks, and who is dropped for it: nobody that can be delivered, and nobody that
//! somebody has just taken care of.

use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(30);
/// Drops whatever has waited for an hour.
const DROPS: &str = r#"{"max_lag": "1h", "on_lag": "drop"}"#;

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    greet(&client).await;
    (cluster, client)
}

/// As a relay does it first.
async fn greet(client: &Client) {
    client.execute("SELECT dtm.relay_hello('default')", &[]).await.expect("a database to deliver from");
}

async fn subscribe(client: &Client, name: &str, options: &str, start_at: &str) {
    let sql = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/', $2::text::jsonb, $3)";
    client.execute(sql, &[&name, &options, &start_at]).await.expect("subscribe");
}

async fn publish(client: &Client, count: i32) {
    let sql = "SELECT dtm.publish('t', to_jsonb(n)) FROM generate_series(1, $1) AS n";
    client.execute(sql, &[&count]).await.expect("publish");
}

/// As if everything in the log had been published two hours ago, and everybody had been there before.
async fn age(client: &Client) {
    let sql = "UPDATE dtm.log_1 SET published_at = published_at - interval '2 hours'; \
               UPDATE dtm.subscription SET started_at = started_at - interval '3 hours'; \
               UPDATE dtm.eras SET began_at = began_at - interval '3 hours'";
    client.batch_execute(sql).await.expect("it is later");
}

/// Moves every cursor to the head of the log.
async fn deliver_everything(client: &Client) {
    let lease = "SELECT count(*) FROM dtm.relay_assign('00000000-0000-0000-0000-0000000000cc', 'test', 60)";
    client.execute(lease, &[]).await.expect("leases");
    let save = "SELECT dtm.relay_move(ARRAY[dtm.relay_poll(NULL)], array_agg(s.id), array_agg(o.shard), array_agg(s.epoch), \
                array_agg(o.token), array_agg(-1::bigint), array_agg(NULL::bigint), array_agg(0::bigint)) \
                FROM dtm.subscription s JOIN dtm.owners o ON o.subscription = s.id";
    client.execute(save, &[]).await.expect("cursors");
}

/// What a look tells of one subscription.
#[derive(Debug)]
struct Late {
    id: i64,
    terms: i64,
    lag_events: Option<i64>,
    has_cursor: bool,
    may_be_dropped: bool,
}

async fn look(client: &Client, name: &str) -> Option<Late> {
    let sql = "SELECT id, terms, lag_events, has_cursor, may_be_dropped FROM dtm.watch_lag() WHERE name = $1";
    let row = client.query_opt(sql, &[&name]).await.expect("a look")?;
    let (id, terms, lag_events) = (row.get(0), row.get(1), row.get(2));
    Some(Late { id, terms, lag_events, has_cursor: row.get(3), may_be_dropped: row.get(4) })
}

/// Drops what was looked at, unless something is otherwise now. Answers what was lost.
async fn drop_late(client: &Client, seen: &Late) -> Option<String> {
    let sql = "SELECT dtm.drop_late($1, $2, $3)";
    client.query_one(sql, &[&seen.id, &seen.terms, &seen.lag_events]).await.expect("a try").get(0)
}

async fn state(client: &Client, name: &str) -> (String, Option<String>) {
    let sql = "SELECT state, reason FROM dtm.subscriptions WHERE name = $1";
    let row = client.query_one(sql, &[&name]).await.expect("it");
    (row.get(0), row.get(1))
}

async fn wait_for_state(client: &Client, name: &str, expected: &str) {
    let found =
        process::eventually(DEADLINE, || async { (state(client, name).await.0 == expected).then_some(()) });
    assert!(found.await.is_some(), "{:?}", state(client, name).await);
}

#[tokio::test]
async fn the_lag_is_counted_from_the_first_event_that_was_not_had() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s", "{}", "now").await;
    let open = cluster.connect("shop").await;
    open.batch_execute("BEGIN; SELECT dtm.publish('t', '0')").await.expect("publish");
    publish(&client, 500).await;
    deliver_everything(&client).await;
    publish(&client, 1).await;
    let sql = "SELECT lag_events, lag_bytes, (SELECT sum(bytes)::bigint FROM dtm.log_segments()) FROM dtm.subscriptions";
    let row = client.query_one(sql, &[]).await.expect("it");
    let (events, bytes, all): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(events, 1, "whoever is still open counts for nothing");
    assert!(bytes > 0 && bytes * 100 < all, "{bytes} of {all}");
}

#[tokio::test]
async fn what_was_delivered_behind_a_publisher_that_is_open_is_not_read_at_each_look() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s", "{}", "now").await;
    for end in ["ROLLBACK", "COMMIT"] {
        let open = cluster.connect("shop").await;
        open.batch_execute("BEGIN; SELECT dtm.publish('t', '0')").await.expect("publish");
        publish(&client, 1_000).await;
        deliver_everything(&client).await;
        for moment in ["while it is open", end] {
            if moment == end {
                open.batch_execute(end).await.expect(end);
            }
            client.batch_execute("BEGIN").await.expect("BEGIN");
            assert!(look(&client, "s").await.is_none(), "it is not late");
            // Counted in this transaction alone.
            let sql = "SELECT sum(pg_stat_get_xact_tuples_returned(format('dtm.log_%s_pkey', n)::regclass) \
                           + pg_stat_get_xact_tuples_returned(format('dtm.log_%s', n)::regclass))::bigint \
                       FROM generate_series(1, 3) AS n";
            let read: i64 = client.query_one(sql, &[]).await.expect("rows read").get(0);
            client.batch_execute("COMMIT").await.expect("COMMIT");
            assert!(read < 100, "{moment}: {read} rows were read");
        }
    }
}

#[tokio::test]
async fn one_looks_at_a_time() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s", r#"{"max_lag": "1h"}"#, "now").await;
    publish(&client, 1).await;
    age(&client).await;
    let other = cluster.connect("shop").await;
    other.batch_execute("BEGIN").await.expect("BEGIN");
    assert!(look(&other, "s").await.is_some());
    let rows = client.query("SELECT id FROM dtm.watch_lag()", &[]).await.expect("an answer at once");
    let ids: Vec<Option<i64>> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(ids, [None], "another one is looking");
    other.batch_execute("COMMIT").await.expect("COMMIT");
    assert!(look(&client, "s").await.is_some());
}

#[tokio::test]
async fn age_that_events_had_before_subscription_rewind_or_restore_drops_nobody() {
    let (cluster, client) = shop().await;
    publish(&client, 3).await;
    age(&client).await;
    subscribe(&client, "s", DROPS, "earliest").await;
    let may_be_dropped = || async { look(&client, "s").await.expect("it is late").may_be_dropped };
    assert!(!may_be_dropped().await, "it was made just now");
    age(&client).await;
    assert!(may_be_dropped().await);
    client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    assert!(!may_be_dropped().await, "it was rewound just now");
    age(&client).await;
    assert!(may_be_dropped().await);

    let dump = process::run(Command::new(bin_dir().join("pg_dump")).args(["-d", &cluster.url("shop")]));
    cluster.connect("postgres").await.batch_execute("CREATE DATABASE copy").await.expect("a database");
    cluster.psql("copy", &dump);
    let copy = cluster.connect("copy").await;
    greet(&copy).await;
    let late = look(&copy, "s").await.expect("it is late");
    assert!(!late.may_be_dropped, "it was restored just now: {late:?}");
    let later = "UPDATE dtm.eras SET began_at = began_at - interval '2 hours'";
    copy.execute(later, &[]).await.expect("it is later");
    assert!(look(&copy, "s").await.expect("it is late").may_be_dropped);
}

#[tokio::test]
async fn a_look_drops_nobody_that_was_taken_care_of_since() {
    let (cluster, client) = shop().await;
    publish(&client, 3).await;
    for care in [
        "SELECT dtm.rewind('s', 'now')",
        "SELECT dtm.rewind('s', 'earliest')",
        "SELECT dtm.pause('s')",
        "SELECT dtm.subscribe('s', 't', 'http://127.0.0.1:9/', '{\"max_lag\": \"30min\", \"on_lag\": \"drop\"}')",
        "SELECT dtm.unsubscribe('s')",
    ] {
        subscribe(&client, "s", DROPS, "earliest").await;
        age(&client).await;
        let seen = look(&client, "s").await.expect("it is late");
        client.execute(care, &[]).await.expect(care);
        age(&client).await;
        assert_eq!(drop_late(&client, &seen).await, None, "{care}");
        client.execute("SELECT dtm.unsubscribe(name) FROM dtm.subscription", &[]).await.expect("unsubscribe");
    }
    subscribe(&client, "s", DROPS, "earliest").await;
    age(&client).await;
    let mut seen = look(&client, "s").await.expect("it is late");
    seen.lag_events = seen.lag_events.map(|events| events + 1);
    assert_eq!(drop_late(&client, &seen).await, None, "it has caught up since");
    let seen = look(&client, "s").await.expect("it is late");
    let other = cluster.connect("shop").await;
    other.batch_execute("BEGIN; SELECT dtm.rewind('s', 'now')").await.expect("rewind");
    assert_eq!(drop_late(&client, &seen).await, None, "nobody waits for whoever is about to take care of it");
    other.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    deliver_everything(&client).await;
    assert_eq!(drop_late(&client, &seen).await, None, "it has had everything since");
    publish(&client, 3).await;
    assert_eq!(drop_late(&client, &seen).await, None, "what it has not had is new");
    age(&client).await;
    let lost = drop_late(&client, &seen).await.expect("nobody cares");
    assert_eq!(lost, "events 4 to 6");
}

#[tokio::test]
async fn pause_and_resume_that_meet_a_drop_half_way_bring_nothing_back() {
    let (cluster, client) = shop().await;
    let dropping = cluster.connect("shop").await;
    publish(&client, 1).await;
    for (name, change) in [("a", "SELECT dtm.pause('a')"), ("b", "SELECT dtm.resume('b')")] {
        subscribe(&client, name, DROPS, "earliest").await;
        age(&client).await;
        let seen = look(&client, name).await.expect("it is late");
        dropping.batch_execute("BEGIN").await.expect("BEGIN");
        drop_late(&dropping, &seen).await.expect("it is dropped");
        let changing = cluster.connect("shop").await;
        let changing = tokio::spawn(async move { changing.execute(change, &[]).await });
        let waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query = $1";
        let waits = process::eventually(DEADLINE, || async {
            client.query_opt(waiting, &[&change]).await.expect("pg_stat_activity").map(drop)
        });
        waits.await.expect("it waits for the drop");
        dropping.batch_execute("COMMIT").await.expect("COMMIT");
        let error = changing.await.expect("the task").expect_err("it is dropped");
        assert_eq!(error.as_db_error().expect("a database's error").code().code(), "55000", "{change}");
        assert_eq!(state(&client, name).await.0, "dropped", "{change}");
    }
}

#[tokio::test]
async fn a_rewind_gives_a_dropped_subscription_the_state_back_that_it_had() {
    let (_cluster, client) = shop().await;
    publish(&client, 1).await;
    for (was, why) in [
        ("active", None),
        ("paused", None),
        ("paused", Some("the database was restored or copied")),
        ("disabled", Some("the endpoint is gone (410)")),
    ] {
        subscribe(&client, "s", DROPS, "earliest").await;
        client
            .execute("UPDATE dtm.subscription SET state = $1, reason = $2", &[&was, &why])
            .await
            .expect(was);
        age(&client).await;
        let seen = look(&client, "s").await.expect("it is late");
        drop_late(&client, &seen).await.expect("it is dropped");
        let (now, reason) = state(&client, "s").await;
        assert!(now == "dropped" && reason.is_some_and(|reason| reason.contains("has lost events 1 to 1")));
        client.execute("SELECT dtm.rewind('s', 'now')", &[]).await.expect("rewind");
        assert_eq!(state(&client, "s").await, (was.to_owned(), why.map(str::to_owned)));
        client.execute("SELECT dtm.unsubscribe('s')", &[]).await.expect("unsubscribe");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_subscription_without_a_cursor_is_told_of() {
    let (cluster, client) = shop().await;
    subscribe(&client, "s", DROPS, "now").await;
    client.execute("SELECT dtm.pause('s')", &[]).await.expect("pause");
    assert!(look(&client, "s").await.is_none(), "nothing is wrong");
    client.execute("DELETE FROM dtm.cursor_log_1", &[]).await.expect("delete");
    let found = look(&client, "s").await.expect("it is told of");
    assert!(!found.has_cursor && !found.may_be_dropped, "{found:?}");
    let relay = Relay::start(&cluster.url("shop"));
    relay.wait_for_log("it has no cursor, and all of the log is kept for it").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_outage_of_the_relay_who_can_be_delivered_is_and_who_cannot_is_dropped() {
    let (cluster, client) = shop().await;
    let (there, away) = (Receiver::start().await, Receiver::start().await);
    away.behave(|_| Reply::Hang);
    for (name, url) in [("there", there.url()), ("away", away.url())] {
        let sql = "SELECT dtm.subscribe($1, 't', $2, '{\"max_lag\": \"1h\", \"max_lag_bytes\": 1, \"on_lag\": \"drop\"}')";
        client.execute(sql, &[&name, &url]).await.expect("subscribe");
    }
    publish(&client, 300).await;
    age(&client).await;
    let url = cluster.url("shop");
    let configured = |patience: &str| {
        format!("upkeep_every = \"10ms\"\nlag_patience = \"{patience}\"\n[database.it]\nurl = \"{url}\"\n")
    };
    let mut relay = Relay::start_configured(&configured("1d"));
    there.wait_until("all", DEADLINE, |received| received.len() == 300).await;
    relay.wait_for_log("it lags far behind, and the log is kept for it").await;
    assert_eq!(state(&client, "away").await.0, "active", "there is patience left");
    let has_all = process::eventually(DEADLINE, || async {
        let sql = "SELECT lag_events = 0 FROM dtm.subscriptions WHERE name = 'there'";
        client.query_one(sql, &[]).await.expect("it").get::<_, bool>(0).then_some(())
    });
    has_all.await.expect("what was delivered is stored as such");
    relay.kill9();
    relay.configure(&configured("500ms"));
    relay.restart();
    wait_for_state(&client, "away", "dropped").await;
    assert_eq!(state(&client, "there").await.0, "active");
}
