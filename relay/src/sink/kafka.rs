// SPDX-License-Identifier: PostgreSQL
//! Kafka: one record an event, by the producers that all subscriptions of a cluster share.
//!
//! Records of one key go into one partition in the order in which they were handed over, as long as one producer takes them.
//! Where that changes, because it has failed or because a topic takes other batches, a sender first waits for all that it has
//! handed to the one before.

use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::{Format, OnDead, Options};
use dtm_core::page::Event;
use dtm_core::topic_template::{KAFKA_TOPIC_BYTES_MAX, TopicTemplate};
use futures_util::future::{BoxFuture, FutureExt as _, OptionFuture};
use rdkafka::producer::BaseRecord;
use slab::Slab;
use tokio::time::Instant;

use super::cloudevents_kafka::{self, Record};
use super::headers::{self, HeaderProblem};
use crate::calls::outcome::{Class, Outcome};
use crate::calls::secrets::Secrets;
use crate::kafka::cluster::{Batches, Cluster};
use crate::kafka::producer::{Generation, Line, NotTaken, Returned, Returns};
use crate::kafka::topics::{Known, Limits};
use crate::kafka::verdict;

/// What could not be handed over for want of room is tried again after this, and then less and less often.
const AGAIN_MIN: Duration = Duration::from_millis(2);
const AGAIN_MAX: Duration = Duration::from_millis(100);

/// Topics of one cluster that the events of a subscription become records of.
pub struct KafkaSink {
    cluster: Arc<Cluster>,
    topic: TopicTemplate,
    /// The topic, where it is the same for all events.
    pub(super) fixed: Option<Arc<str>>,
    format: Format,
    source: String,
    /// Of the subscription: they win over an event's own.
    headers: Vec<(String, String)>,
    /// How many records of one key may be on their way at once.
    pub(super) depth: usize,
}

impl KafkaSink {
    /// `source`: who the events are from.
    pub fn new(
        cluster: Arc<Cluster>,
        topic: TopicTemplate,
        options: &Options,
        secrets: &Secrets,
        source: &str,
    ) -> Result<Self, HeaderProblem> {
        let set = headers::of_subscription(options, secrets)?;
        let headers = set.iter().map(|(name, value)| ((*name).to_owned(), value.text().to_owned())).collect();
        let fixed = topic.fixed().map(Arc::from);
        // A broker that refuses a record takes the next ones all the same; here they are to wait.
        let depth = if options.on_dead == OnDead::Block { 1 } else { usize::MAX };
        let (format, source) = (options.format, source.to_owned());
        Ok(KafkaSink { cluster, topic, fixed, format, source, headers, depth })
    }

    /// The cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The topic of an event's record; an outcome, if it can have none.
    pub fn topic_of(&self, event: &Event) -> Result<Arc<str>, Outcome> {
        if let Some(topic) = &self.fixed {
            return Ok(topic.clone());
        }
        let topic = self.topic.topic_of(&event.topic);
        if topic.len() > KAFKA_TOPIC_BYTES_MAX {
            let error = format!("the name of topic {topic} is longer than {KAFKA_TOPIC_BYTES_MAX} bytes");
            return Err(Outcome::without_answer(Class::Unsendable, error));
        }
        Ok(Arc::from(&*topic))
    }

    /// An event's record; an outcome, if it can have none, or if its topic never takes one of that size.
    pub fn record<'a>(&self, event: &'a Event, topic: &str, limits: Limits) -> Result<Record<'a>, Outcome> {
        let record = cloudevents_kafka::record(event, self.format, &self.source, &self.headers);
        let record = record
            .map_err(|unsendable| Outcome::without_answer(Class::Unsendable, unsendable.to_string()))?;
        let room = self.cluster.settings().queue_bytes();
        if record.size > room {
            let error = format!(
                "a record of {} bytes; queue.buffering.max.kbytes makes room for {room}",
                record.size
            );
            return Err(Outcome::without_answer(Class::Unsendable, error));
        }
        if record.size > limits.message_bytes && !self.cluster.settings().compresses() {
            let (size, most) = (record.size, limits.message_bytes);
            let error = format!("a record of {size} bytes; topic {topic} has max.message.bytes = {most}");
            return Err(Outcome::without_answer(Class::Unsendable, error));
        }
        Ok(record)
    }
}

/// A record of an event, for librdkafka.
pub fn base_record<'a>(
    topic: &'a str,
    event: &'a Event,
    record: &'a mut Record<'_>,
) -> BaseRecord<'a, [u8], [u8]> {
    BaseRecord {
        topic,
        partition: None,
        payload: record.value.as_deref(),
        key: event.key.as_deref().map(str::as_bytes),
        timestamp: Some(event.published_at_us / 1_000),
        headers: record.headers.take(),
        delivery_opaque: (),
    }
}

/// A record on its way.
struct Slot<T> {
    item: T,
    topic: Arc<str>,
}

/// The producer that a sender has handed its records to.
struct Route {
    batches: Batches,
    line: Arc<Line>,
    generation: Arc<Generation>,
}

/// Records of one pipeline that are on their way.
pub struct KafkaSender<T> {
    sink: Arc<KafkaSink>,
    slots: Slab<Slot<T>>,
    returns: Arc<Returns>,
    route: Option<Route>,
    /// The next one, which could not be handed over yet. Nothing overtakes it.
    next: Option<T>,
    /// What has ended without the cluster having been asked.
    ended: Vec<(T, Outcome)>,
    /// So many records go in batches of their own, since something among them was refused.
    single: usize,
    look: Option<BoxFuture<'static, Known>>,
    /// The pause before the next one is tried again.
    again: Duration,
    /// The least that a topic takes of those that were met, in bytes of a batch: topics that take more wait for no other producer.
    least_bytes: usize,
    /// Nothing may be handed over now.
    is_held: bool,
}

/// What became of a record that was to be handed over.
enum Handed<T> {
    /// It is on its way.
    Sent,
    /// Something else has to come first.
    Later(T),
    /// It has ended.
    Ended(T, Outcome),
}

impl<T: AsRef<Event> + Send + 'static> KafkaSender<T> {
    /// None yet.
    pub fn new(sink: Arc<KafkaSink>) -> Self {
        KafkaSender {
            sink,
            slots: Slab::new(),
            returns: Arc::default(),
            route: None,
            next: None,
            ended: Vec::new(),
            single: 0,
            look: None,
            again: AGAIN_MIN,
            least_bytes: usize::MAX,
            is_held: false,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len() + self.ended.len() + usize::from(self.next.is_some())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether another one may be handed over.
    pub fn has_room(&self) -> bool {
        // What has ended is told before anything of its key follows.
        self.next.is_none() && self.ended.is_empty()
    }

    /// Hands one over.
    pub fn send(&mut self, item: T) {
        match self.hand_over(item) {
            Handed::Sent => {}
            Handed::Later(item) => self.next = Some(item),
            Handed::Ended(item, outcome) => self.ended.push((item, outcome)),
        }
    }

    fn hand_over(&mut self, item: T) -> Handed<T> {
        if self.is_held {
            return Handed::Ended(item, Outcome::without_answer(Class::Withdrawn, "the lease is over"));
        }
        let now = Instant::now();
        let event = item.as_ref();
        let topic = match self.sink.topic_of(event) {
            Ok(topic) => topic,
            Err(outcome) => return Handed::Ended(item, outcome),
        };
        let topics = self.sink.cluster.topics();
        let limits = match topics.get(&topic, now) {
            Some(Ok(limits)) => limits,
            Some(Err(why)) => {
                return Handed::Ended(item, Outcome::without_answer(Class::Unsent, &*why));
            }
            None => {
                if self.look.is_none() {
                    self.look = Some(topics.clone().look(topic.to_string()).boxed());
                }
                return Handed::Later(item);
            }
        };
        let mut record = match self.sink.record(event, &topic, limits) {
            Ok(record) => record,
            Err(outcome) => return Handed::Ended(item, outcome),
        };
        self.least_bytes = match &self.sink.fixed {
            Some(_) => limits.message_bytes,
            None => limits.message_bytes.min(self.least_bytes),
        };
        // Compressed it may be small enough: the broker says, and says it of this one alone.
        let batches = match self.single > 0 || record.size > limits.message_bytes {
            true => Batches::Single,
            false => Batches::Bytes(self.least_bytes.min(self.sink.cluster.settings().batch_bytes())),
        };
        let Some(generation) = self.route(batches, now) else { return Handed::Later(item) };
        let entry = self.slots.vacant_key();
        match generation.send(base_record(&topic, event, &mut record), &self.returns, entry) {
            Ok(()) => {
                drop(record);
                self.slots.insert(Slot { item, topic });
                self.again = AGAIN_MIN;
                Handed::Sent
            }
            Err(NotTaken::Never(code)) => {
                drop(record);
                Handed::Ended(item, verdict::of_record(&topic, code, true))
            }
            Err(NotTaken::Full | NotTaken::Failed) => {
                drop(record);
                Handed::Later(item)
            }
        }
    }

    /// The producer for the next record; `None`: what was handed to another one is waited for, or there is none yet.
    fn route(&mut self, batches: Batches, now: Instant) -> Option<Arc<Generation>> {
        let usable = |route: &Route| route.batches == batches && !route.generation.has_failed();
        if self.route.as_ref().is_none_or(|route| !usable(route)) {
            if !self.slots.is_empty() {
                return None;
            }
            self.route = None;
            let line = self.sink.cluster.line(batches);
            let generation = line.current(now)?;
            self.route = Some(Route { batches, line, generation });
        }
        self.route.as_ref().map(|route| route.generation.clone())
    }

    /// Waits for records that have arrived or come back, or until there is room again.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        loop {
            if !self.ended.is_empty() {
                return std::mem::take(&mut self.ended);
            }
            let is_waiting = self.next.is_some() && self.look.is_none();
            tokio::select! {
                returned = self.returns.take() => self.returned(returned),
                Some(_) = OptionFuture::from(self.look.as_mut()) => self.look = None,
                () = tokio::time::sleep(self.again), if is_waiting => {
                    self.again = (2 * self.again).min(AGAIN_MAX);
                }
            }
            let waited = self.next.take();
            if let Some(next) = waited {
                self.send(next);
                if self.next.is_none() {
                    return std::mem::take(&mut self.ended);
                }
            }
        }
    }

    fn returned(&mut self, returned: Vec<Returned>) {
        let is_single = self.route.as_ref().is_some_and(|route| route.batches == Batches::Single);
        for (number, error) in returned {
            let all = self.slots.len();
            let Some(Slot { item, topic }) = self.slots.try_remove(number) else { continue };
            let outcome = match error {
                None => Outcome::accepted(),
                Some(code) => verdict::of_record(&topic, code, is_single),
            };
            match outcome.class {
                Class::Accepted | Class::Unsendable if is_single => {
                    self.single = self.single.saturating_sub(1)
                }
                Class::Accepted => {}
                _ => {
                    // Whatever it was, it is not to trouble those that share the producer: until all is well again, what is
                    // sent goes by one for troubled senders.
                    if !is_single && error.is_some_and(verdict::is_of_broker) {
                        self.single = self.single.max(all);
                    }
                    self.give_up_route();
                }
            }
            let has_arrived = outcome.class == Class::Accepted;
            self.ended.push((item, outcome));
            // The one that waits may be a later one of its key: it is not to go before what has come back.
            if let Some(next) = self.next.take_if(|_| !has_arrived) {
                let outcome = Outcome::without_answer(Class::Withdrawn, "one before it came back");
                self.ended.push((next, outcome));
            }
        }
    }

    /// Whether records may be handed over. If not, what is not on its way to a broker yet comes back: somebody else may deliver
    /// it by now, and later ones of its key.
    pub fn hold(&mut self, is_held: bool) {
        if is_held && !self.is_held && !self.slots.is_empty() {
            self.give_up_route();
        }
        self.is_held = is_held;
    }

    /// What was handed over and is not on its way to a broker yet comes back.
    fn give_up_route(&mut self) {
        if let Some(route) = &self.route {
            route.line.retire(&route.generation, Instant::now());
        }
    }
}

impl<T> Drop for KafkaSender<T> {
    /// What is given up is not to be sent at some time.
    fn drop(&mut self) {
        if let Some(route) = self.route.as_ref().filter(|_| !self.slots.is_empty()) {
            route.line.retire(&route.generation, Instant::now());
        }
    }
}

#[cfg(test)]
#[path = "kafka_tests.rs"]
mod tests;
