// SPDX-License-Identifier: PostgreSQL
//! From the reply to COMMIT until a consumer of Kafka has the event, at a fixed rate.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::kafka_site::{self, Delivery, Site};
use super::kafka_topic::Listener;
use super::load::{self, DATABASE, Way};
use super::report::{Goal, Row};
use super::statistics::Sample;
use crate::arrivals::{self, monotonic_ns};

const RATE: f64 = 1_000.0;
const CLIENTS: usize = 16;
const WARM_UP: Duration = Duration::from_secs(1);
const LASTING: Duration = Duration::from_secs(5);
const ARRIVE_WITHIN: Duration = Duration::from_secs(60);

/// Milliseconds from COMMIT to the consumer, of the events of one run.
async fn measure(site: &Site, delivery: Delivery, topic: &str) -> Sample {
    site.make_topic(topic).await;
    let mut relay = site.relay(DATABASE);
    let client = site.cluster.connect(DATABASE).await;
    kafka_site::subscribe(&client, topic, delivery, "now").await;
    let listener = Listener::start(&site.broker.bootstrap(), topic);
    // What happens only once does not count: connections, the beginning of transactions.
    client.execute("SELECT dtm.publish('begin', '{}')", &[]).await.expect("publish");
    listener.wait_for(1, ARRIVE_WITHIN).await;
    // The consumer's times are of the clock that is read here; the calls' are counted from the same moment.
    let (begun, begun_ns) = (Instant::now(), monotonic_ns());
    let run = load::paced(&site.cluster, Way::Publish, CLIENTS, RATE, WARM_UP, LASTING).await;
    listener.wait_for(1 + run.calls.len(), ARRIVE_WITHIN).await;
    let arrived = listener.arrivals(1);
    let ids: Vec<Uuid> = run.calls.iter().map(|call| call.id.expect("an id")).collect();
    arrivals::assert_each(&arrived, &ids, 1);
    assert!(relay.terminate().await.success());
    kafka_site::unsubscribe(&client, topic).await;
    drop(listener);
    site.broker.delete_topic(topic).await;
    let at: HashMap<Uuid, u64> = arrived.iter().map(|arrival| (arrival.id, arrival.at_ns)).collect();
    let waited = |call: &load::Paced| {
        let arrived_ns = at[&call.id.expect("an id")] - begun_ns;
        (arrived_ns as f64 - (call.committed - begun).as_nanos() as f64) / 1e6
    };
    Sample::new(run.counted().map(waited).collect())
}

/// Runs the measurements.
pub async fn run(site: &Site, pairs: usize) -> Vec<Row> {
    let (mut each, mut once) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        let mut both = [Delivery::AtLeastOnce, Delivery::ExactlyOnce];
        if !pair.is_multiple_of(2) {
            both.reverse();
        }
        for delivery in both {
            let waited = measure(site, delivery, &format!("latency-{}-{pair}", delivery as u8)).await;
            let (p50, p99) = (waited.percentile(0.5), waited.percentile(0.99));
            eprintln!("{delivery:?}, {RATE}/s: p50 {p50:.2} ms, p99 {p99:.2} ms");
            if delivery == Delivery::AtLeastOnce { &mut each } else { &mut once }.push(waited);
        }
    }
    let row = |name: &str, runs: &[Sample], part: f64, goal: Option<f64>| {
        let values = Sample::new(runs.iter().map(|run| run.percentile(part)).collect());
        Row::of_values(name, "ms", &values, goal.map(Goal::AtMost))
    };
    vec![
        row("from COMMIT to a consumer, 1000/s: p50", &each, 0.5, Some(10.0)),
        row("from COMMIT to a consumer, 1000/s: p99", &each, 0.99, Some(30.0)),
        row("  exactly once: p50", &once, 0.5, None),
        row("  exactly once: p99", &once, 0.99, None),
    ]
}
