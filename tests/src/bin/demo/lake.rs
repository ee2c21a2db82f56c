// SPDX-License-Identifier: PostgreSQL
//! The second destination of the orders: a topic of a throw-away Kafka.

use std::time::Duration;

use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{self, Isolation, Log};
use dtm_tests::ledger::Ledger;
use dtm_tests::process;
use dtm_tests::receiver::Received;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::stage::{CYAN, Stage};

const TOPIC: &str = "orders";
const PARTITIONS: usize = 3;
const POLL: Duration = Duration::from_millis(100);

/// A Kafka with the topic.
pub struct Lake {
    broker: Broker,
}

impl Lake {
    pub async fn open() -> Lake {
        let broker = Broker::start().await;
        broker.create_topic(TOPIC, PARTITIONS, &[]).await;
        Lake { broker }
    }

    /// What a subscription names.
    pub fn destination(&self) -> String {
        format!("kafka://main/{TOPIC}")
    }

    /// The lines of the relay's configuration that say where that is.
    pub fn configuration(&self) -> String {
        format!("[kafka.main]\nbootstrap.servers = \"{}\"\n", self.broker.bootstrap())
    }

    /// How somebody else gets there.
    pub fn hint(&self) -> String {
        format!("Kafka listens on {}, its topic is {TOPIC}.", self.broker.bootstrap())
    }

    /// Prints each record as a consumer gets it, for as long as the process lives.
    pub fn show(&self, stage: &Stage) -> Result<(), Box<dyn std::error::Error>> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.broker.bootstrap()).set("fetch.wait.max.ms", "10");
        // Without one nothing can be assigned; it is never joined.
        config.set("group.id", "demo").set("enable.auto.commit", "false");
        let consumer: BaseConsumer = config.create()?;
        let mut all = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            all.add_partition_offset(TOPIC, i32::try_from(partition)?, Offset::Beginning)?;
        }
        consumer.assign(&all)?;
        let stage = stage.clone();
        std::thread::spawn(move || {
            loop {
                let Some(Ok(record)) = consumer.poll(POLL) else { continue };
                let body = String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned();
                let place = format!("{TOPIC}/{} at {}", record.partition(), record.offset());
                stage.say(CYAN, "in kafka", &format!("{place} {body}"));
            }
        });
        Ok(())
    }

    /// What the topic has, once that is everything that was committed or a deadline is over.
    pub async fn received(&self, ledger: &Ledger, deadline: Duration) -> Vec<Received> {
        let log = Log::of(&self.broker.bootstrap(), &[TOPIC], Isolation::Committed);
        let attempt = || async {
            let received = kafka_log::received(&log.read().await);
            ledger.is_complete(&received).then_some(received)
        };
        match process::eventually(deadline, attempt).await {
            Some(all) => all,
            None => kafka_log::received(&log.read().await),
        }
    }
}
