// SPDX-License-Identifier: PostgreSQL
//! The relay's settings: flags over environment over file over defaults.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dtm_core::duration;
use dtm_core::names::{self, is_name};
use figment::Figment;
use figment::error::Kind;
use figment::providers::{Env, Format as _, Serialized, Toml};
use figment::value::Dict;
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

use crate::calls::http::HttpCaller;
use crate::calls::secrets::{SecretTable, Secrets};
use crate::calls::tls::TlsError;
use crate::kafka::cluster::Cluster;
use crate::kafka::settings::ClusterSettings;
use crate::pipeline::flow::ParkingBounds;
use crate::pipeline::run::Bounds;
use crate::postgres::settings::{self as targets, TargetSettings, TargetTable};
use crate::server::settings::{ServerSettings, ServerTable};
use crate::sink::Outlets;
use crate::source::error::SourceError;
use crate::source::settings::{Settings, ThisMachine};
use crate::source::upkeep::Upkeep;

/// What the command line and the variables of strings say.
#[derive(Debug, Default)]
pub struct Overrides {
    /// The file with the settings.
    pub file: Option<PathBuf>,
    /// The URL of the database named `default`.
    pub database_url: Option<String>,
    /// See [`Config::environment`].
    pub environment: Option<String>,
    /// See [`Config::name`].
    pub name: Option<String>,
    /// See [`Config::log_format`].
    pub log_format: Option<String>,
    /// See [`Config::log_level`].
    pub log_level: Option<String>,
}

/// A setting that is wrong: one line that says where it stands, which it is, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// In which form log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// A duration as it is written: a number of seconds, or a string with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seconds(Duration);

/// What the relay calls others by cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum OutletError {
    /// For HTTP.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// For a `[postgres.NAME]`.
    #[error(transparent)]
    Target(#[from] SourceError),
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    environment: String,
    name: Option<String>,
    log_format: LogFormat,
    log_level: String,
    lease: Seconds,
    shutdown: Seconds,
    poll_busy: Seconds,
    poll_idle: Seconds,
    statement_timeout: Seconds,
    page_events: usize,
    page_bytes: usize,
    subscription_events: usize,
    subscription_bytes: usize,
    buffer_bytes: usize,
    parked_events: usize,
    parked_bytes: usize,
    upkeep_every: Seconds,
    lag_patience: Seconds,
    control_bytes: usize,
    threads: usize,
    ca_file: Option<PathBuf>,
    secret: BTreeMap<String, SecretTable>,
    kafka: BTreeMap<String, Dict>,
    postgres: BTreeMap<String, TargetTable>,
    database: BTreeMap<String, DatabaseTable>,
    dtm_server: Option<ServerTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DatabaseTable {
    url: String,
}

impl Default for File {
    fn default() -> Self {
        let seconds = |seconds| Seconds(Duration::from_secs(seconds));
        let milliseconds = |milliseconds| Seconds(Duration::from_millis(milliseconds));
        File {
            environment: "default".into(),
            name: None,
            log_format: LogFormat::Text,
            log_level: "info".into(),
            lease: seconds(3),
            shutdown: seconds(10),
            poll_busy: milliseconds(1),
            poll_idle: milliseconds(100),
            statement_timeout: seconds(60),
            page_events: 500,
            page_bytes: 256 * 1024,
            subscription_events: 4_096,
            subscription_bytes: 16 * 1024 * 1024,
            buffer_bytes: 64 * 1024 * 1024,
            parked_events: 10_000,
            parked_bytes: 256 * 1024 * 1024,
            upkeep_every: seconds(5),
            lag_patience: seconds(60),
            control_bytes: 32 * 1024 * 1024,
            threads: 2,
            ca_file: None,
            secret: BTreeMap::new(),
            kafka: BTreeMap::new(),
            postgres: BTreeMap::new(),
            database: BTreeMap::new(),
            dtm_server: None,
        }
    }
}

/// Settings that numbers and durations say, by name: each can be given as the variable `DTM_` and the name in capitals.
const VARIABLES: [&str; 17] = [
    "lease",
    "shutdown",
    "poll_busy",
    "poll_idle",
    "statement_timeout",
    "page_events",
    "page_bytes",
    "subscription_events",
    "subscription_bytes",
    "buffer_bytes",
    "parked_events",
    "parked_bytes",
    "upkeep_every",
    "lag_patience",
    "control_bytes",
    "threads",
    "ca_file",
];

/// A database that the relay delivers from.
#[derive(Clone, Debug)]
pub struct Database {
    /// What the configuration calls it.
    pub name: String,
    /// How to connect to it.
    pub settings: Settings,
}

/// All settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// What this relay belongs to.
    pub environment: String,
    /// What this relay is called in `dtm.subscriptions`; host and process id, unless set.
    pub name: String,
    /// See [`LogFormat`].
    pub log_format: LogFormat,
    /// A level, or tracing's directives.
    pub log_level: String,
    /// How long a lease holds without a heartbeat.
    pub lease: Duration,
    /// How long a shutdown waits for requests in flight.
    pub shutdown: Duration,
    /// Between two looks at the log under traffic.
    pub poll_busy: Duration,
    /// Between two looks at the log when there is none.
    pub poll_idle: Duration,
    /// For every statement.
    pub statement_timeout: Duration,
    /// Events of a page.
    pub page_events: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Events that one subscription holds in memory.
    pub subscription_events: usize,
    /// Bytes that one subscription holds in memory.
    pub subscription_bytes: usize,
    /// Bytes that all subscriptions hold in memory.
    pub buffer_bytes: usize,
    /// Events of one subscription, or shard, that may be parked.
    pub parked_events: usize,
    /// Bytes of them.
    pub parked_bytes: usize,
    /// Turning over segments, purging, and looking who lags behind.
    pub upkeep: Upkeep,
    /// Threads.
    pub threads: usize,
    /// Certificates of authorities that endpoints are trusted by, beside the operating system's.
    pub ca_file: Option<PathBuf>,
    /// What subscriptions name by `secret:NAME`.
    pub secrets: Arc<Secrets>,
    /// What subscriptions name by `kafka://NAME/…`.
    pub kafka: BTreeMap<String, ClusterSettings>,
    /// What subscriptions and steps name by `postgres://NAME/…`.
    pub postgres: BTreeMap<String, TargetSettings>,
    /// At least one.
    pub databases: Vec<Database>,
    /// For DTM's clients.
    pub dtm_server: Option<ServerSettings>,
}

impl Config {
    /// Reads the file and puts environment and flags over it.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut sources = Figment::new();
        if let Some(path) = &overrides.file {
            let named = |error| ConfigError(format!("{}: {error}", path.display()));
            std::fs::File::open(path).map_err(named)?;
            sources = sources.merge(Toml::file_exact(path));
        }
        sources = sources.merge(Env::prefixed("DTM_").only(&VARIABLES));
        let texts = [
            ("environment", &overrides.environment),
            ("name", &overrides.name),
            ("log_format", &overrides.log_format),
            ("log_level", &overrides.log_level),
            ("database.default.url", &overrides.database_url),
        ];
        for (key, value) in texts {
            if let Some(value) = value {
                sources = sources.merge(Serialized::default(key, value));
            }
        }
        let file: File = sources.extract().map_err(|error| explain(&error, overrides.file.as_deref()))?;
        file.checked(&sources)
    }

    /// The bounds of each pipeline.
    pub fn pipeline_bounds(&self) -> Bounds {
        Bounds {
            events: self.subscription_events,
            page_events: self.page_events,
            page_bytes: self.page_bytes,
            parking: ParkingBounds { events: self.parked_events, bytes: self.parked_bytes },
            drain: self.shutdown,
        }
    }
}

impl Config {
    /// By what events go out; nothing is connected yet.
    pub fn outlets(&self) -> Result<Outlets, OutletError> {
        let cluster = |(name, settings): (&String, &ClusterSettings)| {
            (name.clone(), Arc::new(Cluster::new(name, settings.clone())))
        };
        Ok(Outlets {
            http: HttpCaller::new(self.ca_file.as_deref())?,
            kafka: Arc::new(self.kafka.iter().map(cluster).collect()),
            postgres: Arc::new(targets::open(&self.postgres)?),
            secrets: self.secrets.clone(),
        })
    }
}

impl File {
    fn checked(self, sources: &Figment) -> Result<Config, ConfigError> {
        let wrong = |key: &str, why: String| ConfigError(format!("{}: {key}: {why}", place(sources, key)));
        let second = Duration::from_secs(1);
        let bounds = [
            ("lease", self.lease, second, 300 * second),
            ("shutdown", self.shutdown, Duration::ZERO, 3_600 * second),
            ("poll_busy", self.poll_busy, second / 1_000, second),
            ("poll_idle", self.poll_idle, self.poll_busy.0, 60 * second),
            ("statement_timeout", self.statement_timeout, 5 * second, 3_600 * second),
            ("upkeep_every", self.upkeep_every, second / 100, 3_600 * second),
            ("lag_patience", self.lag_patience, Duration::ZERO, 86_400 * second),
        ];
        for (key, Seconds(value), least, most) in bounds {
            if !(least..=most).contains(&value) {
                let why = format!("{value:?} is not between {least:?} and {most:?}");
                return Err(wrong(key, why));
            }
        }
        let bounds = [
            ("page_events", self.page_events, 1, 100_000),
            ("page_bytes", self.page_bytes, 1_024, 64 << 20),
            ("subscription_events", self.subscription_events, 1, 1_000_000),
            ("subscription_bytes", self.subscription_bytes, 1_024, 1 << 40),
            ("buffer_bytes", self.buffer_bytes, 1_024, 1 << 40),
            ("parked_events", self.parked_events, 0, 1_000_000),
            ("parked_bytes", self.parked_bytes, 0, 1 << 40),
            ("control_bytes", self.control_bytes, 8_192, 1 << 40),
            ("threads", self.threads, 1, 256),
        ];
        for (key, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return Err(wrong(key, format!("{value} is not between {least} and {most}")));
            }
        }
        if self.environment.is_empty() {
            return Err(wrong("environment", "it is empty".into()));
        }
        let mut databases = Vec::new();
        for (name, DatabaseTable { url }) in self.database {
            let key = format!("database.{name}.url");
            match Settings::parse(&url, &ThisMachine) {
                Ok(settings) => databases.push(Database { name, settings }),
                Err(error) => return Err(wrong(&key, error.to_string())),
            }
        }
        let mut secrets = Secrets::new();
        for (name, table) in self.secret {
            let key = format!("secret.{name}");
            if !is_name(&name) {
                return Err(wrong(&key, names::RULE.into()));
            }
            secrets.insert(name, table.read().map_err(|why| wrong(&key, why))?);
        }
        let mut kafka = BTreeMap::new();
        for (name, table) in self.kafka {
            if !is_name(&name) {
                return Err(wrong(&format!("kafka.{name}"), names::RULE.into()));
            }
            let settings = ClusterSettings::read(&table, &secrets);
            let settings =
                settings.map_err(|(property, why)| wrong(&format!("kafka.{name}.{property}"), why))?;
            kafka.insert(name, settings);
        }
        let postgres = targets::read(self.postgres).map_err(|(key, why)| wrong(&key, why))?;
        if databases.is_empty() {
            let ways =
                "--database-url, DTM_DATABASE_URL, or a file with [database.NAME] url = \"postgres://…\"";
            return Err(ConfigError(format!("no database to deliver from: give {ways}")));
        }
        let dtm_server = self.dtm_server.map(|table| table.read(&databases, &secrets)).transpose();
        let dtm_server = dtm_server.map_err(|(key, why)| wrong(&format!("dtm_server.{key}"), why))?;
        Ok(Config {
            environment: self.environment,
            name: self.name.unwrap_or_else(host_and_process),
            log_format: self.log_format,
            log_level: self.log_level,
            lease: self.lease.0,
            shutdown: self.shutdown.0,
            poll_busy: self.poll_busy.0,
            poll_idle: self.poll_idle.0,
            statement_timeout: self.statement_timeout.0,
            page_events: self.page_events,
            page_bytes: self.page_bytes,
            subscription_events: self.subscription_events,
            subscription_bytes: self.subscription_bytes,
            buffer_bytes: self.buffer_bytes,
            parked_events: self.parked_events,
            parked_bytes: self.parked_bytes,
            upkeep: Upkeep {
                every: self.upkeep_every.0,
                control_bytes: self.control_bytes as i64,
                lag_patience: self.lag_patience.0,
            },
            threads: self.threads,
            ca_file: self.ca_file,
            secrets: Arc::new(secrets),
            kafka,
            postgres,
            databases,
            dtm_server,
        })
    }
}

fn host_and_process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let host = host.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "relay".into());
    format!("{}:{}", host.trim(), std::process::id())
}

/// Where a setting stands: the file, the variable, or the command line.
fn place(sources: &Figment, key: &str) -> String {
    sources.find_metadata(key).map_or_else(|| "settings".into(), |metadata| source_name(metadata, key))
}

fn source_name(metadata: &figment::Metadata, key: &str) -> String {
    match metadata.source.as_ref() {
        Some(figment::Source::File(path)) => path.display().to_string(),
        None if metadata.name.contains("environment variable") => format!("DTM_{}", key.to_uppercase()),
        _ => "command line or environment".into(),
    }
}

/// One line of figment's error. A syntax error shows the line of the file, which may hold a password: that part is left out.
fn explain(error: &figment::Error, file: Option<&Path>) -> ConfigError {
    let mut key = error.path.join(".");
    let why = match &error.kind {
        Kind::UnknownField(name, known) => {
            // The path names the setting itself, where it has one.
            if error.path.last() != Some(name) {
                key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            }
            format!("there is no such setting; known here: {}", known.join(", "))
        }
        Kind::MissingField(name) => {
            key = if key.is_empty() { name.to_string() } else { format!("{key}.{name}") };
            "it is missing".to_owned()
        }
        Kind::Message(text) => {
            let mut lines = text.lines().filter(|line| !line.trim().is_empty());
            let first = lines.next().unwrap_or_default().to_owned();
            lines.next_back().map_or(first.clone(), |last| format!("{first}: {last}"))
        }
        kind => kind.to_string(),
    };
    let place = match (&error.metadata, file) {
        (Some(metadata), _) => source_name(metadata, &key),
        (None, Some(file)) => file.display().to_string(),
        (None, None) => "settings".into(),
    };
    ConfigError(if key.is_empty() { format!("{place}: {why}") } else { format!("{place}: {key}: {why}") })
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecondsVisitor)
    }
}

struct SecondsVisitor;

impl SecondsVisitor {
    fn number<E: serde::de::Error>(seconds: f64) -> Result<Seconds, E> {
        let found = duration::from_seconds(seconds);
        found.map(Seconds).ok_or_else(|| E::custom(format!("{seconds} s is no duration")))
    }
}

impl Visitor<'_> for SecondsVisitor {
    type Value = Seconds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of seconds, or a string with its unit, such as \"500ms\"")
    }

    fn visit_i64<E: serde::de::Error>(self, seconds: i64) -> Result<Seconds, E> {
        Self::number(seconds as f64)
    }

    fn visit_u64<E: serde::de::Error>(self, seconds: u64) -> Result<Seconds, E> {
        Self::number(seconds as f64)
    }

    fn visit_f64<E: serde::de::Error>(self, seconds: f64) -> Result<Seconds, E> {
        Self::number(seconds)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Seconds, E> {
        duration::parse(text).map(Seconds).map_err(E::custom)
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
