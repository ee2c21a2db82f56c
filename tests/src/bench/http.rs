// SPDX-License-Identifier: PostgreSQL
//! Delivering a backlog over HTTP, against a bare client that posts the same.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE, Shape, Way};
use super::processor::{Shares, Watch};
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::arrivals;
use crate::cluster::Cluster;
use crate::relay::Relay;

/// The backlog.
pub const EVENTS: usize = 200_000;
/// Of these the best is the baseline.
const CONNECTIONS: [usize; 3] = [16, 32, 64];
/// With so many it is found out which.
const TRIAL_EVENTS: usize = 30_000;
const MAX_IN_FLIGHT: usize = 64;
const DRAIN: Duration = Duration::from_secs(300);

/// Fills a log with at least so many events. Answers their ids in their order.
pub async fn fill(cluster: &Cluster, client: &Client, events: usize) -> Vec<Uuid> {
    let many = Shape { clients: 2, calls: 1, rows: 100 };
    let mut published = 0;
    while published < events {
        published += load::saturate(cluster, Way::Publish, many, Duration::from_millis(500)).await.rows;
    }
    let rows = client.query("SELECT id FROM dtm.events ORDER BY seq", &[]).await.expect("the log");
    assert_eq!(rows.len(), published);
    rows.iter().map(|row| row.get(0)).collect()
}

/// Events a second from the first arrival to the last; each of `ids` has arrived once, and nothing else.
fn rate(sink: &Sink, ids: &[Uuid]) -> f64 {
    let arrived = sink.arrivals(0);
    arrivals::assert_each(&arrived, ids, 1);
    arrivals::rate(&arrived)
}

async fn by_relay(cluster: &Cluster, client: &Client, ids: &[Uuid], run: usize) -> (f64, Shares) {
    let sink = Sink::start();
    let name = format!("http-{run}");
    let mut relay = Relay::start(&cluster.url(DATABASE));
    relay.wait_for_log("connected to").await;
    let sql =
        format!("SELECT dtm.subscribe($1, '>', $2, '{{\"max_in_flight\": {MAX_IN_FLIGHT}}}', 'earliest')");
    client.execute(&sql, &[&name, &sink.url()]).await.expect("subscribe");
    sink.wait_for(1, DRAIN).await;
    let watch = Watch::begin(cluster, relay.pid(), sink.pid());
    sink.wait_for(ids.len(), DRAIN).await;
    let shares = watch.end();
    assert!(relay.terminate().await.success());
    client.execute("SELECT dtm.unsubscribe($1)", &[&name]).await.expect("unsubscribe");
    (rate(&sink, ids), shares)
}

async fn by_client(cluster: &Cluster, ids: &[Uuid], connections: usize) -> (f64, Shares) {
    let sink = Sink::start();
    let program = std::env::var_os("DTM_POSTER").map(PathBuf::from);
    let mut command = Command::new(program.expect("DTM_POSTER is not set: run this by cargo xtask"));
    command.args(["--database-url", &cluster.url(DATABASE), "--to", &sink.url()]);
    command.args(["--connections", &connections.to_string(), "--events", &ids.len().to_string()]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the poster");
    BufReader::new(child.stdout.take().expect("its output")).read_line(&mut String::new()).expect("a line");
    let watch = Watch::begin(cluster, child.id(), sink.pid());
    child.stdin.take().expect("its input").write_all(b"go\n").expect("a line");
    sink.wait_for(ids.len(), DRAIN).await;
    let shares = watch.end();
    assert!(child.wait().expect("the poster").success());
    (rate(&sink, ids), shares)
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let cluster = load::cluster(true).await;
    let client = cluster.connect(DATABASE).await;
    let ids = fill(&cluster, &client, EVENTS).await;
    let mut best = (0.0, 0);
    for connections in CONNECTIONS {
        let (rate, _) = by_client(&cluster, &ids[..TRIAL_EVENTS], connections).await;
        eprintln!("bare client, {connections} connections: {rate:.0}/s");
        best = if rate > best.0 { (rate, connections) } else { best };
    }
    let (mut rates, mut shares) = (Vec::new(), [Vec::new(), Vec::new()]);
    for pair in 0..pairs {
        let (mut relay, mut bare) = (0.0, 0.0);
        for by_the_relay in [pair.is_multiple_of(2), !pair.is_multiple_of(2)] {
            let (rate, used) = match by_the_relay {
                true => by_relay(&cluster, &client, &ids, pair).await,
                false => by_client(&cluster, &ids, best.1).await,
            };
            *(if by_the_relay { &mut relay } else { &mut bare }) = rate;
            shares[usize::from(by_the_relay)].push(used);
        }
        eprintln!("relay {relay:.0}/s, bare client {bare:.0}/s");
        rates.push((relay, bare));
    }
    let share = |which: usize, of: fn(&Shares) -> f64| Sample::new(shares[which].iter().map(of).collect());
    let bare = Sample::new(rates.iter().map(|(_, bare)| *bare).collect());
    let cores = |name: &str, sample: &Sample| Row::of_values(name, "cores", sample, None);
    vec![
        Row::of_pairs(
            format!("{} events from a backlog, one a POST", ids.len()),
            "events/s",
            &rates,
            Some(Goal::AtLeast(0.8)),
        ),
        cores("  processors: relay", &share(1, |s| s.relay)),
        cores("  processors: PostgreSQL", &share(1, |s| s.server)),
        cores("  processors: endpoint", &share(1, |s| s.sink)),
        Row::of_values(format!("bare client, {} connections", best.1), "events/s", &bare, None),
        cores("  processors: client", &share(0, |s| s.relay)),
        cores("  processors: endpoint", &share(0, |s| s.sink)),
    ]
}
