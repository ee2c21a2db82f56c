// SPDX-License-Identifier: PostgreSQL
//! What the barrier costs, against the bare INSERT that it is made of.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE};
use super::report::{Goal, Row};
use crate::cluster::Cluster;

const RUN: Duration = Duration::from_secs(2);

/// A table like the barrier's, to be written without it.
const BARE_TABLE: &str = "CREATE TABLE bare (LIKE dtm_barrier.barrier INCLUDING ALL)";
const BARRIER: &str = "SELECT dtm.barrier('tcc', $1, '01', 'try')";
const BARE: &str = "INSERT INTO bare (trans_type, gid, branch_id, op, barrier_id, reason)
     VALUES ('tcc', $1, '01', 'try', '01', 'try') ON CONFLICT DO NOTHING";

/// Calls a second, each in a transaction of its own. Answers how many there were, too.
async fn saturate(cluster: &Cluster, sql: &'static str, clients: usize) -> (f64, i64) {
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..clients {
        let client = cluster.connect(DATABASE).await;
        tasks.push(tokio::spawn(async move {
            let statement = client.prepare(sql).await.expect("a statement");
            let mut calls = 0;
            while begun.elapsed() < RUN {
                let gid = Uuid::now_v7().to_string();
                client.execute(&statement, &[&gid]).await.expect("a call");
                calls += 1;
            }
            calls
        }));
    }
    let mut calls = 0;
    for task in tasks {
        calls += task.await.expect("a client");
    }
    (calls as f64 / begun.elapsed().as_secs_f64(), calls)
}

async fn rows(client: &Client, table: &str) -> i64 {
    let sql = format!("SELECT count(DISTINCT gid) FROM {table}");
    client.query_one(&sql, &[]).await.expect("rows").get(0)
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let cluster = load::cluster(true).await;
    let client = cluster.connect(DATABASE).await;
    client.batch_execute(BARE_TABLE).await.expect("a table");
    let ways = [(BARRIER, "dtm_barrier.barrier"), (BARE, "bare")];
    let mut written = [0, 0];
    let mut found = Vec::new();
    for (name, clients) in [("1 client", 1), ("16 clients", 16)] {
        let mut rates = Vec::new();
        // The first pair warms up.
        for pair in 0..=pairs {
            let mut pair_rates = [0.0, 0.0];
            for at in if pair.is_multiple_of(2) { [0, 1] } else { [1, 0] } {
                let (sql, table) = ways[at];
                let (rate, calls) = saturate(&cluster, sql, clients).await;
                written[at] += calls;
                assert_eq!(rows(&client, table).await, written[at], "each call has left its row");
                pair_rates[at] = rate;
            }
            if pair > 0 {
                rates.push((pair_rates[0], pair_rates[1]));
            }
        }
        let name = format!("{name}, a call a transaction");
        found.push(Row::of_pairs(name, "calls/s", &rates, Some(Goal::AtLeast(0.9))));
    }
    found
}
