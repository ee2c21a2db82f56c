// SPDX-License-Identifier: PostgreSQL
//! What publishing costs, against the same rows inserted into a plain table.

use std::collections::HashSet;
use std::time::Duration;

use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE, Shape, Way};
use super::processor::{Shares, Watch};
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::cluster::Cluster;
use crate::relay::Relay;

const RUN: Duration = Duration::from_secs(2);
const PACED_RUN: Duration = Duration::from_secs(3);
const WARM_UP: Duration = Duration::from_millis(500);
const DRAIN: Duration = Duration::from_secs(120);

const SHAPES: [(&str, Shape); 4] = [
    ("1 client, 1 event a transaction", Shape { clients: 1, calls: 1, rows: 1 }),
    ("16 clients, 1 event a transaction", Shape { clients: 16, calls: 1, rows: 1 }),
    ("1 client, 100 calls a transaction", Shape { clients: 1, calls: 100, rows: 1 }),
    ("1 client, publish_many of 100", Shape { clients: 1, calls: 1, rows: 100 }),
];

/// The books: what both tables had after the last run.
struct Books {
    client: Client,
    published: i64,
    inserted: i64,
}

impl Books {
    async fn saturate(&mut self, cluster: &Cluster, way: Way, shape: Shape) -> (f64, Vec<Uuid>) {
        let done = load::saturate(cluster, way, shape, RUN).await;
        match way {
            Way::Publish => {
                self.published = load::verify_published(&self.client, &done.ids, self.published).await
            }
            Way::Insert => {
                self.inserted = load::verify_inserted(&self.client, done.rows, self.inserted).await
            }
        }
        (done.rate, done.ids)
    }

    async fn paced(&mut self, cluster: &Cluster, way: Way, clients: usize, rate: f64) -> (Sample, Vec<Uuid>) {
        let run = load::paced(cluster, way, clients, rate, WARM_UP, PACED_RUN).await;
        let ids: Vec<Uuid> = run.calls.iter().filter_map(|call| call.id).collect();
        match way {
            Way::Publish => self.published = load::verify_published(&self.client, &ids, self.published).await,
            Way::Insert => {
                self.inserted = load::verify_inserted(&self.client, run.calls.len(), self.inserted).await
            }
        }
        let milliseconds = |call: &load::Paced| (call.committed - call.planned).as_secs_f64() * 1e3;
        (Sample::new(run.counted().map(milliseconds).collect()), ids)
    }
}

/// Waits until everything that was published has arrived, and only that.
async fn arrived(sink: &Sink, published: &HashSet<Uuid>) {
    sink.wait_for(published.len(), DRAIN).await;
    let ids: HashSet<Uuid> = sink.arrivals(0).iter().map(|arrival| arrival.id).collect();
    assert_eq!(&ids, published, "what arrived is not what was published");
}

/// Both ways in turn, first the one, then the other.
fn in_turn(pair: usize) -> [Way; 2] {
    if pair.is_multiple_of(2) { [Way::Insert, Way::Publish] } else { [Way::Publish, Way::Insert] }
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let cluster = load::cluster(true).await;
    let mut books = Books { client: cluster.connect(DATABASE).await, published: 0, inserted: 0 };
    let mut rows = Vec::new();
    let mut rates = Vec::new();
    for (name, shape) in SHAPES {
        let (mut found, mut baseline) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            let (mut publish, mut insert) = (0.0, 0.0);
            for way in in_turn(pair) {
                let (rate, _) = books.saturate(&cluster, way, shape).await;
                *(if way == Way::Publish { &mut publish } else { &mut insert }) = rate;
            }
            eprintln!("{name}: publish {publish:.0}/s, INSERT {insert:.0}/s");
            found.push((publish, insert));
            baseline.push(insert);
        }
        rows.push(Row::of_pairs(name, "events/s", &found, Some(Goal::AtLeast(0.95))));
        rates.push((shape.clients, Sample::new(baseline).median()));
    }
    with_relay(&cluster, &mut books, &rates[..2], pairs, &mut rows).await;
    rows
}

async fn with_relay(
    cluster: &Cluster,
    books: &mut Books,
    rates: &[(usize, f64)],
    pairs: usize,
    rows: &mut Vec<Row>,
) {
    let sink = Sink::start();
    let subscribe = "SELECT dtm.subscribe('bench', '>', $1)";
    books.client.execute(subscribe, &[&sink.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url(DATABASE));
    relay.wait_for_log("delivering").await;
    let mut published = HashSet::new();
    for &(clients, rate) in rates {
        let mut found = Vec::new();
        for pair in 0..pairs {
            let (mut publish, mut insert) = (0.0, 0.0);
            for way in in_turn(pair) {
                let (sample, ids) = books.paced(cluster, way, clients, rate / 2.0).await;
                published.extend(ids);
                arrived(&sink, &published).await;
                *(if way == Way::Publish { &mut publish } else { &mut insert }) = sample.percentile(0.99);
            }
            eprintln!(
                "{clients} clients at {:.0}/s, relay on: p99 {publish:.2} ms, INSERT {insert:.2} ms",
                rate / 2.0
            );
            found.push((publish, insert));
        }
        let name = format!("{clients} clients at {:.0}/s, relay delivering: p99", rate / 2.0);
        rows.push(Row::of_pairs(name, "ms", &found, Some(Goal::AtMost(1.2))));
    }
    let mut rate = Vec::new();
    let mut shares = Vec::new();
    for _ in 0..pairs {
        let watch = Watch::begin(cluster, relay.pid(), sink.pid());
        let (publish, ids) = books.saturate(cluster, Way::Publish, SHAPES[1].1).await;
        shares.push(watch.end());
        published.extend(ids);
        arrived(&sink, &published).await;
        rate.push((publish, rates[1].1));
    }
    rows.push(Row::of_pairs("16 clients, saturated, relay on", "events/s", &rate, None));
    let share = |of: fn(&Shares) -> f64| Sample::new(shares.iter().map(of).collect());
    rows.push(Row::of_values("  processors: PostgreSQL", "cores", &share(|s| s.server), None));
    rows.push(Row::of_values("  processors: relay", "cores", &share(|s| s.relay), None));
    rows.push(Row::of_values("  processors: clients", "cores", &share(|s| s.bench), None));
    rows.push(Row::of_values("  processors: receiver", "cores", &share(|s| s.sink), None));
    assert!(relay.terminate().await.success());
    assert_eq!(sink.count(), published.len(), "something was delivered twice");
}
