// SPDX-License-Identifier: PostgreSQL
//! From the reply to COMMIT until the event arrives, at a fixed rate.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::load::{self, DATABASE, Paced, Way};
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::arrivals::monotonic_ns;
use crate::cluster::Cluster;
use crate::relay::Relay;

const BUSY_RATE: f64 = 1_000.0;
const BUSY_RUN: Duration = Duration::from_secs(5);
const WARM_UP: Duration = Duration::from_secs(1);
const CLIENTS: usize = 16;
const QUIET_RATE: f64 = 1.0;
const DRAIN: Duration = Duration::from_secs(30);

/// A server with a relay and an endpoint.
struct Site {
    name: &'static str,
    cluster: Cluster,
    sink: Sink,
    relay: Relay,
}

/// What was measured in one run, in milliseconds.
struct Measured {
    /// From the reply to COMMIT to the arrival; below zero where the event was faster.
    delivery: Sample,
    /// From sending the statement to the reply.
    commit: Sample,
}

impl Site {
    async fn open(name: &'static str, preload: bool) -> Site {
        let cluster = load::cluster(preload).await;
        let sink = Sink::start();
        let subscribe = "SELECT dtm.subscribe('bench', '>', $1)";
        let client = cluster.connect(DATABASE).await;
        client.execute(subscribe, &[&sink.url()]).await.expect("subscribe");
        let relay = Relay::start(&cluster.url(DATABASE));
        relay.wait_for_log("delivering").await;
        Site { name, cluster, sink, relay }
    }

    async fn measure(&self, clients: usize, rate: f64, lasting: Duration) -> Measured {
        let before = self.sink.count();
        // The sink's times are of the clock that is read here; the calls' are counted from the same moment.
        let (begun, begun_ns) = (Instant::now(), monotonic_ns());
        let run = load::paced(&self.cluster, Way::Publish, clients, rate, WARM_UP, lasting).await;
        let expected = before + run.calls.len();
        self.sink.wait_for(expected, DRAIN).await;
        let arrived = self.sink.arrivals(before);
        let arrivals: HashMap<Uuid, u64> =
            arrived.iter().map(|arrival| (arrival.id, arrival.at_ns)).collect();
        let counts = (arrivals.len(), arrived.len());
        assert_eq!(counts, (run.calls.len(), run.calls.len()), "not each of them once");
        let delivery = |call: &Paced| {
            let arrived_ns = arrivals[&call.id.expect("an id")] - begun_ns;
            (arrived_ns as f64 - (call.committed - begun).as_nanos() as f64) / 1e6
        };
        Measured {
            delivery: Sample::new(run.counted().map(delivery).collect()),
            commit: Sample::new(run.counted().map(|c| (c.committed - c.begun).as_secs_f64() * 1e3).collect()),
        }
    }
}

/// Runs the benchmark. At one event a second p99 is the slowest of those that there were.
pub async fn run(pairs: usize) -> Vec<Row> {
    let sites = [Site::open("preloaded", true).await, Site::open("polling", false).await];
    let mut busy: [Vec<Measured>; 2] = [Vec::new(), Vec::new()];
    for pair in 0..pairs {
        for at in if pair.is_multiple_of(2) { [0, 1] } else { [1, 0] } {
            let found = sites[at].measure(CLIENTS, BUSY_RATE, BUSY_RUN).await;
            let (p50, p99) = (found.delivery.percentile(0.5), found.delivery.percentile(0.99));
            eprintln!("{}, {BUSY_RATE}/s: p50 {p50:.2} ms, p99 {p99:.2} ms", sites[at].name);
            busy[at].push(found);
        }
    }
    let quiet_run = Duration::from_secs(6 * pairs as u64);
    let (first, second) =
        tokio::join!(sites[0].measure(1, QUIET_RATE, quiet_run), sites[1].measure(1, QUIET_RATE, quiet_run));
    let mut rows = Vec::new();
    for (site, found) in std::iter::zip(&sites, &busy) {
        rows.extend(self::rows(&format!("{}, {BUSY_RATE}/s", site.name), found, true));
    }
    for (site, found) in std::iter::zip(&sites, [first, second]) {
        rows.extend(self::rows(&format!("{}, {QUIET_RATE}/s", site.name), &[found], false));
    }
    for mut site in sites {
        assert!(site.relay.terminate().await.success());
    }
    rows
}

fn rows(name: &str, runs: &[Measured], goals: bool) -> Vec<Row> {
    let row = |what: &str, of: &dyn Fn(&Measured) -> f64, goal: Option<Goal>| {
        let values = Sample::new(runs.iter().map(of).collect());
        Row::of_values(format!("{name}: {what}"), "ms", &values, goal.filter(|_| goals))
    };
    vec![
        row("p50", &|run| run.delivery.percentile(0.5), Some(Goal::AtMost(2.0))),
        row("p99", &|run| run.delivery.percentile(0.99), Some(Goal::AtMost(10.0))),
        row("  the commit itself, p50", &|run| run.commit.percentile(0.5), None),
        row("  the commit itself, p99", &|run| run.commit.percentile(0.99), None),
    ]
}
