// SPDX-License-Identifier: PostgreSQL
//! Delivering a backlog into a real Kafka, at least once and exactly once, against a bare loop that produces the same rows and
//! a bare producer that has them in memory; the relay's memory; and the time from COMMIT to a consumer.

use std::thread::JoinHandle;

use tokio_postgres::Client;
use uuid::Uuid;

use super::kafka_bare::{self, Commit, Memory};
use super::kafka_site::{self, Delivery, Site};
use super::report::{Goal, Row};
use super::statistics::Sample;
use super::{kafka_latency, kafka_topic, processor};
use crate::process;

/// The backlog, unless the command line says otherwise.
pub const EVENTS: usize = 1_000_000;
const DATABASE: &str = "backlog";
/// The records of all come from here.
const SOURCE: &str = "/pg_dtm/backlog";
/// What librdkafka holds of records that wait, at the most, as the relay sets it.
const QUEUE_MB: f64 = 64.0;
const GOAL: Goal = Goal::AtLeast(0.8);

/// Who fills a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A relay.
    Relay(Delivery),
    /// A loop that reads the same rows.
    Loop(Commit),
    /// A producer that reads nothing.
    Memory(Commit),
}

/// Each round takes them in this order, or in the opposite one. Of three, the first is compared with the other two.
const WAYS: [Way; 6] = [
    Way::Relay(Delivery::AtLeastOnce),
    Way::Loop(Commit::Each),
    Way::Memory(Commit::Each),
    Way::Relay(Delivery::ExactlyOnce),
    Way::Loop(Commit::Transactions),
    Way::Memory(Commit::Transactions),
];

/// What was measured in one run.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    /// Events a second.
    rate: f64,
    /// Processor time that an event took of the process that produced it, in microseconds.
    processor_us: f64,
    /// The relay's greatest memory, beyond librdkafka's queue.
    beyond_mb: f64,
}

/// A backlog and where it goes.
struct Backlog {
    site: Site,
    client: Client,
    ids: Vec<Uuid>,
    memory: Memory,
}

impl Backlog {
    async fn open(events: usize) -> Backlog {
        let site = Site::open().await;
        site.cluster.create_database(DATABASE).await;
        let client = site.cluster.connect(DATABASE).await;
        let ids = kafka_site::publish_backlog(&client, events).await;
        let memory = Memory::of(site.cluster.url(DATABASE), SOURCE.to_owned()).await;
        Backlog { site, client, ids, memory }
    }

    /// Fills a topic, and looks at what is in it.
    async fn fill(&self, way: Way, topic: &str) -> Run {
        let bootstrap = self.site.broker.bootstrap();
        self.site.make_topic(topic).await;
        let watch = kafka_topic::watch(&bootstrap, topic, self.ids.len());
        let run = match way {
            Way::Relay(delivery) => self.by_relay(topic, delivery, watch).await,
            Way::Loop(_) | Way::Memory(_) => self.by_bare(way, topic, watch).await,
        };
        eprintln!("{way:?}: {:.0}/s, {:.2} µs of processor time an event", run.rate, run.processor_us);
        let mut found = kafka_topic::ids(&bootstrap, topic).await;
        assert_eq!(found.len(), self.ids.len(), "{way:?}: as many records as events");
        if !matches!(way, Way::Memory(_)) {
            found.sort_unstable();
            assert!(found == self.ids, "{way:?}: not each event once");
        }
        self.site.broker.delete_topic(topic).await;
        run
    }

    async fn by_relay(&self, topic: &str, delivery: Delivery, watch: JoinHandle<f64>) -> Run {
        let mut relay = self.site.relay(DATABASE);
        relay.wait_for_log("connected to").await;
        let before = processor::seconds(relay.pid());
        kafka_site::subscribe(&self.client, topic, delivery, "earliest").await;
        let rate = watched(watch).await;
        let processor_us = self.each_us(processor::seconds(relay.pid()) - before);
        let beyond_mb = process::peak_mb(relay.pid()) - QUEUE_MB;
        assert!(relay.terminate().await.success());
        kafka_site::unsubscribe(&self.client, topic).await;
        Run { rate, processor_us, beyond_mb }
    }

    async fn by_bare(&self, way: Way, topic: &str, watch: JoinHandle<f64>) -> Run {
        let (url, bootstrap) = (self.site.cluster.url(DATABASE), self.site.broker.bootstrap());
        let before = processor::seconds(std::process::id());
        match way {
            Way::Memory(commit) => self.memory.produce(bootstrap, topic, self.ids.len(), commit).await,
            Way::Loop(commit) => {
                kafka_bare::produce_log(url, SOURCE.to_owned(), bootstrap, topic, commit).await
            }
            Way::Relay(_) => unreachable!("a process of its own"),
        }
        let processor_us = self.each_us(processor::seconds(std::process::id()) - before);
        Run { rate: watched(watch).await, processor_us, beyond_mb: 0.0 }
    }

    fn each_us(&self, seconds: f64) -> f64 {
        seconds * 1e6 / self.ids.len() as f64
    }
}

async fn watched(watch: JoinHandle<f64>) -> f64 {
    tokio::task::spawn_blocking(|| watch.join().expect("a full topic")).await.expect("a rate")
}

/// The rows of three ways, of which the first is judged.
fn rows(name: &str, others: [&str; 2], runs: &[Vec<Run>]) -> Vec<Row> {
    let [relay, bare, memory] = [0, 1, 2].map(|at| &runs[at]);
    let pairs = |other: &[Run]| -> Vec<(f64, f64)> {
        std::iter::zip(relay, other).map(|(run, other)| (run.rate, other.rate)).collect()
    };
    let value = |name: String, unit, runs: &[Run], of: fn(&Run) -> f64| {
        Row::of_values(name, unit, &Sample::new(runs.iter().map(of).collect()), None)
    };
    vec![
        Row::of_pairs(format!("{name} ÷ {}", others[0]), "events/s", &pairs(bare), Some(GOAL)),
        Row::of_pairs(format!("  ÷ {}", others[1]), "events/s", &pairs(memory), None),
        value("  processor time".into(), "µs/event", relay, |run| run.processor_us),
        value(others[0].to_owned(), "events/s", bare, |run| run.rate),
        value("  processor time".into(), "µs/event", bare, |run| run.processor_us),
        value(others[1].to_owned(), "events/s", memory, |run| run.rate),
        value("  processor time".into(), "µs/event", memory, |run| run.processor_us),
    ]
}

/// Runs the benchmark.
pub async fn run(pairs: usize, events: usize) -> Vec<Row> {
    let backlog = Backlog::open(events).await;
    // The broker's Java is slow at first.
    for (number, commit) in [Commit::Each, Commit::Transactions].into_iter().enumerate() {
        backlog.fill(Way::Memory(commit), &format!("warm-up-{number}")).await;
    }
    let mut runs = WAYS.map(|_| Vec::new());
    for pair in 0..pairs {
        let mut order = [0, 1, 2, 3, 4, 5];
        if !pair.is_multiple_of(2) {
            order.reverse();
        }
        for at in order {
            runs[at].push(backlog.fill(WAYS[at], &format!("backlog-{at}-{pair}")).await);
        }
    }
    let memory = |name: &str, runs: &[Run], goal| {
        let values = Sample::new(runs.iter().map(|run| run.beyond_mb).collect());
        Row::of_values(name, "MB", &values, goal)
    };
    let backlog_name = format!("{events} events from a backlog");
    let mut all = rows(&backlog_name, ["a bare loop", "a bare producer from memory"], &runs[..3]);
    let transactions = ["a bare loop with transactions", "a bare producer with transactions"];
    all.extend(rows(&format!("{backlog_name}, exactly once"), transactions, &runs[3..]));
    all.extend(kafka_latency::run(&backlog.site, pairs).await);
    all.extend([
        memory("the relay's memory beyond librdkafka's 64 MB", &runs[0], Some(Goal::AtMost(64.0))),
        memory("  the same exactly once", &runs[3], None),
    ]);
    all
}
