// SPDX-License-Identifier: PostgreSQL
//! Relays share subscriptions and their shards evenly, whoever comes, goes or dies, and no unit has two owners.

use std::collections::{BTreeMap, BTreeSet};

use dtm_tests::cluster::Cluster;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::reading::window;

const MINUTE: f64 = 60.0;

/// A subscription's name and a shard.
type Unit = (String, i32);

/// What a relay was told of a unit.
#[derive(Clone, Debug, PartialEq)]
struct Owned {
    subscription: i64,
    shards: i32,
    epoch: i64,
    revision: i64,
    token: i64,
    release: bool,
}

async fn shop(subscriptions: &[(&str, i32)]) -> (Cluster, Client) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    for (name, shards) in subscriptions {
        subscribe(&client, name, *shards).await;
    }
    (cluster, client)
}

async fn subscribe(client: &Client, name: &str, shards: i32) {
    let options = if shards == 1 { json!({}) } else { json!({ "shards": shards }) };
    let sql = "SELECT dtm.subscribe($1, '>', 'http://127.0.0.1:9/', $2)";
    client.execute(sql, &[&name, &options]).await.expect("subscribe");
}

fn relay(n: u8) -> Uuid {
    Uuid::from_bytes([n; 16])
}

/// A relay's second: what it owns by now.
async fn assign(client: &Client, n: u8, lease_seconds: f64) -> BTreeMap<Unit, Owned> {
    let sql = "SELECT name, shard, subscription, shards, epoch, revision, token, release FROM dtm.relay_assign($1, $2, $3)";
    let name = format!("relay-{n}");
    let rows = client.query(sql, &[&relay(n), &name, &lease_seconds]).await.expect("units");
    let owned = rows.iter().map(|row| {
        let owned = Owned {
            subscription: row.get(2),
            shards: row.get(3),
            epoch: row.get(4),
            revision: row.get(5),
            token: row.get(6),
            release: row.get(7),
        };
        ((row.get(0), row.get(1)), owned)
    });
    owned.collect()
}

async fn give(client: &Client, n: u8, units: &[(Unit, Owned)]) {
    let subscriptions: Vec<i64> = units.iter().map(|(_, owned)| owned.subscription).collect();
    let shards: Vec<i32> = units.iter().map(|((_, shard), _)| *shard).collect();
    let tokens: Vec<i64> = units.iter().map(|(_, owned)| owned.token).collect();
    let sql = "SELECT dtm.relay_give($1, $2, $3, $4)";
    client.execute(sql, &[&relay(n), &subscriptions, &shards, &tokens]).await.expect("give");
}

/// Seconds pass: each relay asks in turn and gives back at once what it is told to. Answers what each owns in the end, and how
/// often a unit changed hands.
async fn settle(client: &Client, relays: &[u8]) -> (BTreeMap<u8, BTreeSet<Unit>>, i64) {
    let given = "SELECT count(*) FROM dtm.lease_log WHERE relay = '00000000-0000-0000-0000-000000000000'";
    let before: i64 = client.query_one(given, &[]).await.expect("leases").get(0);
    let mut owners = BTreeMap::new();
    for _ in 0..4 {
        for &n in relays {
            let owned = assign(client, n, MINUTE).await;
            let (released, kept): (Vec<_>, Vec<_>) = owned.into_iter().partition(|(_, owned)| owned.release);
            give(client, n, &released).await;
            owners.insert(n, kept.into_iter().map(|(unit, _)| unit).collect::<BTreeSet<_>>());
        }
    }
    let all: Vec<&Unit> = owners.values().flatten().collect();
    assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len(), "a unit has two owners: {owners:?}");
    let after: i64 = client.query_one(given, &[]).await.expect("leases").get(0);
    (owners, after - before)
}

fn counts(owners: &BTreeMap<u8, BTreeSet<Unit>>) -> Vec<usize> {
    let mut counts: Vec<usize> = owners.values().map(BTreeSet::len).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts
}

async fn release(client: &Client, n: u8) {
    client.execute("SELECT dtm.relay_release($1)", &[&relay(n)]).await.expect("release");
}

#[tokio::test]
async fn relays_come_and_go_and_share_evenly_and_no_more_moves_than_must() {
    let (_cluster, client) = shop(&[("a", 1), ("b", 4), ("c", 1), ("d", 3), ("e", 1)]).await;
    let all = assign(&client, 1, MINUTE).await;
    assert_eq!(all.len(), 10, "a relay by itself has everything at once");
    assert!(all.values().all(|owned| !owned.release));
    assert_eq!(all[&("b".to_owned(), 3)].shards, 4);
    for (relays, expected, moves) in [
        (&[1, 2][..], vec![5, 5], 5),
        (&[1, 2, 3], vec![4, 3, 3], 3),
        (&[1, 2, 3, 4], vec![3, 3, 2, 2], 2),
        (&[4, 3, 2, 1], vec![3, 3, 2, 2], 0),
    ] {
        let (owners, moved) = settle(&client, relays).await;
        assert_eq!((counts(&owners), moved), (expected, moves), "{relays:?}");
    }
    // One goes: its units are shared, the others keep theirs.
    let (before, _) = settle(&client, &[1, 2, 3, 4]).await;
    release(&client, 2).await;
    let (after, moved) = settle(&client, &[1, 3, 4]).await;
    assert_eq!((counts(&after), moved), (vec![4, 3, 3], 0));
    assert!(after.iter().all(|(n, owned)| owned.is_superset(&before[n])), "{before:?} {after:?}");
    release(&client, 1).await;
    release(&client, 3).await;
    let (last, moved) = settle(&client, &[4]).await;
    assert_eq!((counts(&last), moved), (vec![10], 0));
}

#[tokio::test]
async fn fewer_units_than_relays_leave_some_idle_and_nothing_moves() {
    let (_cluster, client) = shop(&[("a", 1)]).await;
    for _ in 0..2 {
        let (owners, moved) = settle(&client, &[3, 1, 2]).await;
        assert_eq!((counts(&owners), moved), (vec![1, 0, 0], 0));
        assert_eq!(owners[&3].len(), 1, "who had it first keeps it");
    }
}

#[tokio::test]
async fn what_a_dead_relay_had_is_taken_when_its_lease_ends() {
    let (_cluster, client) = shop(&[("a", 4)]).await;
    let dead = assign(&client, 1, 1.5).await;
    assert_eq!(dead.len(), 4);
    assert!(assign(&client, 2, MINUTE).await.is_empty(), "it lives for all that is known");
    tokio::time::sleep(std::time::Duration::from_millis(1_600)).await;
    let taken = assign(&client, 2, MINUTE).await;
    assert_eq!(taken.len(), 4);
    assert!(taken.iter().all(|(unit, owned)| owned.token > dead[unit].token));
    // It was only asleep: it is told that it has nothing, and what it gives back is not its own.
    give(&client, 1, &dead.into_iter().collect::<Vec<_>>()).await;
    assert!(assign(&client, 1, MINUTE).await.is_empty());
    let owned = assign(&client, 2, MINUTE).await;
    assert_eq!(owned.len(), 4);
    assert_eq!(owned.values().filter(|owned| owned.release).count(), 2);
    let newest: BTreeSet<i64> = taken.values().map(|owned| owned.token).skip(2).collect();
    assert!(
        owned.values().all(|owned| owned.release == newest.contains(&owned.token)),
        "the newest are given"
    );
}

#[tokio::test]
async fn what_an_earlier_session_of_a_relay_has_sent_and_comes_late_moves_nothing() {
    let (_cluster, client) = shop(&[("s", 2), ("t", 1)]).await;
    let before = assign(&client, 1, MINUTE).await;
    client.execute("SELECT dtm.relay_begin($1)", &[&relay(1)]).await.expect("a new session");
    let after = assign(&client, 1, MINUTE).await;
    assert_eq!((before.len(), after.keys().collect::<Vec<_>>()), (3, before.keys().collect()));
    let sql = "SELECT fenced FROM dtm.relay_store(ARRAY[dtm.relay_poll(NULL)], ARRAY[$1::bigint], ARRAY[$2::int], \
               ARRAY[$3::bigint], ARRAY[$4::bigint], '{-1}', '{NULL}', '{0}', '{NULL}', '{}', '{}', '{}', '{}', '{}', '{}')";
    for (owned, fenced) in [(&before, vec![1]), (&after, vec![])] {
        for ((_, shard), owned) in owned {
            let parameters: [&(dyn ToSql + Sync); 4] =
                [&owned.subscription, shard, &owned.epoch, &owned.token];
            let row = client.query_one(sql, &parameters).await.expect("a report");
            assert_eq!(row.get::<_, Vec<i32>>(0), fenced);
        }
    }
    client.execute("SELECT dtm.relay_begin($1)", &[&relay(2)]).await.expect("a session that owns nothing");
    assert_eq!(assign(&client, 1, MINUTE).await, after);
}

#[tokio::test]
async fn many_at_once_never_own_the_same() {
    let (cluster, client) = shop(&[("a", 7), ("b", 1), ("c", 1), ("d", 1)]).await;
    let mut tasks = Vec::new();
    for n in 1..=4 {
        let client = cluster.connect("shop").await;
        tasks.push(tokio::spawn(async move {
            for _ in 0..30 {
                let owned = assign(&client, n, MINUTE).await;
                let released: Vec<_> = owned.into_iter().filter(|(_, owned)| owned.release).collect();
                give(&client, n, &released).await;
            }
        }));
    }
    for task in tasks {
        task.await.expect("a relay");
    }
    let (owners, moved) = settle(&client, &[1, 2, 3, 4]).await;
    assert_eq!((counts(&owners), moved), (vec![3, 3, 2, 2], 0));
}

#[tokio::test]
async fn nothing_is_locked_or_written_when_nothing_is_free() {
    let (cluster, client) = shop(&[("a", 1), ("b", 1)]).await;
    assign(&client, 1, MINUTE).await;
    let other = cluster.connect("shop").await;
    other
        .batch_execute("BEGIN; LOCK TABLE dtm.lease_log_1 IN ROW SHARE MODE")
        .await
        .expect("a cursor on its way");
    client.batch_execute("SET lock_timeout = '200ms'").await.expect("a timeout");
    assert_eq!(assign(&client, 1, MINUTE).await.len(), 2);
    client
        .execute("SELECT dtm.relay_give($1, '{}', '{}', '{}')", &[&relay(1)])
        .await
        .expect("nothing to give");
    let leases = "SELECT count(*) FROM dtm.lease_log";
    assert_eq!(client.query_one(leases, &[]).await.expect("leases").get::<_, i64>(0), 2);
}

#[tokio::test]
async fn a_relay_of_the_version_before_has_what_has_no_shards_and_shares_nothing() {
    let (_cluster, client) = shop(&[("a", 1), ("b", 2), ("c", 1), ("d", 1)]).await;
    client.execute("SELECT dtm.pause('d')", &[]).await.expect("pause");
    let lease = "SELECT name FROM dtm.relay_lease($1, 'old', 60) ORDER BY name";
    let names =
        |rows: Vec<tokio_postgres::Row>| rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>();
    assert_eq!(names(client.query(lease, &[&relay(9)]).await.expect("leases")), ["a", "c"]);
    // It gives nothing back, and nothing waits for it.
    let owned = assign(&client, 1, MINUTE).await;
    assert_eq!(owned.keys().cloned().collect::<Vec<_>>(), [("b".to_owned(), 0), ("b".to_owned(), 1)]);
    client.execute("SELECT dtm.resume('d')", &[]).await.expect("resume");
    let (owners, _) = settle(&client, &[1, 2]).await;
    assert_eq!(counts(&owners), [2, 1]);
    assert_eq!(names(client.query(lease, &[&relay(9)]).await.expect("leases")), ["a", "c"]);
    release(&client, 9).await;
    let (owners, _) = settle(&client, &[1, 2]).await;
    assert_eq!(counts(&owners), [3, 2]);
    let row = client.query_one("SELECT least, greatest FROM dtm.protocol()", &[]).await.expect("protocols");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1)), (1, 2));
}

#[tokio::test]
async fn a_long_history_of_heartbeats_costs_nothing() {
    let (_cluster, client) = shop(&[("a", 1)]).await;
    let sql = "INSERT INTO dtm.heartbeat_log_1 SELECT nextval('dtm.heartbeat_id_seq'), $1, 'old', now() - interval '1 day', true \
               FROM generate_series(1, 50000); ANALYZE dtm.heartbeat_log_1";
    client.batch_execute(&sql.replace("$1", &format!("'{}'", relay(7)))).await.expect("heartbeats");
    assign(&client, 1, MINUTE).await;
    let plan = client.query("EXPLAIN SELECT * FROM dtm.live_relays", &[]).await.expect("a plan");
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().any(|line| line.contains("heartbeat_log_1_expires")), "{plan:#?}");
    assert!(!plan.iter().any(|line| line.contains("Seq Scan on heartbeat_log_1")), "{plan:#?}");
}

/// What all shards of a subscription would be sent, from their cursors to the head.
async fn pending(client: &Client, name: &str) -> Vec<Vec<String>> {
    let sql = "SELECT c.\"position\", c.target, c.acked, c.ahead, dtm.relay_poll(NULL) \
               FROM dtm.owners o JOIN dtm.subscription s ON s.id = o.subscription, dtm.relay_resume(s.id, o.shard, s.epoch) c \
               WHERE s.name = $1 ORDER BY o.shard";
    let mut all = Vec::new();
    for row in client.query(sql, &[&name]).await.expect("cursors") {
        assert!(row.get::<_, Option<String>>(1).is_none() && row.get::<_, Option<Vec<i64>>>(3).is_none());
        let (from, to): (String, String) = (row.get(0), row.get(4));
        all.push(window(client, &from, &to, row.get(2), &[">".to_owned()]).await);
    }
    all
}

/// Moves a shard's cursor to the head, as its relay would.
async fn deliver(client: &Client, shard: i32, owned: &Owned) {
    let sql = "SELECT fenced FROM dtm.relay_store(ARRAY[dtm.relay_poll(NULL)], ARRAY[$1::bigint], ARRAY[$2::int], \
               ARRAY[$3::bigint], ARRAY[$4::bigint], '{-1}', '{NULL}', '{0}', '{NULL}', '{}', '{}', '{}', '{}', '{}', '{}')";
    let arguments: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
        &[&owned.subscription, &shard, &owned.epoch, &owned.token];
    let fenced: Vec<i32> = client.query_one(sql, arguments).await.expect("a report").get(0);
    assert!(fenced.is_empty());
}

async fn publish(client: &Client, n: i32) {
    client.execute("SELECT dtm.publish('t', to_jsonb($1::int), 'k')", &[&n]).await.expect("publish");
}

#[tokio::test]
async fn other_shards_begin_where_the_slowest_stood() {
    let (_cluster, client) = shop(&[("s", 1)]).await;
    publish(&client, 1).await;
    let owned = assign(&client, 1, MINUTE).await;
    deliver(&client, 0, &owned[&("s".to_owned(), 0)]).await;
    publish(&client, 2).await;
    subscribe(&client, "s", 3).await;
    assert_eq!(
        pending(&client, "s").await,
        [["2"], ["2"], ["2"]],
        "what was delivered is not delivered again"
    );
    let owned = assign(&client, 1, MINUTE).await;
    assert!(
        owned.values().all(|owned| (owned.epoch, owned.revision, owned.shards) == (2, 1, 3)),
        "{owned:?}"
    );
    // Each goes on by itself.
    deliver(&client, 1, &owned[&("s".to_owned(), 1)]).await;
    publish(&client, 3).await;
    deliver(&client, 2, &owned[&("s".to_owned(), 2)]).await;
    assert_eq!(pending(&client, "s").await, [vec!["2", "3"], vec!["3"], vec![]]);
    let row =
        client.query_one("SELECT lag_events, shards, owner FROM dtm.subscriptions", &[]).await.expect("it");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1), row.get::<_, &str>(2)), (2, 3, "relay-1"));
    let stale = owned[&("s".to_owned(), 2)].clone();
    subscribe(&client, "s", 3).await;
    assert_eq!(assign(&client, 1, MINUTE).await, owned, "the same number of shards changes nothing");
    subscribe(&client, "s", 2).await;
    assert_eq!(pending(&client, "s").await, [["2", "3"], ["2", "3"]]);
    let owned = assign(&client, 1, MINUTE).await;
    assert_eq!(
        owned.keys().map(|(_, shard)| *shard).collect::<Vec<_>>(),
        [0, 1],
        "leases of shards that are gone are nothing"
    );
    let sql = "SELECT fenced FROM dtm.relay_move('{}', ARRAY[$1::bigint], '{2}', ARRAY[$2::bigint], ARRAY[$3::bigint], '{1}', '{NULL}', '{0}')";
    let row =
        client.query_one(sql, &[&stale.subscription, &stale.epoch, &stale.token]).await.expect("a move");
    assert_eq!(row.get::<_, Vec<i64>>(0), [stale.subscription]);
    client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    assert_eq!(pending(&client, "s").await, [["1", "2", "3"], ["1", "2", "3"]]);
}

#[tokio::test]
async fn a_window_goes_on_when_all_stood_in_it() {
    let (_cluster, client) = shop(&[("s", 1)]).await;
    let owned = assign(&client, 1, MINUTE).await[&("s".to_owned(), 0)].clone();
    let sql = "SELECT position_ids FROM dtm.relay_store(ARRAY['1|9|9|9:9:|', '1|99|99|9:19:|'], ARRAY[$1::bigint], '{0}', '{1}', \
               ARRAY[$2::bigint], '{-1}', '{-2}', '{40}', '{\"{42,44}\"}', '{}', '{}', '{}', '{}', '{}', '{}')";
    let ids: Vec<i64> =
        client.query_one(sql, &[&owned.subscription, &owned.token]).await.expect("a report").get(0);
    subscribe(&client, "s", 2).await;
    let sql =
        "SELECT shard, \"position\", target, acked, ahead FROM dtm.cursor_log WHERE epoch = 2 ORDER BY shard";
    let rows = client.query(sql, &[]).await.expect("cursors");
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!((row.get::<_, i64>(1), row.get::<_, i64>(2)), (ids[0], ids[1]));
        assert_eq!((row.get::<_, i64>(3), row.get::<_, Vec<i64>>(4)), (40, vec![42, 44]));
    }
    client.execute("DELETE FROM dtm.cursor_log_1 WHERE shard = 1", &[]).await.expect("a cursor is lost");
    let options: Value = json!({"shards": 4});
    let sql = "SELECT dtm.subscribe('s', '>', 'http://127.0.0.1:9/', $1)";
    let error = client.execute(sql, &[&options]).await.expect_err("where it stood is not known");
    assert_eq!(error.code().map(|code| code.code()), Some("XX001"));
}
