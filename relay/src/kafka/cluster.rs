// SPDX-License-Identifier: PostgreSQL
//! A Kafka cluster of the configuration: its producers, which all senders share, and its topics.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::producer::Line;
use super::settings::ClusterSettings;
use super::topics::Topics;

/// A producer's batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batches {
    /// Of so many bytes at the most: a topic can take fewer than others.
    Bytes(usize),
    /// Of one record each: what the broker says of a batch is said of that record.
    Single,
}

/// A cluster.
pub struct Cluster {
    name: Arc<str>,
    settings: ClusterSettings,
    lines: Mutex<HashMap<Batches, Arc<Line>>>,
    topics: Arc<Topics>,
}

/// All clusters by name.
pub type Clusters = BTreeMap<String, Arc<Cluster>>;

impl Cluster {
    /// A cluster that nothing is connected to yet.
    pub fn new(name: &str, settings: ClusterSettings) -> Self {
        let topics = Arc::new(Topics::new(settings.connecting()));
        Cluster { name: name.into(), settings, lines: Mutex::default(), topics }
    }

    /// What the configuration calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is connected to.
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// Its topics.
    pub fn topics(&self) -> &Arc<Topics> {
        &self.topics
    }

    /// The producer with such batches.
    pub fn line(&self, batches: Batches) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let line = lines.entry(batches).or_insert_with(|| {
            let mut config = match batches {
                Batches::Bytes(bytes) => self.settings.producing(bytes),
                Batches::Single => self.settings.producing(usize::MAX),
            };
            config.set("enable.gapless.guarantee", "true");
            if batches == Batches::Single {
                // One after the other: a broker that has refused the first of a producer would take the second.
                config.set("batch.num.messages", "1").set("max.in.flight", "1");
            }
            Arc::new(Line::new(config, self.name.clone()))
        });
        line.clone()
    }
}
