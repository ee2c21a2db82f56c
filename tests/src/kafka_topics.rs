// SPDX-License-Identifier: PostgreSQL
//! Topics of a Kafka: made, changed, and denied to everybody.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use uuid::Uuid;

use crate::kafka::Broker;
use crate::kafka_acl::{self, Change};
use crate::process;

const DEADLINE: Duration = Duration::from_secs(30);

/// What an access list denies.
pub use crate::kafka_acl::Operation;

/// A name that no topic of the user's has.
pub fn unique_topic(name: &str) -> String {
    format!("pg-dtm-test-{}-{name}", Uuid::new_v4().simple())
}

impl Broker {
    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap()).create().expect("a client")
    }

    /// Makes a topic and waits until it can be written to.
    pub async fn create_topic(&self, name: &str, partitions: usize, config: &[(&str, &str)]) {
        let count = i32::try_from(partitions).expect("a number of partitions");
        // As many copies as the broker is set up to have.
        let mut topic = NewTopic::new(name, count, TopicReplication::Fixed(-1));
        topic.config = config.to_vec();
        let results = self.admin().create_topics([&topic], &AdminOptions::new()).await.expect("an answer");
        results.into_iter().for_each(|result| drop(result.expect("a new topic")));
        if self.is_foreign() {
            self.guests.lock().expect("topics").push(name.to_owned());
        }
        self.wait_for_partitions(name, partitions).await;
    }

    /// Gives a topic this configuration. What is not in it goes back to what is the default.
    pub async fn alter_topic(&self, name: &str, config: &[(&str, &str)]) {
        let alter =
            config.iter().fold(AlterConfig::new(ResourceSpecifier::Topic(name)), |alter, (key, value)| {
                alter.set(key, value)
            });
        let results = self.admin().alter_configs([&alter], &AdminOptions::new()).await.expect("an answer");
        results.into_iter().for_each(|result| drop(result.expect("a changed topic")));
    }

    /// Gives a topic more partitions, until there are so many.
    pub async fn add_partitions(&self, name: &str, total: usize) {
        let more = NewPartitions::new(name, total);
        let results = self.admin().create_partitions([&more], &AdminOptions::new()).await.expect("an answer");
        results.into_iter().for_each(|result| drop(result.expect("more partitions")));
        self.wait_for_partitions(name, total).await;
    }

    /// Removes a topic with its records.
    pub async fn delete_topic(&self, name: &str) {
        let results = self.admin().delete_topics(&[name], &AdminOptions::new()).await.expect("an answer");
        results.into_iter().for_each(|result| drop(result.expect("a topic to remove")));
        self.wait_for_partitions(name, 0).await;
    }

    /// How many partitions of a topic can be written to; none if there is no such topic.
    pub async fn partitions(&self, name: &str) -> usize {
        let (client, name) = (self.admin(), name.to_owned());
        let ask = move || {
            let metadata = client.inner().fetch_metadata(None, DEADLINE).expect("metadata");
            let topic = metadata.topics().iter().find(|topic| topic.name() == name);
            topic.map_or(0, |topic| topic.partitions().iter().filter(|part| part.leader() >= 0).count())
        };
        tokio::task::spawn_blocking(ask).await.expect("a question to the broker")
    }

    async fn wait_for_partitions(&self, name: &str, count: usize) {
        let attempt = || async { (self.partitions(name).await == count).then_some(()) };
        let there = process::eventually(DEADLINE, attempt).await;
        assert!(there.is_some(), "{name} does not come to have {count} partitions");
    }

    /// Denies a topic to everybody, and waits until the broker goes by that. The broker needs an
    /// [authorizer](crate::kafka::Builder::authorizer).
    pub async fn deny(&self, topic: &str, operation: Operation) {
        assert!(!self.is_foreign(), "access lists are the user's");
        kafka_acl::change(&self.bootstrap(), topic, operation, Change::Deny).await;
    }

    /// Takes back what [`Broker::deny`] did.
    pub async fn allow(&self, topic: &str, operation: Operation) {
        kafka_acl::change(&self.bootstrap(), topic, operation, Change::Allow).await;
    }
}

impl Drop for Broker {
    /// The user's Kafka keeps nothing of a test.
    fn drop(&mut self) {
        let guests = std::mem::take(self.guests.get_mut().expect("topics"));
        if guests.is_empty() {
            return;
        }
        let admin = self.admin();
        let remove = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let names: Vec<&str> = guests.iter().map(String::as_str).collect();
            runtime.block_on(admin.delete_topics(&names, &AdminOptions::new())).ok();
        };
        // Not in this thread: it may be one of a runtime, and those must not wait.
        std::thread::spawn(remove).join().ok();
    }
}
