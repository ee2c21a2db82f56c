// SPDX-License-Identifier: PostgreSQL
//! How far a transactional producer has come: a record in a compacted topic, written in the transaction of what it covers.
//!
//! It says in which window, by an id that PostgreSQL has stored, and up to which sequence number. What a window is only
//! PostgreSQL knows.

use std::time::{Duration, Instant};

use rdkafka::admin::{NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::producer::Quiet;

/// The topic. It has one partition; the relay makes it if it is not there.
pub const TOPIC: &str = "dtm_positions";

/// Its settings: it is read from its beginning when a producer begins, and is to stay small.
const SETTINGS: [(&str, &str); 4] = [
    ("cleanup.policy", "compact"),
    ("min.cleanable.dirty.ratio", "0.05"),
    ("segment.bytes", "16777216"),
    ("segment.ms", "600000"),
];

/// For other transactions that are open in the topic to end.
const READ_WITHIN: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);

/// A position.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The window; nil: none yet.
    pub window: Uuid,
    /// The epoch of the cursor.
    pub epoch: i64,
    /// Up to this sequence number the window is delivered.
    pub last_seq: i64,
    /// Parked events that were delivered with it, by sequence number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub done: Vec<i64>,
}

/// What the topic's records say.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Entry {
    /// How far a producer has come.
    Position(Position),
    /// A producer begins: what was written before has been read, once this has been.
    Begin {
        /// At random.
        begin: Uuid,
    },
}

/// The key of the record that says that a producer begins; that of its positions is its name.
pub fn beginning_of(producer: &str) -> String {
    format!("{producer}/begin")
}

/// The topic as it is made.
pub fn new_topic() -> NewTopic<'static> {
    let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(-1));
    SETTINGS.into_iter().fold(topic, |topic, (name, value)| topic.set(name, value))
}

/// The last position of a producer, before the marker that says that it has begun again. Blocks.
pub fn read(config: &ClientConfig, producer: &str, marker: Uuid) -> Result<Option<Position>, String> {
    let mut config = config.clone();
    config
        // Without one nothing can be assigned; it is never joined.
        .set("group.id", producer)
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", "50");
    let failed = |error: rdkafka::error::KafkaError| format!("topic {TOPIC} cannot be read: {error}");
    let consumer: BaseConsumer<Quiet> = config.create_with_context(Quiet).map_err(failed)?;
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(TOPIC, 0, Offset::Beginning).map_err(failed)?;
    consumer.assign(&assignment).map_err(failed)?;
    let (until, beginning) = (Instant::now() + READ_WITHIN, beginning_of(producer));
    let mut last = None;
    while Instant::now() < until {
        let record = match consumer.poll(POLL) {
            None => continue,
            Some(Ok(record))
                if [producer, &beginning].map(str::as_bytes).contains(&record.key().unwrap_or_default()) =>
            {
                record
            }
            Some(Ok(_)) => continue,
            Some(Err(error))
                if matches!(
                    error.rdkafka_error_code(),
                    Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed)
                ) =>
            {
                return Err(failed(error));
            }
            // It goes on by itself when a broker is back.
            Some(Err(error)) => {
                tracing::debug!("reading {TOPIC}: {error}");
                continue;
            }
        };
        match serde_json::from_slice(record.payload().unwrap_or_default()) {
            Ok(Entry::Position(position)) => last = Some(position),
            Ok(Entry::Begin { begin }) if begin == marker => return Ok(last),
            Ok(Entry::Begin { .. }) => {}
            Err(error) => return Err(format!("topic {TOPIC} has a record that is no position: {error}")),
        }
    }
    Err(format!("topic {TOPIC} could not be read to its end within {} s", READ_WITHIN.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_told_apart() {
        let position = Position { window: Uuid::from_u128(7), epoch: 2, last_seq: 9, done: vec![3] };
        for entry in [Entry::Position(position), Entry::Begin { begin: Uuid::from_u128(1) }] {
            let text = serde_json::to_string(&entry).unwrap();
            assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry, "{text}");
        }
    }
}
