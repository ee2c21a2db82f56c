// SPDX-License-Identifier: PostgreSQL
//! What a relay into Kafka is measured against: a loop that produces the rows of the log and does nothing else, and one that
//! does not even read them.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, NoCustomPartitioner, Producer as _, ProducerContext, ThreadedProducer};
use tokio_postgres::NoTls;
use uuid::Uuid;

/// Records of a transaction: as many as the relay's have at the most.
const TRANSACTION: usize = 10_000;
/// So many rows are held in memory and produced again and again: more than a batch has.
const HELD: usize = 10_000;
/// For an answer of the broker.
const ANSWER: Duration = Duration::from_secs(60);
/// What does not fit the producer's queue is tried again after this.
const AGAIN: Duration = Duration::from_millis(1);
/// Microseconds from 1970 to PostgreSQL's 2000.
const EPOCH_US: i64 = 946_684_800_000_000;
/// Signature, flags and the length of an extension.
const COPY_HEADER_BYTES: usize = 19;

/// How records are committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Each by itself.
    Each,
    /// Ten thousand in a transaction, as many as the relay at the most.
    Transactions,
}

/// Counts what has arrived.
#[derive(Default)]
struct Arrived(AtomicUsize);

impl ClientContext for Arrived {}

impl ProducerContext<NoCustomPartitioner> for Arrived {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A producer with the same configuration as the relay's.
struct Producer {
    producer: ThreadedProducer<Arrived>,
    topic: String,
    commit: Commit,
    sent: usize,
}

impl Producer {
    fn new(bootstrap: &str, topic: &str, commit: Commit) -> Producer {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", bootstrap)
            .set("acks", "all")
            .set("batch.size", "1000000")
            .set("compression.type", "lz4")
            .set("enable.idempotence", "true")
            .set("linger.ms", "1")
            .set("partitioner", "murmur2_random")
            .set("queue.buffering.max.kbytes", "65536")
            .set("queue.buffering.max.messages", "200000");
        match commit {
            Commit::Each => config.set("message.timeout.ms", "0"),
            Commit::Transactions => config.set("transactional.id", topic),
        };
        let producer: ThreadedProducer<Arrived> =
            config.create_with_context(Arrived::default()).expect("a producer");
        if commit == Commit::Transactions {
            producer.init_transactions(ANSWER).expect("init_transactions");
            producer.begin_transaction().expect("begin_transaction");
        }
        Producer { producer, topic: topic.to_owned(), commit, sent: 0 }
    }

    fn send(&mut self, key: Option<&[u8]>, value: Option<&[u8]>, headers: OwnedHeaders, at_ms: i64) {
        let mut record = BaseRecord {
            topic: &self.topic,
            partition: None,
            payload: value,
            key,
            timestamp: Some(at_ms),
            headers: Some(headers),
            delivery_opaque: (),
        };
        while let Err((error, back)) = self.producer.send::<[u8], [u8]>(record) {
            let is_full = matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
            assert!(is_full, "a record was not taken: {error}");
            record = back;
            std::thread::sleep(AGAIN);
        }
        self.sent += 1;
        if self.commit == Commit::Transactions && self.sent.is_multiple_of(TRANSACTION) {
            self.commit();
            self.producer.begin_transaction().expect("begin_transaction");
        }
    }

    fn commit(&self) {
        // The library's own waiting takes a tenth of a second.
        while self.producer.in_flight_count() > 0 {
            std::thread::sleep(AGAIN);
        }
        self.producer.commit_transaction(ANSWER).expect("commit_transaction");
    }

    fn finish(self) {
        match self.commit {
            Commit::Each => self.producer.flush(ANSWER).expect("flush"),
            Commit::Transactions => self.commit(),
        }
        assert_eq!(self.producer.context().0.load(Ordering::Relaxed), self.sent, "not everything arrived");
    }
}

/// A row as `COPY` has written it.
struct Row<'a> {
    published_at_us: i64,
    id: Uuid,
    topic: &'a [u8],
    key: Option<&'a [u8]>,
    content_type: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
}

const COLUMNS: &str = "seq, published_at, id, topic, key, content_type, headers, payload";

impl<'a> Row<'a> {
    /// `None`: the end. The server sends a row at a time.
    fn read(mut row: &'a [u8]) -> Option<Row<'a>> {
        let columns: [u8; 2] = take(&mut row, 2).try_into().expect("two bytes");
        if i16::from_be_bytes(columns) < 0 {
            return None;
        }
        let mut field = || {
            let length: [u8; 4] = take(&mut row, 4).try_into().expect("four bytes");
            // Below zero it is null.
            usize::try_from(i32::from_be_bytes(length)).ok().map(|length| take(&mut row, length))
        };
        field();
        let published_at: [u8; 8] = field().expect("published_at").try_into().expect("eight bytes");
        let id = Uuid::from_slice(field().expect("id")).expect("a UUID");
        let topic = field().expect("topic");
        let (key, content_type) = (field(), field());
        // The events of this benchmark have no headers of their own.
        assert!(field().is_none());
        let published_at_us = i64::from_be_bytes(published_at) + EPOCH_US;
        Some(Row { published_at_us, id, topic, key, content_type, payload: field() })
    }

    fn headers(&self, source: &str) -> OwnedHeaders {
        const TIME: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
        let time = Timestamp::from_microsecond(self.published_at_us).expect("a time");
        let time = TIME.timestamp_to_string(&time);
        let mut id = Uuid::encode_buffer();
        let id = self.id.hyphenated().encode_lower(&mut id);
        let add = |to: OwnedHeaders, key, value: &[u8]| to.insert(Header { key, value: Some(value) });
        let headers = add(OwnedHeaders::new_with_capacity(8), "ce_id", id.as_bytes());
        let headers = add(headers, "ce_source", source.as_bytes());
        let headers = add(headers, "ce_type", self.topic);
        let headers = add(headers, "ce_specversion", b"1.0");
        let headers = add(headers, "ce_time", time.as_bytes());
        let headers = add(headers, "ce_partitionkey", self.key.unwrap_or_default());
        add(headers, "content-type", self.content_type.unwrap_or(b"application/json"))
    }
}

fn take<'a>(from: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = from.split_at(length);
    *from = rest;
    taken
}

/// Hands each row of the log to `each`, by one COPY. Everything happens in the calling thread.
fn for_each_row(url: &str, limit: Option<usize>, mut each: impl FnMut(Bytes)) {
    let limit = limit.map(|limit| format!("LIMIT {limit}")).unwrap_or_default();
    let copy = format!("COPY (SELECT {COLUMNS} FROM dtm.log ORDER BY seq {limit}) TO STDOUT (FORMAT binary)");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
        tokio::spawn(connection);
        let mut rows = pin!(client.copy_out(&copy).await.expect("COPY"));
        let mut is_first = true;
        while let Some(row) = rows.next().await {
            let mut row = row.expect("a row");
            if std::mem::take(&mut is_first) {
                drop(row.split_to(COPY_HEADER_BYTES));
            }
            if !row.is_empty() {
                each(row);
            }
        }
    });
}

/// Produces the log of a database, row by row.
pub async fn produce_log(url: String, source: String, bootstrap: String, topic: &str, commit: Commit) {
    let topic = topic.to_owned();
    let produce = move || {
        let mut producer = Producer::new(&bootstrap, &topic, commit);
        for_each_row(&url, None, |row| {
            let Some(row) = Row::read(&row) else { return };
            producer.send(row.key, row.payload, row.headers(&source), row.published_at_us / 1_000);
        });
        producer.finish();
    };
    tokio::task::spawn_blocking(produce).await.expect("the bare loop");
}

/// A record that is held in memory.
#[derive(Clone)]
struct Held {
    key: Vec<u8>,
    value: Vec<u8>,
    headers: OwnedHeaders,
    at_ms: i64,
}

/// Records of the first events of a log, to be produced without reading anything.
#[derive(Clone)]
pub struct Memory(Vec<Held>);

impl Memory {
    /// Reads them.
    pub async fn of(url: String, source: String) -> Memory {
        let read = move || {
            let mut held = Vec::with_capacity(HELD);
            for_each_row(&url, Some(HELD), |row| {
                let Some(row) = Row::read(&row) else { return };
                held.push(Held {
                    key: row.key.expect("a key").to_vec(),
                    value: row.payload.expect("a payload").to_vec(),
                    headers: row.headers(&source),
                    at_ms: row.published_at_us / 1_000,
                });
            });
            Memory(held)
        };
        tokio::task::spawn_blocking(read).await.expect("rows")
    }

    /// Produces them again and again, until there are so many records.
    pub async fn produce(&self, bootstrap: String, topic: &str, records: usize, commit: Commit) {
        let (held, topic) = (self.clone(), topic.to_owned());
        let produce = move || {
            let mut producer = Producer::new(&bootstrap, &topic, commit);
            for record in held.0.iter().cycle().take(records) {
                let headers = record.headers.clone();
                producer.send(Some(&record.key), Some(&record.value), headers, record.at_ms);
            }
            producer.finish();
        };
        tokio::task::spawn_blocking(produce).await.expect("the bare producer");
    }
}
