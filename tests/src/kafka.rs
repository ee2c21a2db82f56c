// SPDX-License-Identifier: PostgreSQL
//! A real Apache Kafka for a test: one node, broker and controller in one process, that is stopped, killed and started again
//! by it. Topics of it are made in `kafka_topics`, its records read in `kafka_log`.

use std::path::PathBuf;
use std::sync::Mutex;

use rustix::process::Signal;

use crate::kafka_node::{Node, Options};
use crate::kafka_tls;

/// Decides by access lists; who is in none may do everything, so that a test denies what it means to.
const AUTHORIZER: &str = "\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
";

/// How a broker is to be.
#[derive(Default)]
pub struct Builder(Options);

/// A running, stopped or killed broker, or the user's. Dropping it stops and removes ours.
pub struct Broker {
    bootstrap: String,
    node: Option<Node>,
    /// Topics made in the user's Kafka: they go away with this.
    pub(crate) guests: Mutex<Vec<String>>,
}

impl Builder {
    /// A line of server.properties.
    pub fn config(mut self, name: &str, value: &str) -> Self {
        self.0.lines += &format!("{name}={value}\n");
        self
    }

    /// Listens over TLS too, see [`Broker::sasl_bootstrap`] and [`Broker::ssl_bootstrap`].
    pub fn tls(mut self) -> Self {
        self.0.tls = true;
        self
    }

    /// Keeps access lists, see [`Broker::deny`].
    pub fn authorizer(mut self) -> Self {
        self.0.lines += AUTHORIZER;
        self
    }

    /// For benchmarks: starts later and works faster.
    pub fn at_full_speed(mut self) -> Self {
        self.0.full_speed = true;
        self
    }

    /// Makes the broker and starts it.
    pub async fn start(self) -> Broker {
        let node = Node::make(self.0).await;
        Broker { bootstrap: node.bootstrap(), node: Some(node), guests: Mutex::default() }
    }
}

impl Broker {
    /// A broker of a test's own, with options.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A broker of a test's own.
    pub async fn start() -> Broker {
        Broker::builder().start().await
    }

    /// A broker for a test that needs no more than topics: the user's where `KAFKA_BOOTSTRAP_SERVERS` says where that is, and
    /// one of its own where it does not. Names of topics there are to be [`unique_topic`](crate::kafka_topics::unique_topic)s.
    pub async fn for_topics() -> Broker {
        match std::env::var("KAFKA_BOOTSTRAP_SERVERS") {
            Ok(bootstrap) if !bootstrap.is_empty() => {
                Broker { bootstrap, node: None, guests: Mutex::default() }
            }
            _ => Broker::start().await,
        }
    }

    /// Whether it is the user's.
    pub(crate) fn is_foreign(&self) -> bool {
        self.node.is_none()
    }

    /// Where clients begin, without TLS and passwords.
    pub fn bootstrap(&self) -> String {
        self.bootstrap.clone()
    }

    /// Where clients begin that come over TLS with [the user's](kafka_tls::USER) [password](kafka_tls::PASSWORD), by
    /// SCRAM-SHA-256, SCRAM-SHA-512 or PLAIN.
    pub fn sasl_bootstrap(&self) -> String {
        format!("localhost:{}", self.tls_node().ports.sasl)
    }

    /// Where clients begin that come over TLS and show a [certificate](Broker::client_certificate).
    pub fn ssl_bootstrap(&self) -> String {
        format!("localhost:{}", self.tls_node().ports.ssl)
    }

    /// The authority that has signed the broker's certificate and the clients'.
    pub fn ca_file(&self) -> PathBuf {
        self.tls_node().folder().join(kafka_tls::CA)
    }

    /// A client's certificate and its key.
    pub fn client_certificate(&self) -> (PathBuf, PathBuf) {
        let folder = self.tls_node().folder();
        (folder.join(kafka_tls::CLIENT_CERTIFICATE), folder.join(kafka_tls::CLIENT_KEY))
    }

    /// SIGKILL: what it had not written to its files it never will.
    pub async fn kill9(&mut self) {
        self.node_mut().end(Signal::KILL).await;
    }

    /// Asks it to end, and waits for it.
    pub async fn stop(&mut self) {
        self.node_mut().end(Signal::TERM).await;
    }

    /// Starts it after it was killed or stopped, with the same ports and data, and waits until it answers.
    pub async fn start_again(&mut self) {
        let node = self.node_mut();
        assert!(node.start().await, "the broker did not start again:\n{}", node.log());
    }

    /// SIGSTOP: connections stay open, and nothing is read from them.
    pub fn stop_reading(&self) {
        self.node().signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.node().signal(Signal::CONT);
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.node().log()
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("a broker of our own: this one is the user's")
    }

    fn node_mut(&mut self) -> &mut Node {
        self.node.as_mut().expect("a broker of our own: this one is the user's")
    }

    fn tls_node(&self) -> &Node {
        assert!(self.node().options.tls, "this broker was made without tls()");
        self.node()
    }
}
