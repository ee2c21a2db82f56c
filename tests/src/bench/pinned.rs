// SPDX-License-Identifier: PostgreSQL
//! A transaction that holds back vacuum: what it costs publishing and delivery, and what it leaves behind.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE, Shape, Way};
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::cluster::Cluster;
use crate::relay::Relay;

const SHAPE: Shape = Shape { clients: 8, calls: 1, rows: 1 };
const RUN: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(120);
const EVENTS: usize = 100_000;
/// Cursors that a relay moves in one statement, and how many of those statements make 100,000 moves.
const CURSORS: usize = 10;
const MOVES: usize = 10_000;
/// Heartbeats of five minutes.
const HEARTBEATS: usize = 300;
const RELAY: &str = "'00000000-0000-0000-0000-0000000000bb'::uuid";

/// A snapshot that stays open in a session of its own, with a transaction id.
struct Pin {
    client: Client,
}

impl Pin {
    async fn hold(cluster: &Cluster) -> Pin {
        let client = cluster.connect(DATABASE).await;
        let sql = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id(), count(*) FROM dtm.subscriptions";
        client.batch_execute(sql).await.expect("a snapshot");
        Pin { client }
    }

    async fn release(self) {
        self.client.batch_execute("COMMIT").await.expect("COMMIT");
    }
}

/// Publishes for a while with the relay at work. Answers events a second published, and delivered until the last.
async fn publish_and_deliver(cluster: &Cluster, sink: &Sink, books: &mut Books) -> (f64, f64) {
    let arrived = sink.count();
    let begun = Instant::now();
    let done = load::saturate(cluster, Way::Publish, SHAPE, RUN).await;
    sink.wait_for(arrived + done.rows, DRAIN).await;
    let seconds = begun.elapsed().as_secs_f64();
    let mut ids: Vec<Uuid> = sink.arrivals(arrived).iter().map(|arrival| arrival.id).collect();
    ids.sort_unstable();
    let mut published = done.ids.clone();
    published.sort_unstable();
    assert_eq!(ids, published, "what arrived is not what was published, each once");
    books.published = load::verify_published(&books.client, &done.ids, books.published).await;
    (done.rate, done.rows as f64 / seconds)
}

struct Books {
    client: Client,
    published: i64,
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let cluster = load::cluster(true).await;
    let client = cluster.connect(DATABASE).await;
    let sink = Sink::start();
    client.execute("SELECT dtm.subscribe('bench', '>', $1)", &[&sink.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url(DATABASE));
    relay.wait_for_log("delivering").await;
    let mut books = Books { client, published: 0 };
    let (mut published, mut delivered) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        let (mut pinned, mut free) = ((0.0, 0.0), (0.0, 0.0));
        for with_pin in [pair.is_multiple_of(2), !pair.is_multiple_of(2)] {
            if with_pin {
                let pin = Pin::hold(&cluster).await;
                pinned = publish_and_deliver(&cluster, &sink, &mut books).await;
                pin.release().await;
            } else {
                free = publish_and_deliver(&cluster, &sink, &mut books).await;
            }
        }
        eprintln!(
            "published {:.0}/s pinned, {:.0}/s free; delivered {:.0}/s, {:.0}/s",
            pinned.0, free.0, pinned.1, free.1
        );
        published.push((pinned.0, free.0));
        delivered.push((pinned.1, free.1));
    }
    assert!(relay.terminate().await.success());
    let mut rows = vec![
        Row::of_pairs("publish, pinned / free", "events/s", &published, Some(Goal::AtLeast(0.95))),
        Row::of_pairs("delivery, pinned / free", "events/s", &delivered, Some(Goal::AtLeast(0.95))),
    ];
    rows.extend(bloat(&cluster, &books.client, pairs).await);
    rows
}

/// What the log, its cursors and its leases leave behind under a pin.
async fn bloat(cluster: &Cluster, client: &Client, samples: usize) -> Vec<Row> {
    let pin = Pin::hold(cluster).await;
    let many = Shape { clients: 1, calls: 1, rows: 100 };
    let mut events = 0;
    while events < EVENTS {
        events += load::saturate(cluster, Way::Publish, many, Duration::from_millis(500)).await.rows;
    }
    for n in 0..CURSORS {
        let sql = "SELECT dtm.subscribe($1, 'none', 'http://127.0.0.1:9/')";
        client.execute(sql, &[&format!("moves-{n}")]).await.expect("subscribe");
    }
    let statement_seconds = move_cursors(cluster).await;
    let beat = format!("SELECT count(*) FROM dtm.relay_lease({RELAY}, 'bench', 3)");
    for _ in 0..HEARTBEATS {
        client.execute(&beat, &[]).await.expect("a heartbeat");
    }
    // The server's own count, not an estimate.
    client.batch_execute("CREATE EXTENSION pgstattuple").await.expect("pgstattuple");
    let sql = "SELECT coalesce(sum((pgstattuple(oid::regclass)).dead_tuple_count), 0)::float8 FROM pg_class \
               WHERE relnamespace = 'dtm'::regnamespace AND relkind = 'r'";
    let dead: f64 = client.query_one(sql, &[]).await.expect("dead tuples").get(0);
    pin.release().await;

    // Compared piece by piece, so that one hiccup of the disk does not decide.
    let tenth = statement_seconds.len() / 10;
    let piece = tenth / samples.max(1);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64 * 1e3 / CURSORS as f64;
    let last = statement_seconds.len() - tenth;
    let pairs: Vec<(f64, f64)> = (0..samples)
        .map(|n| {
            let at = n * piece;
            let first = &statement_seconds[at..at + piece];
            (mean(&statement_seconds[last + at..last + at + piece]), mean(first))
        })
        .collect();
    let name = format!(
        "dead tuples after {EVENTS} events, {} cursor moves, {HEARTBEATS} heartbeats",
        MOVES * CURSORS
    );
    vec![
        Row::of_values(name, "tuples", &Sample::new(vec![dead]), Some(Goal::AtMost(100.0))),
        Row::of_pairs("a cursor move, last tenth / first tenth", "ms", &pairs, Some(Goal::AtMost(1.2))),
    ]
}

/// Moves all cursors to new positions again and again, as a relay does. Answers the seconds that each statement took.
async fn move_cursors(cluster: &Cluster) -> Vec<f64> {
    let client = cluster.connect(DATABASE).await;
    client.batch_execute("SET synchronous_commit = local").await.expect("SET");
    let sql = format!(
        "SELECT subscription, epoch, token FROM dtm.relay_lease({RELAY}, 'bench', 3600) WHERE name LIKE 'moves-%'"
    );
    let leased = client.query(&sql, &[]).await.expect("leases");
    assert_eq!(leased.len(), CURSORS);
    let column = |at: usize| leased.iter().map(|row| row.get(at)).collect::<Vec<i64>>();
    let (subscriptions, epochs, tokens) = (column(0), column(1), column(2));
    let (shards, positions) = (vec![0i32; CURSORS], vec![-1i64; CURSORS]);
    let (targets, acked) = (vec![None::<i64>; CURSORS], vec![0i64; CURSORS]);
    let head = client.query_one("SELECT dtm.relay_poll(NULL)", &[]).await.expect("the head");
    let head: Vec<String> = vec![head.get(0)];
    let sql = "SELECT fenced FROM dtm.relay_move($1, $2, $3, $4, $5, $6, $7, $8)";
    let statement = client.prepare(sql).await.expect("prepare");
    let mut seconds = Vec::with_capacity(MOVES);
    for _ in 0..MOVES {
        let begun = Instant::now();
        let row = client
            .query_one(
                &statement,
                &[&head, &subscriptions, &shards, &epochs, &tokens, &positions, &targets, &acked],
            )
            .await
            .expect("a move");
        seconds.push(begun.elapsed().as_secs_f64());
        assert!(row.get::<_, Vec<i64>>(0).is_empty(), "a cursor was refused");
    }
    seconds
}
