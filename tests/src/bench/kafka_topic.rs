// SPDX-License-Identifier: PostgreSQL
//! A topic that is being filled: how quickly, with what, and when each record comes to a consumer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use uuid::Uuid;

use crate::arrivals::{Arrival, monotonic_ns};
use crate::process;

/// Partitions of every topic.
pub const PARTITIONS: usize = 3;
/// How often it is looked how far a topic has come.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A topic that has everything and does not grow for so long is full.
const STILL: Duration = Duration::from_secs(2);
const FULL_WITHIN: Duration = Duration::from_secs(300);
const ANSWER: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);
/// Room for so many arrivals is made before they are timed.
const RESERVED: usize = 1 << 16;

fn consumer(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        // Without one nothing can be assigned; it is never joined.
        .set("group.id", "pg_dtm-bench")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed");
    config
}

fn assign(consumer: &BaseConsumer, topic: &str) {
    let mut all = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        all.add_partition_offset(topic, partition as i32, Offset::Beginning).expect("a partition");
    }
    consumer.assign(&all).expect("an assignment");
}

fn id(record: &BorrowedMessage<'_>) -> Uuid {
    let headers = record.headers().expect("headers");
    let id = headers.iter().find(|header| header.key == "ce_id").and_then(|header| header.value);
    Uuid::try_parse_ascii(id.expect("ce_id")).expect("a UUID")
}

/// Watches an empty topic in a thread of its own until it has so many records that whoever reads what is committed can see.
/// Its result are records a second, from the first ones to the last.
///
/// Only the ends of the partitions are asked for: a consumer would take processor time from who is measured.
pub fn watch(bootstrap: &str, topic: &str, records: usize) -> JoinHandle<f64> {
    let client: BaseConsumer = consumer(bootstrap).create().expect("a client");
    let topic = topic.to_owned();
    std::thread::spawn(move || {
        let until = Instant::now() + FULL_WITHIN;
        let (mut first, mut last) = (None, (0, Instant::now()));
        loop {
            std::thread::sleep(LOOK_EVERY);
            let now = Instant::now();
            assert!(now < until, "{topic} has {} of {records} records within {FULL_WITHIN:?}", last.0);
            let end =
                |partition| client.fetch_watermarks(&topic, partition as i32, ANSWER).map(|(_, end)| end);
            let Ok(ends) = (0..PARTITIONS).map(end).sum::<Result<i64, _>>() else { continue };
            if ends > last.0 {
                last = (ends, now);
                first.get_or_insert(last);
            } else if ends >= records as i64 && now > last.1 + STILL {
                break;
            }
        }
        let first = first.expect("a first look");
        // The end of each transaction takes an offset, too: what counts is the part that came after the first look.
        let part = 1.0 - first.0 as f64 / last.0 as f64;
        records as f64 * part / (last.1 - first.1).as_secs_f64()
    })
}

/// The ids of all records that are committed.
pub async fn ids(bootstrap: &str, topic: &str) -> Vec<Uuid> {
    let client: BaseConsumer =
        consumer(bootstrap).set("enable.partition.eof", "true").create().expect("a consumer");
    let topic = topic.to_owned();
    let read = move || {
        assign(&client, &topic);
        let until = Instant::now() + FULL_WITHIN;
        let (mut ids, mut ended) = (Vec::new(), 0);
        while ended < PARTITIONS {
            assert!(Instant::now() < until, "{topic} cannot be read to its end");
            match client.poll(POLL) {
                Some(Ok(record)) => ids.push(id(&record)),
                Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
                Some(Err(error)) => panic!("{topic}: {error}"),
                None => {}
            }
        }
        ids
    };
    tokio::task::spawn_blocking(read).await.expect("ids")
}

/// A consumer in a thread of its own that notes when each record came to it. Dropping it ends it.
pub struct Listener {
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Starts one.
    pub fn start(bootstrap: &str, topic: &str) -> Listener {
        let mut config = consumer(bootstrap);
        // The broker answers as soon as there is something.
        config.set("fetch.min.bytes", "1").set("fetch.wait.max.ms", "10");
        let client: BaseConsumer = config.create().expect("a consumer");
        assign(&client, topic);
        let arrivals = Arc::new(Mutex::new(Vec::with_capacity(RESERVED)));
        let ends = Arc::<AtomicBool>::default();
        let (its_arrivals, its_ends) = (arrivals.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            while !its_ends.load(Ordering::Relaxed) {
                match client.poll(POLL) {
                    Some(Ok(record)) => {
                        let at_ns = monotonic_ns();
                        its_arrivals.lock().expect("arrivals").push(Arrival { id: id(&record), at_ns });
                    }
                    Some(Err(error)) => panic!("the consumer: {error}"),
                    None => {}
                }
            }
        });
        Listener { arrivals, ends, thread: Some(thread) }
    }

    /// Waits until so many have arrived.
    pub async fn wait_for(&self, count: usize, deadline: Duration) {
        let arrived = || self.arrivals.lock().expect("arrivals").len();
        let all = process::holds_within(deadline, || arrived() >= count).await;
        assert!(all, "{} of {count} arrived within {deadline:?}", arrived());
    }

    /// What has arrived, from a number on.
    pub fn arrivals(&self, from: usize) -> Vec<Arrival> {
        self.arrivals.lock().expect("arrivals")[from..].to_vec()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
