// SPDX-License-Identifier: PostgreSQL
//! The process of a Kafka broker, with its folder, its ports and its configuration.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::kafka_tls::{self, PASSWORD, USER};
use crate::{port, process};

const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// One question to a broker that may not be there yet.
const QUESTION: Duration = Duration::from_millis(500);

/// How many ports are tried: another process can take one between its choice and the broker's start.
const PORTS_TRIED: usize = 3;

/// Any will do: two clusters never meet.
const CLUSTER_ID: &str = "AAAAAAAAAAAAAAAAAAAAAQ";

/// Enough for a test; several brokers share the machine with PostgreSQL.
const HEAP: &str = "-Xmx256m";
/// Java compiles once and not for long: a test's broker, which lives for seconds, is there in half of the time.
const QUICK_START: [&str; 2] = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"];

/// One node that comes back quickly: by default the controller takes a dead broker's successor only after 9 seconds.
const SETTINGS: &str = "\
process.roles=broker,controller
node.id=1
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
";

const LOG_SETTINGS: &str = "\
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %m (%c)%n
rootLogger.level=info
rootLogger.appenderRef.out.ref=out
";

/// How a node is to be.
#[derive(Default)]
pub(crate) struct Options {
    /// Of server.properties, after those that every node has.
    pub(crate) lines: String,
    /// Listens over TLS too.
    pub(crate) tls: bool,
    /// Works as fast as it can, and takes its time to start.
    pub(crate) full_speed: bool,
}

/// A broker's process, or where it was. Dropping it kills and removes it.
pub(crate) struct Node {
    pub(crate) options: Options,
    pub(crate) ports: Ports,
    process: Option<Child>,
    folder: TempDir,
}

/// Chosen together: they are in one file.
pub(crate) struct Ports {
    pub(crate) plain: u16,
    pub(crate) controller: u16,
    pub(crate) sasl: u16,
    pub(crate) ssl: u16,
}

impl Ports {
    fn choose() -> Ports {
        Ports { plain: port::free(), controller: port::free(), sasl: port::free(), ssl: port::free() }
    }
}

impl Node {
    /// Makes it and starts it.
    pub(crate) async fn make(options: Options) -> Node {
        let folder =
            tempfile::Builder::new().prefix("pg_dtm-").tempdir_in("/tmp").expect("a temporary folder");
        let mut node = Node { options, ports: Ports::choose(), process: None, folder };
        if node.options.tls {
            kafka_tls::write_certificates(node.folder());
        }
        std::fs::write(node.file("log4j2.properties"), LOG_SETTINGS).expect("log4j2.properties");
        node.configure();
        node.format();
        for _ in 0..PORTS_TRIED {
            if node.start().await {
                return node;
            }
            node.ports = Ports::choose();
            node.configure();
        }
        panic!("Kafka did not start:\n{}", node.log());
    }

    /// Where its files are.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where clients begin.
    pub(crate) fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.ports.plain)
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        process::signal(self.process.as_ref().expect("a running broker").id(), signal);
    }

    /// Sends it a signal and waits for its end.
    pub(crate) async fn end(&mut self, signal: Signal) {
        self.signal(signal);
        let process = self.process.as_mut().expect("a running broker");
        let status = process::wait(process, STOP_DEADLINE).await;
        assert!(status.is_some(), "the broker outlives {signal:?}:\n{}", self.log());
        self.process = None;
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn configure(&self) {
        let Ports { plain, controller, sasl, ssl } = &self.ports;
        let mut listeners = format!("PLAINTEXT://127.0.0.1:{plain}");
        if self.options.tls {
            listeners += &format!(",SASL_SSL://localhost:{sasl},SSL://localhost:{ssl}");
        }
        let mut text = format!(
            "{SETTINGS}controller.quorum.voters=1@127.0.0.1:{controller}\nadvertised.listeners={listeners}\n\
             listeners={listeners},CONTROLLER://127.0.0.1:{controller}\nlog.dirs={}\n",
            self.file("data").display()
        );
        if self.options.tls {
            text += &kafka_tls::settings(self.folder());
        }
        std::fs::write(self.file("server.properties"), text + &self.options.lines)
            .expect("server.properties");
    }

    /// Makes the data directory.
    fn format(&self) {
        let mut format = self.java(&QUICK_START, "kafka.tools.StorageTool");
        format.args(["format", "-t", CLUSTER_ID, "-c"]).arg(self.file("server.properties"));
        if self.options.tls {
            for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
                format.args(["--add-scram", &format!("{mechanism}=[name={USER},password={PASSWORD}]")]);
            }
        }
        process::run(&mut format);
    }

    fn java(&self, flags: &[&str], class: &str) -> Command {
        let mut java = Command::new("java");
        let log_settings = self.file("log4j2.properties");
        java.args(flags).arg(HEAP).arg(format!("-Dlog4j2.configurationFile={}", log_settings.display()));
        java.arg("-cp").arg(libraries().join("*")).arg(class).current_dir(self.folder());
        java
    }

    /// Starts the process and waits until it answers. False: it has ended by itself.
    pub(crate) async fn start(&mut self) -> bool {
        assert!(self.process.is_none(), "the broker runs already");
        let log = File::options().create(true).append(true).open(self.file("log")).expect("the log");
        let errors = log.try_clone().expect("the log");
        let flags = if self.options.full_speed { &[][..] } else { &QUICK_START };
        let mut command = self.java(flags, "kafka.Kafka");
        command.arg(self.file("server.properties")).stdin(Stdio::null()).stdout(log).stderr(errors);
        let process = self.process.insert(command.spawn().expect("java"));
        let port = self.ports.plain;
        let started = process::eventually(START_DEADLINE, || {
            let ended = process.try_wait().expect("wait").is_some();
            async move { if ended { Some(false) } else { answers(port).await.then_some(true) } }
        });
        let started = started.await;
        if started == Some(false) {
            self.process = None;
        }
        started.unwrap_or_else(|| panic!("the broker takes too long to start:\n{}", self.log()))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It is removed, nothing of it is needed.
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// The folder of Kafka's programs.
fn libraries() -> PathBuf {
    let folder = std::env::var_os("DTM_KAFKA_LIBS").map(PathBuf::from);
    let folder = folder.expect("DTM_KAFKA_LIBS is not set: run this by cargo xtask");
    assert!(Path::is_dir(&folder), "no folder {}: run this by cargo xtask", folder.display());
    folder
}

/// Whether a broker that counts itself in answers: its port is open long before.
async fn answers(port: u16) -> bool {
    let ask = move || {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", format!("127.0.0.1:{port}"))
            .set("reconnect.backoff.ms", "20")
            .set("reconnect.backoff.max.ms", "100");
        let client: BaseConsumer = config.create().expect("a client");
        let metadata = client.fetch_metadata(None, QUESTION);
        metadata
            .is_ok_and(|metadata| metadata.brokers().iter().any(|broker| broker.port() == i32::from(port)))
    };
    tokio::task::spawn_blocking(ask).await.expect("a question to the broker")
}
