// SPDX-License-Identifier: PostgreSQL
//! One producer that many senders share, and its successors.
//!
//! An idempotent producer that lost a record cannot go on without a gap: with `enable.gapless.guarantee` it stops. Then all
//! that it has not delivered comes back to its senders, who hand it to its successor in the same order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::producer::{
    BaseRecord, DeliveryResult, NoCustomPartitioner, Producer as _, ProducerContext, PurgeConfig,
    ThreadedProducer,
};
use rdkafka::types::RDKafkaErrorCode as Code;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::verdict;

/// What is on its way to a broker when a producer stops is waited for, longer than its requests last: it may arrive.
const LAST_ANSWERS: Duration = Duration::from_secs(35);
/// For senders to let go of a producer that has stopped.
const LET_GO: Duration = Duration::from_secs(60);
/// Between producers that are answered nothing.
const AGAIN_MIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// What came of records, for one sender.
#[derive(Default)]
pub struct Returns {
    results: Mutex<Vec<Returned>>,
    some: Notify,
}

/// What came of a record: its sender's number, and an error.
pub type Returned = (usize, Option<Code>);

impl Returns {
    fn push(&self, returned: Returned) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        results.push(returned);
        if results.len() == 1 {
            self.some.notify_one();
        }
    }

    /// Waits for results. Nothing is lost if it is not waited for to the end.
    pub async fn take(&self) -> Vec<Returned> {
        loop {
            let results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
            if !results.is_empty() {
                return results;
            }
            self.some.notified().await;
        }
    }
}

/// Whom a record comes back to.
pub struct Ticket {
    returns: Arc<Returns>,
    number: usize,
}

/// Logs of a client that are of interest only if something else fails.
pub struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!("librdkafka: {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!("librdkafka: {error}: {reason}");
    }
}

impl ConsumerContext for Quiet {}

/// What a producer tells.
pub struct Context {
    cluster: Arc<str>,
    /// Brokers have taken or judged something.
    answered: AtomicBool,
    /// It delivers nothing more.
    failed: AtomicBool,
}

impl ClientContext for Context {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(cluster = &*self.cluster, "librdkafka: {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let cluster = &*self.cluster;
        match error.rdkafka_error_code() {
            Some(Code::AllBrokersDown) => {
                tracing::warn!(
                    cluster,
                    "no broker can be reached; what is on its way waits for them: {reason}"
                );
            }
            Some(Code::Fatal) => {
                self.failed.store(true, Ordering::Release);
                tracing::info!(cluster, "a producer has stopped, another one goes on: {reason}");
            }
            Some(Code::Authentication | Code::SSL | Code::SaslAuthenticationFailed) => {
                tracing::error!(cluster, "{error}: {reason}");
            }
            _ => tracing::debug!(cluster, "{error}: {reason}"),
        }
    }
}

impl ProducerContext<NoCustomPartitioner> for Context {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        let error = match result {
            Ok(_) => None,
            Err((error, _)) => {
                self.failed.store(true, Ordering::Release);
                Some(error.rdkafka_error_code().unwrap_or(Code::Unknown))
            }
        };
        if error.is_none_or(verdict::is_judgement) && !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
        ticket.returns.push((ticket.number, error));
    }
}

/// A producer, until it fails.
pub struct Generation {
    producer: ThreadedProducer<Context>,
}

/// A record that was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// There is no room for it now.
    Full,
    /// By this producer no more.
    Failed,
    /// It never will be.
    Never(Code),
}

impl Generation {
    fn new(config: &ClientConfig, cluster: Arc<str>) -> Result<Self, KafkaError> {
        let context = Context { cluster, answered: AtomicBool::new(false), failed: AtomicBool::new(false) };
        Ok(Generation { producer: config.create_with_context(context)? })
    }

    fn context(&self) -> &Context {
        self.producer.context()
    }

    /// Whether it delivers nothing more.
    pub fn has_failed(&self) -> bool {
        self.context().failed.load(Ordering::Acquire)
    }

    /// Takes a record; it comes back to `returns` under this number.
    pub fn send(
        &self,
        record: BaseRecord<'_, [u8], [u8]>,
        returns: &Arc<Returns>,
        number: usize,
    ) -> Result<(), NotTaken> {
        let ticket = Box::new(Ticket { returns: returns.clone(), number });
        let BaseRecord { topic, partition, payload, key, timestamp, headers, .. } = record;
        let record =
            BaseRecord { topic, partition, payload, key, timestamp, headers, delivery_opaque: ticket };
        self.producer.send(record).map_err(|(error, _)| match error.rdkafka_error_code() {
            Some(Code::QueueFull) => NotTaken::Full,
            Some(
                code @ (Code::MessageSizeTooLarge
                | Code::InvalidArgument
                | Code::UnknownTopic
                | Code::UnknownPartition),
            ) => NotTaken::Never(code),
            _ => {
                self.context().failed.store(true, Ordering::Release);
                NotTaken::Failed
            }
        })
    }
}

/// One producer after the other, of the same kind.
pub struct Line {
    config: ClientConfig,
    cluster: Arc<str>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Option<Arc<Generation>>,
    /// How many in a row were answered nothing.
    barren: u32,
    not_before: Option<Instant>,
}

impl Line {
    /// No producer yet.
    pub fn new(config: ClientConfig, cluster: Arc<str>) -> Self {
        Line { config, cluster, state: Mutex::default() }
    }

    /// The producer to send by; `None`: not yet.
    pub fn current(&self, now: Instant) -> Option<Arc<Generation>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &state.current {
            if !current.has_failed() {
                return Some(current.clone());
            }
            let failed = current.clone();
            self.replace(&mut state, failed, now);
        }
        if state.not_before.is_some_and(|at| at > now) {
            return None;
        }
        match Generation::new(&self.config, self.cluster.clone()) {
            Ok(made) => {
                let made = Arc::new(made);
                state.current = Some(made.clone());
                Some(made)
            }
            Err(error) => {
                tracing::error!(cluster = &*self.cluster, "no producer can be made: {error}");
                state.not_before = Some(now + AGAIN_MAX);
                None
            }
        }
    }

    /// A producer is to deliver nothing more: what it has not delivered comes back.
    pub fn retire(&self, generation: &Arc<Generation>, now: Instant) {
        generation.context().failed.store(true, Ordering::Release);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, generation)) {
            self.replace(&mut state, generation.clone(), now);
        }
    }

    fn replace(&self, state: &mut State, failed: Arc<Generation>, now: Instant) {
        state.current = None;
        state.barren = match failed.context().answered.load(Ordering::Relaxed) {
            true => 0,
            false => state.barren.saturating_add(1),
        };
        let pause = AGAIN_MIN.saturating_mul(1 << state.barren.min(7)).min(AGAIN_MAX);
        state.not_before = (state.barren > 0).then(|| now + pause);
        let cluster = self.cluster.clone();
        // A thread of its own: it blocks.
        std::thread::spawn(move || bury(failed, &cluster));
    }
}

/// Ends a producer: what it has queued comes back at once, what is on its way when it is known whether it has arrived.
fn bury(generation: Arc<Generation>, cluster: &str) {
    let producer = &generation.producer;
    producer.purge(PurgeConfig::default().queue());
    let waited = |until: std::time::Instant, done: &dyn Fn() -> bool| {
        while !done() {
            if std::time::Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    };
    let is_empty = || producer.in_flight_count() == 0;
    if !waited(std::time::Instant::now() + LAST_ANSWERS, &is_empty) {
        producer.purge(PurgeConfig::default().queue().inflight());
        waited(std::time::Instant::now() + LAST_ANSWERS, &is_empty);
    }
    // Whoever drops it last waits for its thread.
    if !waited(std::time::Instant::now() + LET_GO, &|| Arc::strong_count(&generation) == 1) {
        tracing::debug!(cluster, "a producer that has stopped is held still");
    }
}
