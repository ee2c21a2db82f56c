// SPDX-License-Identifier: PostgreSQL
//! PostgreSQL: a function is called for each event, in one transaction with its receipt: exactly once, however often it is sent.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::Options;
use dtm_core::page::Event;
use futures_util::future::{BoxFuture, FutureExt as _};

use super::cloudevents_json;
use crate::calls::outcome::{Class, Outcome};
use crate::postgres::target::{Batch, Function, Target};
use crate::postgres::verdict::withdrawn;

/// Events of one transaction: a subtransaction each, of which a snapshot keeps track of 64.
const BATCH_EVENTS: usize = 60;
/// Bytes of one transaction.
const BATCH_BYTES: usize = 4 << 20;
/// Events that wait for the transaction before theirs.
const WAITING_MAX: usize = 4 * BATCH_EVENTS;

/// A function that gets the events of a subscription.
pub struct PostgresSink {
    target: Arc<Target>,
    function: Function,
    /// The subscription's name.
    consumer: String,
    source: String,
    timeout: Duration,
}

impl PostgresSink {
    /// `consumer`: whose receipts are written; `source`: who the events are from.
    pub fn new(
        target: Arc<Target>,
        function: Function,
        consumer: &str,
        options: &Options,
        source: &str,
    ) -> Self {
        let (consumer, source) = (consumer.to_owned(), source.to_owned());
        PostgresSink { target, function, consumer, source, timeout: options.timeout }
    }

    /// Where it is.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// What is called.
    pub fn function(&self) -> &Function {
        &self.function
    }

    /// One transaction; where it fails as a whole, one for each event, to find out whose fault it is.
    async fn send<T: AsRef<Event>>(&self, items: Vec<T>) -> Vec<(T, Outcome)> {
        let sent = self.try_all(&items).await;
        let outcomes = match sent {
            Ok(outcomes) => outcomes,
            Err(outcome) if items.len() == 1 || outcome.class == Class::Unsent => vec![outcome; items.len()],
            Err(_) => self.one_by_one(&items).await,
        };
        items.into_iter().zip(outcomes).collect()
    }

    async fn try_all<T: AsRef<Event>>(&self, items: &[T]) -> Result<Vec<Outcome>, Outcome> {
        let mut outcomes = Vec::with_capacity(items.len());
        let (mut batch, mut failed) = (Batch::default(), HashSet::new());
        for item in items {
            let event = item.as_ref();
            if event.key.as_ref().is_some_and(|key| failed.contains(key)) {
                outcomes.push(Some(withdrawn()));
                continue;
            }
            match cloudevents_json::envelope(event, &self.source, |_, _| {}) {
                Ok(text) => {
                    batch.ids.push(event.id);
                    batch.keys.push(event.key.as_ref().map(ToString::to_string));
                    batch.events.push(text);
                    outcomes.push(None);
                }
                Err(unsendable) => {
                    failed.extend(event.key.clone());
                    outcomes.push(Some(Outcome::without_answer(Class::Unsendable, unsendable.to_string())));
                }
            }
        }
        let mut called = if batch.ids.is_empty() {
            Vec::new()
        } else {
            self.target.call_events(&self.consumer, &self.function, &batch, self.timeout).await?
        }
        .into_iter();
        let lost = || Outcome::without_answer(Class::Failed, "no answer");
        Ok(outcomes.into_iter().map(|known| known.or_else(|| called.next()).unwrap_or_else(lost)).collect())
    }

    async fn one_by_one<T: AsRef<Event>>(&self, items: &[T]) -> Vec<Outcome> {
        let (mut outcomes, mut failed) = (Vec::with_capacity(items.len()), HashSet::new());
        for item in items {
            let key = &item.as_ref().key;
            if key.as_ref().is_some_and(|key| failed.contains(key)) {
                outcomes.push(withdrawn());
                continue;
            }
            let outcome = match self.try_all(std::slice::from_ref(item)).await {
                Ok(mut outcomes) => outcomes.pop().unwrap_or_else(withdrawn),
                Err(outcome) => outcome,
            };
            if outcome.class == Class::Unsent {
                // It is away by now: each of the others would wait for it in turn.
                outcomes.resize(items.len(), outcome);
                break;
            }
            if outcome.class != Class::Accepted {
                failed.extend(key.clone());
            }
            outcomes.push(outcome);
        }
        outcomes
    }
}

/// What one pipeline has on its way: one transaction, and what waits for the next.
pub struct PostgresSender<T> {
    sink: Arc<PostgresSink>,
    waiting: VecDeque<T>,
    sent: Option<BoxFuture<'static, Vec<(T, Outcome)>>>,
    in_flight: usize,
    is_held: bool,
}

impl<T: AsRef<Event> + Send + Sync + 'static> PostgresSender<T> {
    /// Nothing yet.
    pub fn new(sink: Arc<PostgresSink>) -> Self {
        PostgresSender { sink, waiting: VecDeque::new(), sent: None, in_flight: 0, is_held: false }
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.in_flight
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it takes another event.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX
    }

    /// Whether anything may be sent.
    pub fn hold(&mut self, is_held: bool) {
        self.is_held = is_held;
    }

    /// Takes an event.
    pub fn send(&mut self, item: T) {
        self.waiting.push_back(item);
    }

    fn begin(&mut self) {
        let (mut items, mut bytes) = (Vec::new(), 0);
        while let Some(item) = self.waiting.front()
            && items.len() < BATCH_EVENTS
            && (items.is_empty() || bytes + item.as_ref().size() <= BATCH_BYTES)
        {
            bytes += item.as_ref().size();
            items.extend(self.waiting.pop_front());
        }
        if items.is_empty() {
            return;
        }
        self.in_flight = items.len();
        let sink = self.sink.clone();
        self.sent = Some(async move { sink.send(items).await }.boxed());
    }

    /// Waits for a transaction that has ended; for ever if there is nothing to send.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        if self.sent.is_none() && !self.is_held {
            self.begin();
        }
        let Some(sent) = &mut self.sent else { return std::future::pending().await };
        let mut answers = sent.await;
        self.sent = None;
        self.in_flight = 0;
        self.take_back(&mut answers);
        answers
    }

    /// What waits and is of a key that has failed comes back too: it must not arrive before what failed goes again.
    fn take_back(&mut self, answers: &mut Vec<(T, Outcome)>) {
        let failed = answers.iter().filter(|(_, outcome)| outcome.class != Class::Accepted);
        let failed: HashSet<_> = failed.filter_map(|(item, _)| item.as_ref().key.clone()).collect();
        let has_failed = |item: &T| item.as_ref().key.as_ref().is_some_and(|key| failed.contains(key));
        let (back, waiting): (VecDeque<T>, _) = self.waiting.drain(..).partition(has_failed);
        self.waiting = waiting;
        answers.extend(back.into_iter().map(|item| (item, withdrawn())));
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::postgres::settings::TargetSettings;
    use crate::source::settings::{Settings, ThisMachine};

    struct Item(Event);

    impl AsRef<Event> for Item {
        fn as_ref(&self) -> &Event {
            &self.0
        }
    }

    fn event(seq: i64, key: Option<&str>) -> Item {
        Item(Event {
            seq,
            published_at_us: seq,
            id: Uuid::from_u128(seq as u128),
            topic: "t".into(),
            key: key.map(Into::into),
            content_type: "application/json".into(),
            headers: None,
            payload: None,
        })
    }

    #[tokio::test]
    async fn what_waits_comes_back_with_an_event_of_its_key_that_failed() {
        let settings = Settings::parse("postgres://u@h/d", &ThisMachine).unwrap();
        let settings = TargetSettings { settings, connections: 1, functions: None };
        let target = Arc::new(Target::new("stock", &settings).unwrap());
        let function = Function { schema: "public".into(), name: "f".into() };
        let sink = PostgresSink::new(target, function, "s", &Options::default(), "/s");
        let mut sender = PostgresSender::new(Arc::new(sink));
        let sent = vec![
            (event(1, Some("a")), Outcome::accepted()),
            (event(2, Some("b")), Outcome::without_answer(Class::Failed, "x")),
            (event(3, None), Outcome::without_answer(Class::Failed, "x")),
        ];
        sender.in_flight = sent.len();
        sender.sent = Some(std::future::ready(sent).boxed());
        for (seq, key) in [(4, Some("b")), (5, Some("a")), (6, None), (7, Some("b"))] {
            sender.send(event(seq, key));
        }
        let answers = sender.answers().await;
        let found: Vec<_> = answers.iter().map(|(item, outcome)| (item.0.seq, outcome.class)).collect();
        let (failed, withdrawn) = (Class::Failed, Class::Withdrawn);
        assert_eq!(found, [(1, Class::Accepted), (2, failed), (3, failed), (4, withdrawn), (7, withdrawn)]);
        assert_eq!(sender.waiting.iter().map(|item| item.0.seq).collect::<Vec<_>>(), [5, 6]);
    }
}
