// SPDX-License-Identifier: PostgreSQL
//! What a cluster's topics take: asked before the first record, and again from time to time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier};
use rdkafka::metadata::Metadata;
use rdkafka::types::RDKafkaErrorCode as Code;
use tokio::time::Instant;

use super::problem;
use super::producer::Quiet;

/// How long what is known of a topic counts.
const KNOWN_FOR: Duration = Duration::from_secs(60);
/// How long it counts that there is none.
const MISSING_FOR: Duration = Duration::from_secs(2);
/// How long the cluster is asked.
const ASKED_FOR: Duration = Duration::from_secs(5);
/// A topic that the broker makes on demand is there a little later.
const MADE_WITHIN: Duration = Duration::from_millis(200);
const LOOKS: usize = 5;
/// Topics that are known at once; past it they are asked for anew.
const TOPICS_MAX: usize = 10_000;

/// What a topic takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Its `max.message.bytes`: the most bytes of a batch, after compression. Where it may not be asked for, all there can be:
    /// then the broker says.
    pub message_bytes: usize,
    /// Whether it keeps the last record of each key; `None`: that may not be asked for.
    pub is_compacted: Option<bool>,
    /// Its partitions.
    pub partitions: usize,
}

/// What is known of a topic, or why it cannot be written to.
pub type Known = Result<Limits, Arc<str>>;

/// The topics of one cluster.
pub struct Topics {
    config: ClientConfig,
    /// Until it fails: nobody polls what it has to tell of that.
    admin: Mutex<Option<Arc<AdminClient<Quiet>>>>,
    known: Mutex<HashMap<String, (Known, Instant)>>,
}

impl Topics {
    /// Nothing is known yet.
    pub fn new(config: ClientConfig) -> Self {
        Topics { config, admin: Mutex::default(), known: Mutex::default() }
    }

    /// What is known of a topic, if it is not too long ago.
    pub fn get(&self, topic: &str, now: Instant) -> Option<Known> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(topic).filter(|(_, until)| *until > now).map(|(known, _)| known.clone())
    }

    /// Asks the cluster about a topic, within a few seconds.
    pub async fn look(self: Arc<Self>, topic: String) -> Known {
        let found = self.ask(&topic).await.map_err(Arc::from);
        let counts_for = if found.is_ok() { KNOWN_FOR } else { MISSING_FOR };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= TOPICS_MAX {
            known.clear();
        }
        known.insert(topic, (found.clone(), Instant::now() + counts_for));
        found
    }

    async fn ask(self: &Arc<Self>, topic: &str) -> Result<Limits, String> {
        let mut looks = 0;
        let partitions = loop {
            let (this, name) = (self.clone(), topic.to_owned());
            let asked = tokio::task::spawn_blocking(move || this.partitions(&name));
            match asked.await.map_err(|error| error.to_string())? {
                Ok(partitions) => break partitions,
                Err(Missing { why, may_come }) => {
                    looks += 1;
                    if !may_come || looks == LOOKS {
                        return Err(why);
                    }
                }
            }
            tokio::time::sleep(MADE_WITHIN).await;
        };
        let admin = self.admin().map_err(|missing| missing.why)?;
        let options = AdminOptions::new().request_timeout(Some(ASKED_FOR));
        let described = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await;
        // Who may write need not be allowed to ask: then the broker says what is too large.
        let configs = described.ok().and_then(|mut all| all.pop()).and_then(Result::ok);
        let value = |name: &str| configs.as_ref().and_then(|config| config.get(name)?.value.as_deref());
        let message_bytes =
            value("max.message.bytes").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
        let is_compacted = value("cleanup.policy").map(|policy| policy.contains("compact"));
        Ok(Limits { message_bytes, is_compacted, partitions })
    }

    /// How many partitions a topic has. Blocks.
    fn partitions(&self, topic: &str) -> Result<usize, Missing> {
        let missing = |why: String, may_come| Missing { why, may_come };
        let metadata = self.metadata(Some(topic))?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
            return Err(missing(format!("there is no topic {topic}"), true));
        };
        match found.error().map(Code::from) {
            None if found.partitions().is_empty() => {
                Err(missing(format!("topic {topic} has no partitions"), true))
            }
            None => Ok(found.partitions().len()),
            Some(Code::LeaderNotAvailable) => Err(missing(format!("topic {topic} has no leader"), true)),
            Some(Code::UnknownTopicOrPartition) => Err(missing(format!("there is no topic {topic}"), true)),
            Some(code) => Err(missing(format!("topic {topic}: {code}"), false)),
        }
    }

    /// Makes a topic, unless it is there.
    pub async fn make(&self, topic: &NewTopic<'_>) -> Result<(), String> {
        let admin = self.admin().map_err(|missing| missing.why)?;
        let options = AdminOptions::new().request_timeout(Some(ASKED_FOR)).operation_timeout(Some(ASKED_FOR));
        let made = admin.create_topics([topic], &options).await.map_err(|error| error.to_string())?;
        match made.into_iter().next() {
            Some(Err((name, code))) if code != Code::TopicAlreadyExists => {
                Err(format!("topic {name} cannot be made: {code}"))
            }
            _ => Ok(()),
        }
    }

    /// How many brokers the cluster has. Blocks for a few seconds at the most.
    pub fn brokers(&self) -> Result<usize, String> {
        self.metadata(None).map(|metadata| metadata.brokers().len()).map_err(|missing| missing.why)
    }

    fn metadata(&self, topic: Option<&str>) -> Result<Metadata, Missing> {
        let admin = self.admin()?;
        admin.inner().fetch_metadata(topic, ASKED_FOR).map_err(|error| {
            self.lock().take();
            let why = problem::of(&self.config).unwrap_or_else(|| error.to_string());
            Missing { why: format!("the cluster does not answer: {why}"), may_come: false }
        })
    }

    /// The least that any topic takes which was asked for, in bytes of a batch.
    pub fn least_message_bytes(&self) -> usize {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let limits = known.values().filter_map(|(known, _)| known.as_ref().ok());
        limits.map(|limits| limits.message_bytes).min().unwrap_or(usize::MAX)
    }

    fn admin(&self) -> Result<Arc<AdminClient<Quiet>>, Missing> {
        let mut admin = self.lock();
        if let Some(admin) = &*admin {
            return Ok(admin.clone());
        }
        let made = self.config.create_with_context::<_, AdminClient<Quiet>>(Quiet);
        let made = Arc::new(made.map_err(|error| Missing { why: error.to_string(), may_come: false })?);
        *admin = Some(made.clone());
        Ok(made)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<AdminClient<Quiet>>>> {
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a topic cannot be written to now.
struct Missing {
    why: String,
    /// It may be there in a moment.
    may_come: bool,
}
