// SPDX-License-Identifier: PostgreSQL
//! Delivering the same events from the bottom of a deep backlog and from a shallow one, the first delivery after a start, the
//! relay's memory, and what a new subscription looks back for.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use dtm_core::position::Position;
use futures_util::future::join_all;
use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE, Shape, Way};
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::arrivals::{self, Arrival};
use crate::cluster::Cluster;
use crate::process;
use crate::relay::Relay;

/// Events that are timed.
const EVENTS: usize = 200_000;
/// All events of the deep backlog; the timed ones are its oldest.
const DEEP: usize = 5_000_000;
/// Published in one transaction.
const BATCH: usize = 100_000;
/// The relay's default bound on bytes of events.
const BUFFER_MB: f64 = 64.0;
const LARGE_EVENTS: usize = 2_000;
const LARGE_BYTES: usize = 1_000_000;
const SHALLOW: &str = "shallow";
const LARGE: &str = "large";
const DRAIN: Duration = Duration::from_secs(300);
/// Beside these, and beside sessions that write and do not publish, somebody subscribes so many times.
const PUBLISHERS: Shape = Shape { clients: 16, calls: 10, rows: 1 };
const PUBLISHING: Duration = Duration::from_secs(10);
const WRITERS: usize = 100;
const SUBSCRIPTIONS: usize = 15;
const SUBSCRIBES_EVERY: Duration = Duration::from_millis(250);

async fn fill(client: &Client, events: usize) {
    for _ in 0..events / BATCH {
        let sql = "SELECT count(dtm.publish('orders.created', to_jsonb(repeat('x', 200)), key => 'customer-' || n % 1000)) \
                   FROM generate_series(1, $1::int) n";
        client.execute(sql, &[&(BATCH as i32)]).await.expect("publish");
    }
}

async fn oldest(client: &Client) -> HashSet<Uuid> {
    let rows = client.query("SELECT id FROM dtm.events ORDER BY seq LIMIT $1", &[&(EVENTS as i64)]);
    rows.await.expect("the log").iter().map(|row| row.get(0)).collect()
}

struct Run {
    /// Events a second.
    rate: f64,
    /// Milliseconds from the start of the process.
    first_ms: f64,
    /// The relay's greatest memory, beyond its bound on bytes of events.
    beyond_mb: f64,
}

async fn deliver(cluster: &Cluster, database: &str, ids: &HashSet<Uuid>) -> Run {
    let (client, sink) = (cluster.connect(database).await, Sink::start());
    let sql = "SELECT dtm.subscribe('backlog', '>', $1, '{\"max_in_flight\": 64, \"max_lag\": \"100d\"}', 'earliest')";
    client.execute(sql, &[&sink.url()]).await.expect("subscribe");
    let started_ns = arrivals::monotonic_ns();
    let mut relay = Relay::start(&cluster.url(database));
    let mut wanted = ids.len();
    let arrived: Vec<Arrival> = loop {
        sink.wait_for(wanted, DRAIN).await;
        let all = sink.arrivals(0);
        let of_them: Vec<Arrival> = all.into_iter().filter(|arrival| ids.contains(&arrival.id)).collect();
        // Keys go side by side: a few of the next ones come among them.
        match ids.len() - of_them.len() {
            0 => break of_them,
            missing => wanted += missing,
        }
    };
    let beyond_mb = process::peak_mb(relay.pid()) - BUFFER_MB;
    assert!(relay.terminate().await.success());
    client.execute("SELECT dtm.unsubscribe('backlog')", &[]).await.expect("unsubscribe");
    let listed: Vec<Uuid> = ids.iter().copied().collect();
    arrivals::assert_each(&arrived, &listed, 1);
    let first_ms = (arrived[0].at_ns - started_ns) as f64 / 1e6;
    Run { rate: arrivals::rate(&arrived), first_ms, beyond_mb }
}

async fn large(cluster: &Cluster) -> Run {
    cluster.create_database(LARGE).await;
    let client = cluster.connect(LARGE).await;
    for _ in 0..LARGE_EVENTS / 100 {
        let sql = "SELECT count(dtm.publish('t', to_jsonb(repeat('x', $1)))) FROM generate_series(1, 100)";
        client.execute(sql, &[&(LARGE_BYTES as i32)]).await.expect("publish");
    }
    let ids = oldest(&client).await;
    deliver(cluster, LARGE, &ids).await
}

/// Sessions with a transaction open that has written a table that is not the log.
async fn writers(cluster: &Cluster) -> Vec<Client> {
    let writers = join_all((0..WRITERS).map(|_| cluster.connect(DATABASE))).await;
    for writer in &writers {
        writer.batch_execute("BEGIN; INSERT INTO outbox (topic) VALUES ('t')").await.expect("INSERT");
    }
    writers
}

/// They commit in turn, each to begin anew at once.
async fn take_turns(writers: &[Client]) -> ! {
    let sql = "COMMIT; BEGIN; INSERT INTO outbox (topic) VALUES ('t')";
    loop {
        for writer in writers {
            writer.batch_execute(sql).await.expect("a turn");
        }
    }
}

/// Where new subscriptions begin, and the number that what each has not seen lies above.
async fn subscribe_again_and_again(client: &Client) -> Vec<(Position, i64)> {
    let sql = "SELECT r.\"position\", c.low FROM dtm.subscription s, dtm.cursor_at(s.id, 0, s.epoch) c, \
               dtm.relay_resume(s.id, 0, s.epoch) r WHERE s.name = 'late'";
    let mut begins = Vec::new();
    for _ in 0..SUBSCRIPTIONS {
        tokio::time::sleep(SUBSCRIBES_EVERY).await;
        // In one transaction: before the relay moves the cursor.
        let subscribe = "BEGIN; SELECT dtm.subscribe('late', 'nothing', 'http://127.0.0.1:9/')";
        client.batch_execute(subscribe).await.expect("subscribe");
        let row = client.query_one(sql, &[]).await.expect("its cursor");
        client.batch_execute("COMMIT; SELECT dtm.unsubscribe('late')").await.expect("unsubscribe");
        begins.push((Position::parse(row.get(0)).expect("a position"), row.get(1)));
    }
    begins
}

/// How many sequence numbers a new subscription looks back for at the most, how many of them only because of those that do not
/// publish, and how many events were published meanwhile. A relay is at work, too: an open publisher is looked back for to the
/// position that was stored last before it began, and without any to the beginning of the log.
async fn look_back(cluster: &Cluster, client: &Client) -> (i64, i64, usize) {
    let sink = Sink::start();
    client.execute("SELECT dtm.subscribe('live', '>', $1)", &[&sink.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url(DATABASE));
    relay.wait_for_log("delivering").await;
    let writers = writers(cluster).await;
    let publish = load::saturate(cluster, Way::Publish, PUBLISHERS, PUBLISHING);
    let (done, begins) = tokio::select! {
        both = async { tokio::join!(publish, subscribe_again_and_again(client)) } => both,
        never = take_turns(&writers) => never,
    };
    for writer in &writers {
        writer.batch_execute("COMMIT").await.expect("COMMIT");
    }
    assert!(relay.terminate().await.success());
    client.execute("SELECT dtm.unsubscribe('live')", &[]).await.expect("unsubscribe");

    let (mut most, mut most_for_writers) = (0, 0);
    for (position, low) in begins {
        let sql = "SELECT xid::text::bigint, min(seq) FROM dtm.log WHERE seq > $1 GROUP BY xid";
        let rows = client.query(sql, &[&low]).await.expect("who published");
        let firsts: HashMap<u64, i64> =
            rows.iter().map(|row| (row.get::<_, i64>(0) as u64, row.get(1))).collect();
        assert!(firsts.values().any(|&seq| seq > position.seq), "nobody published any more");
        let of_publishers = position.floors.iter().filter(|floor| firsts.contains_key(&floor.xid));
        let for_publishers = of_publishers.map(|floor| floor.seq).fold(position.seq, i64::min);
        let open = firsts.iter().filter(|(xid, _)| !position.snapshot.sees(**xid));
        let oldest = open.map(|(_, &seq)| seq - 1).fold(position.seq, i64::min);
        let running: Vec<i64> = position.snapshot.xip.iter().map(|&xid| xid as i64).collect();
        let sql = "SELECT count(*) FROM outbox WHERE xid::text::bigint = ANY ($1)";
        let ended: i64 = client.query_one(sql, &[&running]).await.expect("writers").get(0);
        assert!(ended as usize > WRITERS / 2, "only {ended} writers had a transaction open");
        let (back, needed) = (position.seq - low, position.seq - oldest);
        eprintln!("looked back for: {back}; since the oldest open publisher: {needed}; writers: {ended}");
        (most, most_for_writers) = (most.max(back), most_for_writers.max(for_publishers - low));
    }
    (most, most_for_writers, done.rows)
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let cluster = load::cluster_of(Cluster::builder().preload().config("max_connections", "250")).await;
    cluster.create_database(SHALLOW).await;
    let (deep, shallow) = (cluster.connect(DATABASE).await, cluster.connect(SHALLOW).await);
    fill(&shallow, EVENTS).await;
    fill(&deep, DEEP).await;
    let (deep_ids, shallow_ids) = (oldest(&deep).await, oldest(&shallow).await);
    let (back, back_for_writers, published) = look_back(&cluster, &deep).await;
    let (mut rates, mut firsts, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs {
        let (mut from_deep, mut from_shallow) = (0.0, 0.0);
        for is_deep in [pair.is_multiple_of(2), !pair.is_multiple_of(2)] {
            if is_deep {
                let run = deliver(&cluster, DATABASE, &deep_ids).await;
                from_deep = run.rate;
                firsts.push(run.first_ms);
                memory.push(run.beyond_mb);
            } else {
                from_shallow = deliver(&cluster, SHALLOW, &shallow_ids).await.rate;
            }
        }
        eprintln!("deep {from_deep:.0}/s, shallow {from_shallow:.0}/s");
        rates.push((from_deep, from_shallow));
    }
    let large = large(&cluster).await;
    let value =
        |name: &str, unit, values: Vec<f64>, goal| Row::of_values(name, unit, &Sample::new(values), goal);
    let one = |name, most: i64, goal| value(name, "numbers", vec![most as f64], Some(Goal::AtMost(goal)));
    vec![
        Row::of_pairs(
            "the oldest 200,000 of 5,000,000 events ÷ of 200,000",
            "events/s",
            &rates,
            Some(Goal::AtLeast(0.95)),
        ),
        value("first delivery after the start, of 5,000,000", "ms", firsts, Some(Goal::AtMost(1_000.0))),
        value("  the relay's memory beyond its 64 MB", "MB", memory, Some(Goal::AtMost(64.0))),
        value("  the same with 2,000 events of 1 MB", "MB", vec![large.beyond_mb], Some(Goal::AtMost(64.0))),
        one("looked back for by a new subscription beside 16 publishers", back, published as f64),
        one("  because of 100 writers that do not publish", back_for_writers, 0.0),
    ]
}
