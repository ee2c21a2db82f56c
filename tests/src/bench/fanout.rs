// SPDX-License-Identifier: PostgreSQL
//! Many subscriptions on the same events, and one whose endpoint is dead among others.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio_postgres::Client;
use uuid::Uuid;

use super::http::fill;
use super::load::{self, DATABASE, Way};
use super::processor;
use super::report::{Goal, Row};
use super::sink::Sink;
use crate::arrivals;
use crate::cluster::Cluster;
use crate::relay::Relay;

const MANY: usize = 100;
/// Events a second, each delivered a hundred times.
const RATE: f64 = 40.0;
const RUN: Duration = Duration::from_secs(8);
const WARM_UP: Duration = Duration::from_secs(1);
const DRAIN: Duration = Duration::from_secs(120);
/// Events of the backlog that nine endpoints get beside a dead one.
const BACKLOG: usize = 10_000;
const GOOD: usize = 9;

/// A server of its own with a relay and so many subscriptions to one endpoint.
struct Site {
    cluster: Cluster,
    client: Client,
    sink: Sink,
    relay: Relay,
    subscriptions: usize,
}

async fn subscribe(client: &Client, name: &str, url: &str, start_at: &str) {
    let sql = "SELECT dtm.subscribe($1, '>', $2, '{\"retry_base\": \"100ms\"}', $3)";
    client.execute(sql, &[&name, &url, &start_at]).await.expect("subscribe");
}

impl Site {
    async fn open(subscriptions: usize) -> Site {
        let cluster = load::cluster(true).await;
        let (client, sink) = (cluster.connect(DATABASE).await, Sink::start());
        for n in 0..subscriptions {
            subscribe(&client, &format!("s-{n}"), &sink.url(), "now").await;
        }
        let relay = Relay::start(&cluster.url(DATABASE));
        relay.wait_for_log(&format!("subscription=\"s-{}\"", subscriptions - 1)).await;
        Site { cluster, client, sink, relay, subscriptions }
    }

    /// Processor milliseconds that the relay's sessions cost the server for each event that was published.
    async fn cost(&self) -> f64 {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'dtm-relay'";
        let sessions: Vec<u32> = {
            let rows = self.client.query(sql, &[]).await.expect("sessions");
            rows.iter().map(|row| row.get::<_, i32>(0) as u32).collect()
        };
        let used = || sessions.iter().map(|&pid| processor::seconds(pid)).sum::<f64>();
        let (arrived, before) = (self.sink.count(), used());
        let run = load::paced(&self.cluster, Way::Publish, 2, RATE, WARM_UP, RUN).await;
        let ids: Vec<Uuid> = run.calls.iter().filter_map(|call| call.id).collect();
        self.sink.wait_for(arrived + ids.len() * self.subscriptions, DRAIN).await;
        let seconds = used() - before;
        arrivals::assert_each(&self.sink.arrivals(arrived), &ids, self.subscriptions);
        seconds * 1e3 / ids.len() as f64
    }
}

/// Events a second that nine endpoints get from a backlog, with or without a tenth one at `dead`.
async fn nine(cluster: &Cluster, client: &Client, ids: &[Uuid], dead: Option<&str>) -> f64 {
    let sink = Sink::start();
    let names: Vec<String> = (0..GOOD).map(|n| format!("good-{n}")).collect();
    if let Some(url) = dead {
        subscribe(client, "dead", url, "earliest").await;
    }
    for name in &names {
        subscribe(client, name, &sink.url(), "earliest").await;
    }
    let mut relay = Relay::start(&cluster.url(DATABASE));
    sink.wait_for(ids.len() * GOOD, DRAIN).await;
    let arrived = sink.arrivals(0);
    arrivals::assert_each(&arrived, ids, GOOD);
    assert!(relay.terminate().await.success());
    for name in names.iter().map(String::as_str).chain(dead.map(|_| "dead")) {
        client.execute("SELECT dtm.unsubscribe($1)", &[&name]).await.expect("unsubscribe");
    }
    arrivals::rate(&arrived)
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let (one, many) = (Site::open(1).await, Site::open(MANY).await);
    let mut costs = Vec::new();
    for pair in 0..pairs {
        let (of_one, of_many) = match pair.is_multiple_of(2) {
            true => {
                let of_one = one.cost().await;
                (of_one, many.cost().await)
            }
            false => {
                let of_many = many.cost().await;
                (one.cost().await, of_many)
            }
        };
        eprintln!("{MANY} subscriptions: {of_many:.2} ms an event, 1: {of_one:.2} ms");
        costs.push((of_many, of_one));
    }
    for mut site in [one, many] {
        assert!(site.relay.terminate().await.success());
    }
    let name = format!("PostgreSQL's processor time an event, {MANY} subscriptions / 1");
    let mut rows = vec![Row::of_pairs(name, "ms", &costs, Some(Goal::AtMost(2.0)))];

    let cluster = load::cluster(true).await;
    let client = cluster.connect(DATABASE).await;
    let ids = fill(&cluster, &client, BACKLOG).await;
    // Takes connections, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let hangs = format!("http://{}/", silent.local_addr().expect("its address"));
    for (what, dead) in [("refuses connections", "http://127.0.0.1:9/"), ("never answers", hangs.as_str())] {
        let mut rates = Vec::new();
        for pair in 0..pairs {
            let (mut with, mut without) = (0.0, 0.0);
            for beside_it in [pair.is_multiple_of(2), !pair.is_multiple_of(2)] {
                let rate = nine(&cluster, &client, &ids, beside_it.then_some(dead)).await;
                *(if beside_it { &mut with } else { &mut without }) = rate;
            }
            eprintln!("nine endpoints: {with:.0}/s beside one that {what}, {without:.0}/s without it");
            rates.push((with, without));
        }
        let name = format!("nine endpoints beside one that {what} / without it");
        rows.push(Row::of_pairs(name, "events/s", &rates, Some(Goal::AtLeast(0.95))));
    }
    rows
}
