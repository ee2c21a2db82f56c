// SPDX-License-Identifier: PostgreSQL
//! A transactional producer on a thread of its own, for its calls block.
//!
//! Whatever happens in a transaction that is not a clean end leaves it open which of the two ends it had: then the producer
//! is given up, and its successor, which fences it, finds out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::Message as _;
use rdkafka::producer::{
    BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer,
};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::position::{self, Entry, Position};
use super::verdict;
use crate::calls::outcome::{Class, Outcome};

/// The broker ends a transaction that is open for longer.
const TRANSACTION_MS: &str = "30000";
/// For the coordinator to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks whether there is room, or whether all is delivered.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// For what is taken back to come back.
const PURGED_WITHIN: Duration = Duration::from_secs(5);
const PURGE_AGAIN: Duration = Duration::from_millis(20);

/// Why a transaction was not committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotCommitted {
    /// These of its records cannot be sent, by number; nothing was written.
    Unsendable(Vec<(usize, Outcome)>),
    /// These of its records are refused by a broker; nothing was written, and the producer is of no more use.
    Refused(Vec<(usize, Outcome)>),
    /// Some of them cannot be; a producer of single records can tell which. Nothing was written.
    SomeRefused,
    /// Another producer of the same name has begun.
    Fenced,
    /// It is not known whether it was committed, or it was not: the producer is of no more use, and its successor knows.
    Unknown(String),
}

/// What is done in a transaction: it hands records to the producer.
pub type Write = Box<dyn FnOnce(&Open<'_>) -> Result<(), NotCommitted> + Send>;

struct Job {
    write: Write,
    position: Position,
    done: oneshot::Sender<Result<(), NotCommitted>>,
}

/// A producer that has begun.
pub struct Transactions {
    jobs: mpsc::Sender<Job>,
}

impl Transactions {
    /// Begins under a name, after which no other producer of that name commits anything. Answers how far its predecessor has
    /// come, too. `config`: of a producer without a name.
    pub async fn begin(
        config: ClientConfig,
        connecting: ClientConfig,
        name: String,
    ) -> Result<(Self, Option<Position>), String> {
        let (jobs, work) = mpsc::channel::<Job>();
        let (begun, answer) = oneshot::channel();
        // It ends when it is dropped, after the call that it is in.
        std::thread::spawn(move || {
            let producer = match Named::begin(config, &connecting, name) {
                Ok((producer, position)) => {
                    if begun.send(Ok(position)).is_err() {
                        return;
                    }
                    producer
                }
                Err(error) => {
                    let _ = begun.send(Err(error));
                    return;
                }
            };
            for Job { write, position, done } in work {
                let _ = done.send(producer.transaction(write, &Entry::Position(position)));
            }
        });
        let position = answer.await.map_err(|_| "the producer's thread has ended".to_owned())??;
        Ok((Transactions { jobs }, position))
    }

    /// Writes records and a position, all or nothing.
    pub async fn commit(&self, write: Write, position: Position) -> Result<(), NotCommitted> {
        let (done, answer) = oneshot::channel();
        let gone = || NotCommitted::Unknown("the producer's thread has ended".to_owned());
        self.jobs.send(Job { write, position, done }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Takes note of what was not delivered.
struct Failures {
    servers: String,
    /// Each record is in a batch of its own.
    is_single: bool,
    /// The transaction cannot be committed any more.
    has_failed: AtomicBool,
    refused: Mutex<Vec<(usize, Outcome)>>,
    /// Why the first record failed whose topic cannot be written to.
    unwritten: Mutex<Option<String>>,
}

impl ClientContext for Failures {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(servers = self.servers, "librdkafka: {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(Code::AllBrokersDown) => {
                tracing::warn!(servers = self.servers, "no broker can be reached: {reason}");
            }
            Some(Code::Authentication | Code::SSL | Code::SaslAuthenticationFailed) => {
                tracing::error!(servers = self.servers, "{error}: {reason}");
            }
            _ => tracing::debug!(servers = self.servers, "{error}: {reason}"),
        }
    }
}

impl Failures {
    fn failed(&self, number: usize, topic: &str, code: Code) {
        let outcome = verdict::of_record(topic, code, true);
        if verdict::is_of_broker(code) {
            tracing::debug!(servers = self.servers, number, "not written: {outcome}");
        }
        if outcome.class == Class::Unsendable && number != OURS {
            self.refused().push((number, outcome));
        } else if outcome.class == Class::Unsent {
            self.unwritten().get_or_insert_with(|| outcome.to_string());
        }
        self.has_failed.store(true, Ordering::Release);
    }

    fn begin(&self) {
        self.refused().clear();
        self.unwritten().take();
        self.has_failed.store(false, Ordering::Release);
    }

    /// Why something was not written, in the broker's words if there are any.
    fn why(&self, otherwise: String) -> String {
        self.unwritten().take().unwrap_or(otherwise)
    }

    fn unwritten(&self) -> MutexGuard<'_, Option<String>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, Vec<(usize, Outcome)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProducerContext for Failures {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        if let Err((error, message)) = result {
            let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
            self.failed(number, message.topic(), code);
        }
    }
}

/// The number of a record that is none of the caller's.
const OURS: usize = usize::MAX;

struct Named {
    producer: ThreadedProducer<Failures>,
    name: String,
}

impl Named {
    fn begin(
        mut config: ClientConfig,
        connecting: &ClientConfig,
        name: String,
    ) -> Result<(Self, Option<Position>), String> {
        config
            .set("transactional.id", &name)
            .set("transaction.timeout.ms", TRANSACTION_MS)
            // It follows from the transaction's: a record that is late ends the transaction, and leaves no gap.
            .remove("message.timeout.ms");
        let context = Failures {
            servers: connecting.get("bootstrap.servers").unwrap_or_default().to_owned(),
            is_single: config.get("batch.num.messages") == Some("1"),
            has_failed: AtomicBool::new(false),
            refused: Mutex::default(),
            unwritten: Mutex::default(),
        };
        let producer: ThreadedProducer<Failures> =
            config.create_with_context(context).map_err(|error| error.to_string())?;
        producer.init_transactions(ANSWER_WITHIN).map_err(|error| error.to_string())?;
        let named = Named { producer, name };
        let marker = Uuid::new_v4();
        let begun = named.transaction(Box::new(|_| Ok(())), &Entry::Begin { begin: marker });
        begun.map_err(|problem| format!("the first transaction was not committed: {problem:?}"))?;
        let position = position::read(connecting, &named.name, marker)?;
        Ok((named, position))
    }

    fn transaction(&self, write: Write, entry: &Entry) -> Result<(), NotCommitted> {
        let failures: &Failures = self.producer.context();
        failures.begin();
        self.producer.begin_transaction().map_err(|error| unknown(&error))?;
        let ended = write(&Open { producer: &self.producer })
            .and_then(|()| self.send_position(entry))
            .and_then(|()| {
                self.delivered()?;
                self.producer.commit_transaction(ANSWER_WITHIN).map_err(|error| unknown(&error))
            });
        let problem = match ended {
            Ok(()) => return Ok(()),
            Err(NotCommitted::Fenced) => return Err(NotCommitted::Fenced),
            Err(NotCommitted::Unknown(why)) => NotCommitted::Unknown(failures.why(why)),
            Err(problem) => problem,
        };
        self.purge();
        // Only after a clean abort it is certain that nothing was written.
        self.producer.abort_transaction(ANSWER_WITHIN).map_err(|error| unknown(&error))?;
        let refused = std::mem::take(&mut *failures.refused());
        Err(match refused.is_empty() {
            true => problem,
            false if failures.is_single => NotCommitted::Refused(refused),
            false => NotCommitted::SomeRefused,
        })
    }

    /// Waits until nothing is on its way. The producer's own way to wait looks only ten times a second, and goes on waiting for
    /// what is no longer sent since something else has failed.
    fn delivered(&self) -> Result<(), NotCommitted> {
        let failures: &Failures = self.producer.context();
        let until = Instant::now() + ANSWER_WITHIN;
        while self.producer.in_flight_count() > 0 && Instant::now() < until {
            if failures.has_failed.load(Ordering::Acquire) {
                return Err(NotCommitted::Unknown("a record was not delivered".into()));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// Takes back what is on its way: an abort would wait for it, and it is no longer sent.
    fn purge(&self) {
        let until = Instant::now() + PURGED_WITHIN;
        while self.producer.in_flight_count() > 0 && Instant::now() < until {
            self.producer.purge(PurgeConfig::default().queue().inflight());
            std::thread::sleep(PURGE_AGAIN);
        }
    }

    fn send_position(&self, entry: &Entry) -> Result<(), NotCommitted> {
        // A topic that is compacted keeps the last record of a key: a beginning must not take the place of a position.
        let key = match entry {
            Entry::Position(_) => self.name.clone(),
            Entry::Begin { .. } => position::beginning_of(&self.name),
        };
        let value = serde_json::to_vec(entry).map_err(|error| NotCommitted::Unknown(error.to_string()))?;
        let record = BaseRecord {
            topic: position::TOPIC,
            partition: Some(0),
            payload: Some(value.as_slice()),
            key: Some(key.as_bytes()),
            timestamp: None,
            headers: None,
            delivery_opaque: (),
        };
        Open { producer: &self.producer }.send(record, OURS)
    }
}

/// A transaction that is open.
pub struct Open<'a> {
    producer: &'a ThreadedProducer<Failures>,
}

impl Open<'_> {
    /// Hands over a record. Where it is refused, that is known by this number.
    pub fn send(&self, record: BaseRecord<'_, [u8], [u8]>, number: usize) -> Result<(), NotCommitted> {
        let BaseRecord { topic, partition, payload, key, timestamp, headers, .. } = record;
        let mut record =
            BaseRecord { topic, partition, payload, key, timestamp, headers, delivery_opaque: number };
        let failures: &Failures = self.producer.context();
        let until = Instant::now() + ANSWER_WITHIN;
        loop {
            let Err((error, back)) = self.producer.send(record) else { return Ok(()) };
            match error.rdkafka_error_code() {
                Some(Code::QueueFull)
                    if failures.has_failed.load(Ordering::Acquire) || Instant::now() >= until =>
                {
                    return Err(unknown(&error));
                }
                Some(Code::QueueFull) => {
                    std::thread::sleep(LOOK_AGAIN);
                    record = back;
                }
                code => {
                    failures.failed(number, topic, code.unwrap_or(Code::Unknown));
                    return Err(unknown(&error));
                }
            }
        }
    }
}

fn unknown(error: &KafkaError) -> NotCommitted {
    let code = match error {
        KafkaError::Transaction(error) => Some(error.code()),
        other => other.rdkafka_error_code(),
    };
    match code {
        Some(Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch) => NotCommitted::Fenced,
        _ => NotCommitted::Unknown(error.to_string()),
    }
}
