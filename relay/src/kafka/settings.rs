// SPDX-License-Identifier: PostgreSQL
//! `[kafka.NAME]`: librdkafka's properties, but for those that the relay's promises rest on.

use std::collections::BTreeMap;
use std::fmt;

use figment::value::{Dict, Value};
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

use crate::calls::secrets::Secrets;

/// The greatest `dtm.max_payload` that there is, with as much again for headers and framing as an event can have.
const RECORD_BYTES_MAX: usize = (256 << 20) + (64 << 10);

/// Records that wait in a producer, in kilobytes.
const QUEUE_KILOBYTES: &str = "65536";
const QUEUE: &str = "queue.buffering.max.kbytes";

/// What a cluster has unless it says otherwise.
const DEFAULTS: [(&str, &str); 9] = [
    // A topic that is missing is an error to be told of, and not to be made with whatever the broker has as defaults.
    ("allow.auto.create.topics", "false"),
    ("client.id", "dtm-relay"),
    ("compression.type", "lz4"),
    ("linger.ms", "1"),
    ("log.connection.close", "false"),
    (QUEUE, QUEUE_KILOBYTES),
    ("queue.buffering.max.messages", "200000"),
    // A broker that is back is noticed soon.
    ("reconnect.backoff.max.ms", "1000"),
    ("socket.keepalive.enable", "true"),
];

/// Properties that are not to be set, and why.
const OURS: [(&[&str], &str); 10] = [
    (&["acks", "request.required.acks"], "a record counts as delivered when all in-sync replicas have it"),
    (
        &["enable.idempotence", "enable.gapless.guarantee"],
        "without it a record could be repeated, lost or overtaken by a later one",
    ),
    (
        &["message.timeout.ms", "delivery.timeout.ms"],
        "a record that times out leaves a gap in the order of its key",
    ),
    (
        &["retries", "message.send.max.retries"],
        "a record that is not tried again leaves a gap in the order of its key",
    ),
    (
        &["max.in.flight", "max.in.flight.requests.per.connection", "queuing.strategy"],
        "the order of a key rests on it",
    ),
    (
        &["partitioner", "partitioner_cb", "sticky.partitioning.linger.ms"],
        "a key's records go where those of the Java client go (murmur2_random)",
    ),
    (
        &["socket.timeout.ms", "request.timeout.ms"],
        "a record that a producer has given up must not arrive after those of its successor",
    ),
    (&["transactional.id", "transaction.timeout.ms"], "each subscription has transactions of its own"),
    (&["message.max.bytes"], "it follows from dtm.max_payload and the topic's max.message.bytes"),
    (
        &["delivery.report.only.error", "enabled_events", "plugin.library.paths", "topic.blacklist"],
        "the relay could not tell what was delivered",
    ),
];

/// Where the cluster is.
const SERVERS: [&str; 2] = ["bootstrap.servers", "metadata.broker.list"];

/// Properties whose values are secret: they name one, as `secret:NAME`.
const SECRET: [&str; 8] = [
    "sasl.oauthbearer.assertion.private.key.passphrase",
    "sasl.oauthbearer.assertion.private.key.pem",
    "sasl.oauthbearer.client.credentials.client.secret",
    "sasl.oauthbearer.client.secret",
    "sasl.password",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
];

/// The properties of a cluster, checked. Their values are shown to nobody.
#[derive(Clone)]
pub struct ClusterSettings {
    properties: BTreeMap<String, String>,
    batch_bytes: usize,
    queue_bytes: usize,
}

impl fmt::Debug for ClusterSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.properties.keys()).finish()
    }
}

impl ClusterSettings {
    /// Reads a table. Names may be written with quotes (`"bootstrap.servers" = …`) or without. An error names the property.
    pub fn read(table: &Dict, secrets: &Secrets) -> Result<Self, (String, String)> {
        let (mut properties, mut secret_ones) = (BTreeMap::new(), Vec::new());
        flatten("", table, &mut properties)?;
        for (name, value) in &mut properties {
            let wrong = |why: &str| Err((name.clone(), why.to_owned()));
            if let Some((_, why)) = OURS.iter().find(|(names, _)| names.contains(&name.as_str())) {
                return wrong(&format!("it is the relay's to set: {why}"));
            }
            if name.starts_with("test.") {
                return wrong("it makes a cluster that is none");
            }
            if SERVERS.contains(&name.as_str()) && value.starts_with("secret:") {
                return wrong("it is told in logs and by check: it cannot be a secret");
            }
            if let Some(secret) = value.strip_prefix("secret:") {
                match secrets.get(secret) {
                    Some(secret) => {
                        *value = secret.reveal().to_owned();
                        secret_ones.push(name.clone());
                    }
                    None => return wrong(&format!("there is no [secret.{secret}]")),
                }
            } else if SECRET.contains(&name.as_str()) {
                return wrong("a secret does not stand here: name one, \"secret:NAME\", of a [secret.NAME]");
            }
        }
        if !SERVERS.iter().any(|name| properties.contains_key(*name)) {
            return Err(("bootstrap.servers".into(), "it is missing".into()));
        }
        let batch = properties.get("batch.size").and_then(|text| text.parse().ok());
        let queue: &str = properties.get(QUEUE).map_or(QUEUE_KILOBYTES, String::as_str);
        let settings = ClusterSettings {
            batch_bytes: batch.unwrap_or(1_000_000),
            queue_bytes: queue.parse().map_or(usize::MAX, |kilobytes: usize| kilobytes.saturating_mul(1024)),
            properties,
        };
        // It says which property it does not know or take; it may repeat a value that is no secret.
        for (name, value) in &settings.properties {
            let mut one = ClientConfig::new();
            if let Err(error) = one.set(name, value).create_native_config() {
                let why = match secret_ones.contains(name) {
                    true => "librdkafka does not take its value".to_owned(),
                    false => reason(&error),
                };
                return Err((name.clone(), why));
            }
        }
        Ok(settings)
    }

    /// The properties of whatever connects to the cluster.
    pub fn connecting(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        // Its own default is what the `log` crate shows, which the relay does not use.
        config.set_log_level(RDKafkaLogLevel::Info);
        for (name, value) in DEFAULTS {
            config.set(name, value);
        }
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        config
    }

    /// The properties of a producer that keeps the promises, whose batches have so many bytes at the most.
    pub fn producing(&self, batch_bytes: usize) -> ClientConfig {
        let mut config = self.connecting();
        let batch_bytes = batch_bytes.min(self.batch_bytes());
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            // librdkafka's default of five minutes leaves gaps.
            .set("message.timeout.ms", "0")
            // Whoever has stopped is waited for a little longer than that.
            .set("socket.timeout.ms", "30000")
            .set("message.max.bytes", RECORD_BYTES_MAX.to_string())
            .set("batch.size", batch_bytes.to_string())
            .set("partitioner", "murmur2_random");
        config
    }

    /// The most bytes that a batch has, whatever the topic takes.
    pub fn batch_bytes(&self) -> usize {
        self.batch_bytes
    }

    /// The most bytes of records that a producer takes; a record that is larger never finds room.
    pub fn queue_bytes(&self) -> usize {
        self.queue_bytes
    }

    /// Whether records are compressed: then it is not known before how large a batch is to the broker.
    pub fn compresses(&self) -> bool {
        let set =
            ["compression.type", "compression.codec"].iter().find_map(|name| self.properties.get(*name));
        set.is_none_or(|codec| codec != "none")
    }

    /// Where the cluster is.
    pub fn servers(&self) -> &str {
        let set = SERVERS.iter().find_map(|name| self.properties.get(*name));
        set.map_or("", String::as_str)
    }
}

/// A dot in a name without quotes makes a table in a table.
fn flatten(prefix: &str, table: &Dict, into: &mut BTreeMap<String, String>) -> Result<(), (String, String)> {
    for (name, value) in table {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let text = match value {
            Value::Dict(_, inner) => {
                flatten(&name, inner, into)?;
                continue;
            }
            Value::String(_, text) => text.clone(),
            Value::Bool(_, bool) => bool.to_string(),
            Value::Num(_, number) => match (number.to_i128(), number.to_f64()) {
                (Some(whole), _) => whole.to_string(),
                (None, Some(fraction)) => fraction.to_string(),
                (None, None) => return Err((name, "it is no number".into())),
            },
            _ => return Err((name, "it is a string, a number, or true or false".into())),
        };
        into.insert(name, text);
    }
    Ok(())
}

fn reason(error: &rdkafka::error::KafkaError) -> String {
    match error {
        rdkafka::error::KafkaError::ClientConfig(_, description, ..) => description.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use figment::Figment;
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::calls::secrets::Secret;

    fn read(toml: &str) -> Result<ClusterSettings, (String, String)> {
        let table: Dict = Figment::new().merge(Toml::string(toml)).extract().unwrap();
        let secrets = Secrets::from([("kafka".to_owned(), Secret::from("hunter2".to_owned()))]);
        ClusterSettings::read(&table, &secrets)
    }

    #[test]
    fn properties_have_librdkafkas_names_with_and_without_quotes() {
        for toml in [
            "\"bootstrap.servers\" = \"a:1\"\n\"linger.ms\" = 7\n\"enable.ssl.certificate.verification\" = false",
            "bootstrap.servers = \"a:1\"\nlinger.ms = \"7\"\nenable.ssl.certificate.verification = false",
        ] {
            let config = read(toml).unwrap().producing(1_000);
            assert_eq!(config.get("bootstrap.servers"), Some("a:1"));
            assert_eq!(config.get("linger.ms"), Some("7"));
            assert_eq!(config.get("batch.size"), Some("1000"));
            assert_eq!(config.get("message.timeout.ms"), Some("0"));
        }
    }

    #[test]
    fn what_would_break_a_promise_is_refused_with_its_reason() {
        for name in [
            "acks",
            "enable.idempotence",
            "message.timeout.ms",
            "socket.timeout.ms",
            "retries",
            "transactional.id",
        ] {
            let (key, why) = read(&format!("bootstrap.servers = \"a:1\"\n\"{name}\" = \"1\"")).unwrap_err();
            assert!(key == name && why.contains("the relay's to set"), "{key}: {why}");
        }
    }

    #[test]
    fn secrets_are_named_and_never_shown() {
        let settings = read("bootstrap.servers = \"a:1\"\nsasl.password = \"secret:kafka\"").unwrap();
        assert_eq!(settings.connecting().get("sasl.password"), Some("hunter2"));
        assert!(!format!("{settings:?}").contains("hunter2"));
        let (key, why) = read("bootstrap.servers = \"a:1\"\nsasl.password = \"hunter2\"").unwrap_err();
        assert!(key == "sasl.password" && why.contains("secret:NAME") && !why.contains("hunter2"), "{why}");
        let (_, why) = read("bootstrap.servers = \"a:1\"\nsasl.password = \"secret:other\"").unwrap_err();
        assert!(why.contains("[secret.other]"), "{why}");
    }

    #[test]
    fn a_property_that_is_missing_unknown_or_wrong_is_named() {
        for (toml, key) in [
            ("", "bootstrap.servers"),
            ("bootstrap.servers = \"a:1\"\nlingr.ms = 5", "lingr.ms"),
            ("bootstrap.servers = \"a:1\"\nlinger.ms = \"soon\"", "linger.ms"),
            ("bootstrap.servers = [\"a:1\"]", "bootstrap.servers"),
            ("bootstrap.servers = \"secret:kafka\"", "bootstrap.servers"),
            ("bootstrap.servers = \"a:1\"\ntest.mock.num.brokers = 1", "test.mock.num.brokers"),
        ] {
            assert_eq!(read(toml).unwrap_err().0, key, "{toml}");
        }
    }
}
