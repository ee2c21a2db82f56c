// SPDX-License-Identifier: PostgreSQL
//! Why a cluster does not answer: a wrong password, an unknown certificate, a host without an address. Only a client that is
//! polled is told.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, Producer as _, ProducerContext};
use rdkafka::types::RDKafkaErrorCode as Code;

/// How long it is tried.
const TRIED_FOR: Duration = Duration::from_secs(2);
/// So many events are looked at.
const EVENTS: usize = 20;
/// Of librdkafka's words so many characters are repeated.
const CHARS_MAX: usize = 400;

/// The first problem that says more than that no broker can be reached.
#[derive(Default)]
struct First(Mutex<Option<String>>);

impl ClientContext for First {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!("librdkafka: {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!("librdkafka: {error}: {reason}");
        if error.rdkafka_error_code() != Some(Code::AllBrokersDown) {
            let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert_with(|| reason.chars().take(CHARS_MAX).collect());
        }
    }
}

impl ProducerContext for First {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

/// Tries to connect, and answers what stands in the way, in librdkafka's words. Blocks for two seconds at the most.
pub fn of(config: &ClientConfig) -> Option<String> {
    let producer: BaseProducer<First> = config.create_with_context(First::default()).ok()?;
    let _ = producer.client().fetch_metadata(None, TRIED_FOR);
    for _ in 0..EVENTS {
        producer.poll(Duration::from_millis(1));
    }
    let mut first = producer.context().0.lock().unwrap_or_else(PoisonError::into_inner);
    first.take()
}
