// SPDX-License-Identifier: PostgreSQL
//! What is in a Kafka topic: every record of every partition, read without a group, and as the ledger takes it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Version};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::process;
use crate::receiver::Received;

const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(500);

/// A record as it is in its partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its topic.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// Milliseconds since 1970.
    pub timestamp_ms: Option<i64>,
    /// The key, which decides on the partition.
    pub key: Option<Vec<u8>>,
    /// The body; none is a tombstone.
    pub value: Option<Vec<u8>>,
    /// In the order in which they were written; a name may come twice.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    /// The first header of a name, as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(found, _)| found == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    }

    /// The event's id: a CloudEvent's, or an outbox record's.
    pub fn id(&self) -> &str {
        self.header("ce_id").or_else(|| self.header("id")).unwrap_or_default()
    }

    /// The key as text; empty if there is none.
    pub fn key_text(&self) -> &str {
        self.key.as_deref().map_or("", |key| std::str::from_utf8(key).expect("a key that is text"))
    }
}

/// Whose records are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Those of committed transactions and those of none.
    Committed,
    /// Also those of transactions that are open or were aborted.
    Everything,
}

/// Topics to be read.
#[derive(Clone, Debug)]
pub struct Log {
    bootstrap: String,
    topics: Vec<String>,
    isolation: Isolation,
}

impl Log {
    /// The log of topics. They need not exist yet.
    pub fn of(bootstrap: &str, topics: &[&str], isolation: Isolation) -> Log {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        Log { bootstrap: bootstrap.to_owned(), topics, isolation }
    }

    /// Everything from the beginning to the end, by topic, partition and offset.
    pub async fn read(&self) -> Vec<Record> {
        let log = self.clone();
        let read = move || log.topics.iter().flat_map(|topic| log.read_topic(topic)).collect();
        tokio::task::spawn_blocking(read).await.expect("records")
    }

    /// Reads until what is there satisfies a condition; panics with a summary if it does not in time.
    pub async fn wait_until(
        &self,
        what: &str,
        deadline: Duration,
        condition: impl Fn(&[Record]) -> bool,
    ) -> Vec<Record> {
        let attempt = || async {
            let records = self.read().await;
            condition(&records).then_some(records)
        };
        if let Some(records) = process::eventually(deadline, attempt).await {
            return records;
        }
        let records = self.read().await;
        let last: Vec<String> =
            records.iter().rev().take(5).map(|r| format!("{} {}", r.topic, r.id())).collect();
        panic!("{what}: not within {deadline:?}; {} records, the last: {last:?}", records.len());
    }

    /// Reads until there are so many records.
    pub async fn wait_for(&self, count: usize) -> Vec<Record> {
        let enough = |records: &[Record]| records.len() >= count;
        self.wait_until(&format!("{count} records"), DEADLINE, enough).await
    }

    fn read_topic(&self, topic: &str) -> Vec<Record> {
        let until = Instant::now() + DEADLINE;
        let consumer = self.consumer();
        let partitions = partitions(&consumer, topic, until);
        let mut assignment = TopicPartitionList::new();
        for partition in &partitions {
            assignment.add_partition_offset(topic, *partition, Offset::Beginning).expect("a partition");
        }
        consumer.assign(&assignment).expect("an assignment");
        let mut unread: HashSet<i32> = partitions.into_iter().collect();
        let mut records = Vec::new();
        let mut trouble = None;
        while !unread.is_empty() {
            assert!(Instant::now() < until, "{topic} cannot be read to its end: {trouble:?}");
            match consumer.poll(POLL) {
                Some(Ok(message)) => records.push(record(&message)),
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(unread.remove(&partition)),
                // It goes on by itself, when a broker comes back for example.
                Some(Err(error)) => trouble = Some(error),
                None => {}
            }
        }
        records.sort_by_key(|record| (record.partition, record.offset));
        records
    }

    fn consumer(&self) -> BaseConsumer {
        let isolation = match self.isolation {
            Isolation::Committed => "read_committed",
            Isolation::Everything => "read_uncommitted",
        };
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.bootstrap)
            // Without one nothing can be assigned; it is never joined.
            .set("group.id", "pg_dtm-kit")
            .set("enable.auto.commit", "false")
            .set("isolation.level", isolation)
            .set("enable.partition.eof", "true")
            .set("check.crcs", "true")
            // The end of a partition is only told with an answer, and that waits for records.
            .set("fetch.wait.max.ms", "10")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "500");
        config.create().expect("a client")
    }
}

/// The partitions of a topic; none if there is no such topic.
fn partitions(consumer: &BaseConsumer, topic: &str, until: Instant) -> Vec<i32> {
    loop {
        let answer = consumer.fetch_metadata(Some(topic), POLL);
        if let Ok(metadata) = &answer
            && let [found] = metadata.topics()
        {
            match found.error() {
                None => return found.partitions().iter().map(|partition| partition.id()).collect(),
                Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => return Vec::new(),
                Some(_) => {}
            }
        }
        assert!(Instant::now() < until, "Kafka does not tell of {topic}: {:?}", answer.err());
    }
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        headers.iter().map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect()
    });
    Record {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers,
    }
}

/// What a ledger is held against: a record that is in a topic is an event that was accepted. The order is that of the
/// partitions, and so that of each key.
pub fn received(records: &[Record]) -> Vec<Received> {
    let received = |record: &Record| {
        let mut headers = HeaderMap::new();
        for (name, value) in [("ce-id", record.id()), ("ce-partitionkey", record.key_text())] {
            headers.insert(name, HeaderValue::from_str(value).expect("a visible header"));
        }
        Received {
            at: Instant::now(),
            method: Method::POST,
            version: Version::HTTP_11,
            target: record.topic.clone(),
            headers,
            body: Bytes::from(record.value.clone().unwrap_or_default()),
            accepted: true,
        }
    };
    records.iter().map(received).collect()
}
