// SPDX-License-Identifier: PostgreSQL
//! Kafka, exactly once: batches of events in transactions, each with how far it comes.

use std::sync::Arc;

use dtm_core::page::Event;
use tokio::time::Instant;

use super::kafka::{KafkaSink, base_record};
use crate::calls::outcome::Outcome;
use crate::kafka::position::{self, Position};
use crate::kafka::topics::Limits;
use crate::kafka::transactions::{NotCommitted, Open, Transactions};

/// The topic of an event's record and what it takes, or why it can have no record.
type Target = Result<(Arc<str>, Limits), Outcome>;

/// Writes batches of one subscription, or shard of one.
pub struct OnceWriter {
    sink: Arc<KafkaSink>,
    transactions: Transactions,
}

impl OnceWriter {
    /// Begins, which ends whatever another one of this name has begun. Answers how far the last one has come, too. `is_single`:
    /// each record goes in a batch of its own, so that it is known which one is refused.
    pub async fn begin(
        sink: Arc<KafkaSink>,
        name: &str,
        is_single: bool,
    ) -> Result<(Self, Option<Position>), String> {
        let cluster = sink.cluster();
        let topics = cluster.topics();
        let positions = match topics.clone().look(position::TOPIC.to_owned()).await {
            Ok(positions) => positions,
            Err(_) => {
                topics.make(&position::new_topic()).await?;
                topics.clone().look(position::TOPIC.to_owned()).await.map_err(|why| why.to_string())?
            }
        };
        if positions.is_compacted == Some(false) {
            return Err(format!(
                "topic {} is not compacted: give it cleanup.policy=compact",
                position::TOPIC
            ));
        }
        let limit = match &sink.fixed {
            Some(topic) => {
                topics.clone().look(topic.to_string()).await.map_err(|why| why.to_string())?.message_bytes
            }
            // Of those that are not known yet the broker tells once, by refusing a batch.
            None => topics.least_message_bytes(),
        };
        let settings = cluster.settings();
        let mut config = settings.producing(limit);
        if is_single {
            config.set("batch.num.messages", "1").set("max.in.flight", "1");
        }
        let (transactions, position) =
            Transactions::begin(config, settings.connecting(), name.to_owned()).await?;
        Ok((OnceWriter { sink, transactions }, position))
    }

    /// Writes a batch, all of it or nothing.
    pub async fn write(&self, events: Arc<Vec<Event>>, position: Position) -> Result<(), NotCommitted> {
        let mut targets = Vec::with_capacity(events.len());
        for event in events.iter() {
            targets.push(self.target(event).await?);
        }
        let sink = self.sink.clone();
        let write = move |open: &Open<'_>| {
            let mut refused = Vec::new();
            for (number, (event, target)) in events.iter().zip(&targets).enumerate() {
                let record = target.as_ref().map_err(Clone::clone);
                let record =
                    record.and_then(|(topic, limits)| Ok((topic, sink.record(event, topic, *limits)?)));
                match record {
                    Ok((topic, mut record)) => open.send(base_record(topic, event, &mut record), number)?,
                    Err(outcome) => refused.push((number, outcome)),
                }
            }
            if refused.is_empty() { Ok(()) } else { Err(NotCommitted::Unsendable(refused)) }
        };
        self.transactions.commit(Box::new(write), position).await
    }

    async fn target(&self, event: &Event) -> Result<Target, NotCommitted> {
        let topic = match self.sink.topic_of(event) {
            Ok(topic) => topic,
            Err(outcome) => return Ok(Err(outcome)),
        };
        let topics = self.sink.cluster().topics();
        let known = match topics.get(&topic, Instant::now()) {
            Some(known) => known,
            None => topics.clone().look(topic.to_string()).await,
        };
        match known {
            Ok(limits) => Ok(Ok((topic, limits))),
            Err(why) => Err(NotCommitted::Unknown(why.to_string())),
        }
    }
}
