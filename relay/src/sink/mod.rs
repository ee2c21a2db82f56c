// SPDX-License-Identifier: PostgreSQL
//! Where events go. A sink knows events and destinations, and nothing of PostgreSQL, cursors or retries.

use std::sync::Arc;

use dtm_core::destination::Destination;
use dtm_core::options::Options;
use dtm_core::page::Event;

use self::coordinator::CoordinatorSender;
use self::http::{HttpSender, HttpSink};
use self::kafka::{KafkaSender, KafkaSink};
use self::postgres::{PostgresSender, PostgresSink};
use crate::calls::http::HttpCaller;
use crate::calls::outcome::Outcome;
use crate::calls::secrets::Secrets;
use crate::coordinator::Coordinator;
use crate::kafka::cluster::Clusters;
use crate::postgres::Targets;
use crate::postgres::target::Function;

mod attempts;
pub mod cloudevents;
pub mod cloudevents_http;
pub mod cloudevents_json;
pub mod cloudevents_kafka;
pub mod coordinator;
pub mod headers;
pub mod http;
pub mod kafka;
pub mod kafka_once;
pub mod postgres;

/// Where events of one subscription go.
#[derive(Clone)]
pub enum Sink {
    /// An HTTP endpoint.
    Http(Arc<HttpSink>),
    /// Topics of a Kafka cluster.
    Kafka(Arc<KafkaSink>),
    /// A function in a database.
    Postgres(Arc<PostgresSink>),
    /// What drives global transactions.
    Coordinator(Arc<Coordinator>),
}

/// What all sinks of a relay share.
#[derive(Clone)]
pub struct Outlets {
    /// Connections to endpoints.
    pub http: HttpCaller,
    /// Kafka clusters.
    pub kafka: Arc<Clusters>,
    /// Databases that functions are called in.
    pub postgres: Arc<Targets>,
    /// What the configuration knows and tables do not.
    pub secrets: Arc<Secrets>,
}

/// A destination cannot be delivered to as the subscription says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The destination.
    #[error(transparent)]
    Uri(#[from] crate::calls::http::NotAbsolute),
    /// `ce-source`.
    #[error(transparent)]
    Source(#[from] cloudevents::Unsendable),
    /// Headers of the subscription.
    #[error(transparent)]
    Header(#[from] headers::HeaderProblem),
    /// A Kafka cluster that the configuration does not have.
    #[error("the relay's configuration has no [kafka.{0}]")]
    NoCluster(String),
    /// A database that the configuration does not have.
    #[error("the relay's configuration has no [postgres.{0}]")]
    NoTarget(String),
    /// A function that the configuration does not let be called.
    #[error("the function is not among functions of [postgres.{0}]")]
    Unlisted(String),
}

impl Sink {
    /// The sink of the subscription of this name. `source`: who the events are from.
    pub fn new(
        outlets: &Outlets,
        destination: Destination,
        options: &Options,
        name: &str,
        source: &str,
    ) -> Result<Self, SinkError> {
        match destination {
            Destination::Http(uri) => {
                let sink = HttpSink::new(&outlets.http, uri, options, &outlets.secrets, source)?;
                Ok(Sink::Http(Arc::new(sink)))
            }
            Destination::Kafka { cluster, topic } => {
                let known = outlets.kafka.get(&cluster).ok_or(SinkError::NoCluster(cluster))?;
                let sink = KafkaSink::new(known.clone(), topic, options, &outlets.secrets, source)?;
                Ok(Sink::Kafka(Arc::new(sink)))
            }
            Destination::Postgres { target, schema, function } => {
                let Some(known) = outlets.postgres.get(&target) else {
                    return Err(SinkError::NoTarget(target));
                };
                let function = Function { schema, name: function };
                if !known.lets_call(&function) {
                    return Err(SinkError::Unlisted(target));
                }
                Ok(Sink::Postgres(Arc::new(PostgresSink::new(
                    known.clone(),
                    function,
                    name,
                    options,
                    source,
                ))))
            }
        }
    }

    /// How many events of one key it takes at once: more than one if it keeps their order itself.
    pub fn depth(&self) -> usize {
        match self {
            Sink::Http(_) | Sink::Coordinator(_) => 1,
            Sink::Kafka(sink) => sink.depth,
            Sink::Postgres(_) => usize::MAX,
        }
    }

    /// Sends for one pipeline.
    pub fn sender<T: AsRef<Event> + Send + Sync + 'static>(&self) -> Sender<T> {
        match self {
            Sink::Http(sink) => Sender::Http(HttpSender::new(sink.clone())),
            Sink::Kafka(sink) => Sender::Kafka(Box::new(KafkaSender::new(sink.clone()))),
            Sink::Postgres(sink) => Sender::Postgres(PostgresSender::new(sink.clone())),
            Sink::Coordinator(coordinator) => {
                Sender::Coordinator(CoordinatorSender::new(coordinator.clone()))
            }
        }
    }
}

/// What one pipeline has on its way. What it still has when it is dropped is given up.
pub enum Sender<T> {
    /// See there.
    Http(HttpSender<T>),
    /// See there.
    Kafka(Box<KafkaSender<T>>),
    /// See there.
    Postgres(PostgresSender<T>),
    /// See there.
    Coordinator(CoordinatorSender<T>),
}

impl<T: AsRef<Event> + Send + Sync + 'static> Sender<T> {
    /// Whether it takes another event now.
    pub fn has_room(&self) -> bool {
        match self {
            Sender::Http(_) | Sender::Coordinator(_) => true,
            Sender::Kafka(sender) => sender.has_room(),
            Sender::Postgres(sender) => sender.has_room(),
        }
    }

    /// How many events are on their way.
    pub fn len(&self) -> usize {
        match self {
            Sender::Http(sender) => sender.len(),
            Sender::Kafka(sender) => sender.len(),
            Sender::Postgres(sender) => sender.len(),
            Sender::Coordinator(sender) => sender.len(),
        }
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether anything may be sent: not while somebody else may.
    pub fn hold(&mut self, is_held: bool) {
        match self {
            // What has been sent is sent, and nothing waits; the coordinator looks itself.
            Sender::Http(_) | Sender::Coordinator(_) => {}
            Sender::Kafka(sender) => sender.hold(is_held),
            Sender::Postgres(sender) => sender.hold(is_held),
        }
    }

    /// Makes an attempt.
    pub fn send(&mut self, item: T) {
        match self {
            Sender::Http(sender) => sender.send(item),
            Sender::Kafka(sender) => sender.send(item),
            Sender::Postgres(sender) => sender.send(item),
            Sender::Coordinator(sender) => sender.send(item),
        }
    }

    /// Waits for attempts that have ended, or until there is room again. No answer is lost if it is not waited for to the end.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        match self {
            Sender::Http(sender) => sender.answers().await,
            Sender::Kafka(sender) => sender.answers().await,
            Sender::Postgres(sender) => sender.answers().await,
            Sender::Coordinator(sender) => sender.answers().await,
        }
    }
}
