// SPDX-License-Identifier: PostgreSQL
//! Clients that publish, or insert the same rows into a plain outbox table, as fast as they can or at a fixed rate.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use crate::cluster::{Builder, Cluster};

/// The database that benchmarks use.
pub const DATABASE: &str = "bench";
const TOPIC: &str = "orders.created";

/// Which way a row goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `dtm.publish`, `dtm.publish_many`.
    Publish,
    /// A prepared INSERT.
    Insert,
}

/// The form of the load.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Connections.
    pub clients: usize,
    /// Calls in a transaction.
    pub calls: usize,
    /// Rows of a call.
    pub rows: usize,
}

/// A cluster that waits for the disk at every commit, with room enough that no checkpoint gets between; in it a database with
/// the extension, and the table that a team without it would have.
pub async fn cluster(preload: bool) -> Cluster {
    let builder = Cluster::builder();
    cluster_of(if preload { builder.preload() } else { builder }).await
}

/// The same, with lines of configuration of its own.
pub async fn cluster_of(builder: Builder) -> Cluster {
    let builder = builder
        .config("synchronous_commit", "on")
        .config("shared_buffers", "1GB")
        .config("max_wal_size", "8GB")
        .config("checkpoint_timeout", "30min");
    let cluster = builder.start().await;
    cluster.create_database(DATABASE).await;
    let outbox = "CREATE TABLE outbox (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        topic text NOT NULL, key text, payload jsonb, headers jsonb,
        created_at timestamptz NOT NULL DEFAULT now())";
    cluster.connect(DATABASE).await.batch_execute(outbox).await.expect("the outbox table");
    cluster
}

/// Keys of a thousand customers, drawn evenly.
struct Keys(StdRng);

impl Keys {
    fn take(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| format!("customer-{}", self.0.random_range(0..1_000))).collect()
    }
}

/// One connection with its statement.
pub struct Publisher {
    client: Client,
    statement: Statement,
    way: Way,
    rows: usize,
    payloads: Vec<Value>,
    keys: Keys,
    headers: Vec<Value>,
}

impl Publisher {
    /// Connects. `rows`: of one call; with one, the call for one event is used.
    pub async fn connect(cluster: &Cluster, way: Way, rows: usize) -> Publisher {
        let client = cluster.connect(DATABASE).await;
        let sql = match (way, rows) {
            (Way::Publish, 1) => "SELECT dtm.publish($1, $2, $3, $4)",
            (Way::Insert, 1) => "INSERT INTO outbox (topic, payload, key, headers) VALUES ($1, $2, $3, $4)",
            (Way::Publish, _) => "SELECT dtm.publish_many($1, $2, $3, $4)",
            (Way::Insert, _) => {
                "INSERT INTO outbox (topic, payload, key, headers) \
                 SELECT $1, p, k, h FROM unnest($2::jsonb[], $3::text[], $4::jsonb[]) AS row (p, k, h)"
            }
        };
        let statement = client.prepare(sql).await.expect("prepare");
        let item = json!({"sku": "4711-0815", "quantity": 2, "price": "19.90"});
        let payload =
            |n: usize| json!({"order": n, "customer": "customer-7", "items": [&item, &item, &item]});
        Publisher {
            client,
            statement,
            way,
            rows,
            payloads: (0..rows).map(payload).collect(),
            keys: Keys(StdRng::from_os_rng()),
            headers: (0..rows).map(|_| json!({"x-tenant": "7"})).collect(),
        }
    }

    /// One call. Answers the ids, where the way has some to tell.
    pub async fn call(&mut self) -> Vec<Uuid> {
        let keys = self.keys.take(self.rows);
        let parameters: [&(dyn ToSql + Sync); 4] = match self.rows {
            1 => [&TOPIC, &self.payloads[0], &keys[0], &self.headers[0]],
            _ => [&TOPIC, &self.payloads, &keys, &self.headers],
        };
        match (self.way, self.rows) {
            (Way::Insert, _) => {
                let rows = self.client.execute(&self.statement, &parameters).await.expect("insert");
                assert_eq!(rows as usize, self.rows);
                Vec::new()
            }
            (Way::Publish, 1) => {
                vec![self.client.query_one(&self.statement, &parameters).await.expect("publish").get(0)]
            }
            (Way::Publish, _) => {
                self.client.query_one(&self.statement, &parameters).await.expect("publish_many").get(0)
            }
        }
    }

    async fn transaction(&mut self, calls: usize) -> Vec<Uuid> {
        if calls == 1 {
            return self.call().await;
        }
        self.client.batch_execute("BEGIN").await.expect("BEGIN");
        let mut ids = Vec::with_capacity(calls * self.rows);
        for _ in 0..calls {
            ids.extend(self.call().await);
        }
        self.client.batch_execute("COMMIT").await.expect("COMMIT");
        ids
    }
}

/// What a run has done.
pub struct Done {
    /// Rows a second.
    pub rate: f64,
    /// How many rows.
    pub rows: usize,
    /// Their ids, if they were published.
    pub ids: Vec<Uuid>,
}

/// Each client makes one transaction after the other for so long.
pub async fn saturate(cluster: &Cluster, way: Way, shape: Shape, lasting: Duration) -> Done {
    let publishers = join_all((0..shape.clients).map(|_| Publisher::connect(cluster, way, shape.rows))).await;
    let begun = Instant::now();
    let clients = publishers.into_iter().map(|mut publisher| {
        tokio::spawn(async move {
            let (mut ids, mut rows) = (Vec::new(), 0);
            while begun.elapsed() < lasting {
                ids.extend(publisher.transaction(shape.calls).await);
                rows += shape.calls * shape.rows;
            }
            (ids, rows)
        })
    });
    let (mut ids, mut rows) = (Vec::new(), 0);
    for client in join_all(clients).await {
        let (its_ids, its_rows) = client.expect("a client");
        ids.extend(its_ids);
        rows += its_rows;
    }
    Done { rate: rows as f64 / begun.elapsed().as_secs_f64(), rows, ids }
}

/// A call of a run at a fixed rate.
pub struct Paced {
    /// The id, if it was published.
    pub id: Option<Uuid>,
    /// When it was to begin.
    pub planned: Instant,
    /// When it really began: later, if all clients were busy.
    pub begun: Instant,
    /// When the reply to its COMMIT was there.
    pub committed: Instant,
}

/// A run at a fixed rate.
pub struct PacedRun {
    /// All calls.
    pub calls: Vec<Paced>,
    counts_from: Instant,
    /// Sessions that end take processor time: they stay until everything has arrived.
    _publishers: Vec<Publisher>,
}

impl PacedRun {
    /// The calls that count: those after the warm-up.
    pub fn counted(&self) -> impl Iterator<Item = &Paced> {
        self.calls.iter().filter(|call| call.planned >= self.counts_from)
    }
}

/// Single events at a fixed rate, whether the ones before are done or not (as long as a client is free). What comes in the
/// first part, `warm_up`, does not count.
pub async fn paced(
    cluster: &Cluster,
    way: Way,
    clients: usize,
    rate: f64,
    warm_up: Duration,
    lasting: Duration,
) -> PacedRun {
    let publishers = join_all((0..clients).map(|_| Publisher::connect(cluster, way, 1))).await;
    let lasting = warm_up + lasting;
    let total = (rate * lasting.as_secs_f64()).round() as usize;
    let (ticks, planned) = mpsc::unbounded_channel();
    let planned = std::sync::Arc::new(tokio::sync::Mutex::new(planned));
    let workers: Vec<_> = publishers
        .into_iter()
        .map(|mut publisher| {
            let planned = planned.clone();
            tokio::spawn(async move {
                let mut calls = Vec::new();
                loop {
                    let next = planned.lock().await.recv().await;
                    let Some(planned) = next else { return (publisher, calls) };
                    let begun = Instant::now();
                    let id = publisher.call().await.pop();
                    calls.push(Paced { id, planned, begun, committed: Instant::now() });
                }
            })
        })
        .collect();
    // A thread of its own keeps time better than the runtime's timer, which counts in milliseconds.
    let begin = Instant::now();
    let clock = std::thread::spawn(move || {
        for n in 0..total {
            let at = begin + Duration::from_secs_f64(n as f64 / rate);
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if ticks.send(at).is_err() {
                return;
            }
        }
    });
    let mut run = PacedRun { calls: Vec::new(), counts_from: begin + warm_up, _publishers: Vec::new() };
    for worker in join_all(workers).await {
        let (publisher, calls) = worker.expect("a client");
        run.calls.extend(calls);
        run._publishers.push(publisher);
    }
    clock.join().expect("the clock");
    assert_eq!(run.calls.len(), total);
    run
}

/// Panics unless the log has each of these ids once, and nothing else since it had `before` events. Answers how many it has now.
pub async fn verify_published(client: &Client, ids: &[Uuid], before: i64) -> i64 {
    let mut distinct = ids.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), ids.len(), "an id was given twice");
    let sql = "SELECT (SELECT count(*) FROM dtm.events), \
               (SELECT count(*) FROM dtm.events JOIN unnest($1::uuid[]) AS given (id) USING (id))";
    let row = client.query_one(sql, &[&ids]).await.expect("the log");
    let (all, found): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(found as usize, ids.len(), "a published id is not in the log");
    assert_eq!(all - before, found, "the log has more than was published");
    all
}

/// Panics unless the plain table has grown by so many rows. Answers how many it has now.
pub async fn verify_inserted(client: &Client, rows: usize, before: i64) -> i64 {
    let all: i64 = client.query_one("SELECT count(*) FROM outbox", &[]).await.expect("outbox").get(0);
    assert_eq!(all - before, rows as i64);
    all
}
