// SPDX-License-Identifier: PostgreSQL
//! The options of a subscription: checked when it is made, read by the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::destination::Destination;
use crate::duration;
use crate::headers::{check_subscription_name, check_value};
use crate::names::is_name;

/// In which order a subscription's events go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    /// The events of one key one after the other; keys, and events without one, side by side.
    Key,
    /// Side by side, whatever the key.
    None,
}

/// What becomes of a subscription whose database was restored from a dump or adopted as a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRestore {
    /// It waits for `dtm.resume`, so that a copy of production does not call production's customers.
    Pause,
    /// It goes on.
    Continue,
}

/// What becomes of a key whose event is a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDead {
    /// Its later events go on.
    Continue,
    /// They wait until the dead letter is redriven or discarded.
    Block,
}

/// What becomes of a subscription that lags too far behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLag {
    /// It holds the log, and operators are told.
    Keep,
    /// It loses what it has not had, and waits for `dtm.rewind`.
    Drop,
}

/// In which form an event becomes a Kafka record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// CloudEvents' Kafka binding, binary content mode: attributes are headers, the value is the payload as it is.
    Binary,
    /// The same, structured content mode: the value is the event in CloudEvents' JSON format.
    Structured,
    /// The layout of Debezium's outbox event router: the header `id`, and the value is the payload as it is.
    Debezium,
}

/// How often an event reaches Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    /// At least once.
    AtLeastOnce,
    /// Once, for consumers that read what is committed.
    ExactlyOnce,
}

/// When a failed attempt is followed by another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Delays with a bound that doubles.
    Exponential {
        /// The bound of the first delay.
        base: Duration,
        /// The greatest bound.
        cap: Duration,
        /// How many attempts there are, the first included.
        attempts: u32,
    },
    /// One bound after each attempt; the last attempt comes after the last of them.
    Schedule(Vec<Duration>),
}

impl Retry {
    /// How long after its first attempt an event is tried for the last time, at the most; attempts themselves not counted.
    pub fn longest(&self) -> Duration {
        match self {
            Retry::Exponential { base, cap, attempts } => (1..*attempts)
                .map(|nth| base.saturating_mul(1 << (nth - 1).min(31)).min(*cap))
                .fold(Duration::ZERO, Duration::saturating_add),
            Retry::Schedule(delays) => delays.iter().copied().fold(Duration::ZERO, Duration::saturating_add),
        }
    }
}

/// The value of a header that goes with every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderSource {
    /// This text.
    Text(String),
    /// A secret that the relay's configuration holds under this name.
    Secret(String),
}

/// The options of a subscription, with their defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How long one attempt may take, connecting included.
    pub timeout: Duration,
    /// How many events may be on their way at once.
    pub max_in_flight: u32,
    /// In which order events go out.
    pub ordering: Ordering,
    /// How many requests may be made in a second.
    pub rate_limit: Option<f64>,
    /// When a failed attempt is followed by another.
    pub retry: Retry,
    /// What a dead letter does to its key.
    pub on_dead: OnDead,
    /// Into how many parts the subscription is split, by hash of the key: relays share them.
    pub shards: u32,
    /// Headers that go with every request, by lower-case name.
    pub headers: BTreeMap<String, HeaderSource>,
    /// What a restore does.
    pub on_restore: OnRestore,
    /// What happens when it lags further behind than it may.
    pub on_lag: OnLag,
    /// How old the oldest event that it has not had may be.
    pub max_lag: Duration,
    /// How many bytes of the log it may not have had.
    pub max_lag_bytes: Option<u64>,
    /// In which form an event becomes a Kafka record.
    pub format: Format,
    /// How often an event reaches Kafka.
    pub delivery: Guarantee,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Duration::from_secs(15),
            max_in_flight: 32,
            ordering: Ordering::Key,
            rate_limit: None,
            retry: Retry::Exponential {
                base: Duration::from_secs(1),
                cap: Duration::from_secs(3_600),
                attempts: 25,
            },
            on_dead: OnDead::Continue,
            shards: 1,
            headers: BTreeMap::new(),
            on_restore: OnRestore::Pause,
            on_lag: OnLag::Keep,
            max_lag: Duration::from_secs(86_400),
            max_lag_bytes: None,
            format: Format::Binary,
            delivery: Guarantee::AtLeastOnce,
        }
    }
}

/// Every option with what it takes, for hints.
pub const OPTIONS: &str = "timeout (duration, above 0, at most 1h; not for kafka), \
    max_in_flight (1 to 1024, for kafka to 100000), \
    ordering (\"key\" or \"none\"), rate_limit (requests a second, 0.001 to 1000000), retry_base (duration, above 0), \
    retry_cap (duration, at least retry_base), retry_attempts (1 to 100), \
    retry_schedule (1 to 99 durations, instead of the three before), on_dead (\"continue\" or \"block\"), \
    shards (1 to 64), headers (an object of strings; \"secret:NAME\" is looked up by the relay), \
    on_restore (\"pause\" or \"continue\"), on_lag (\"keep\" or \"drop\"), max_lag (duration, above 0), \
    max_lag_bytes (1 to 1 PiB), and for kafka format (\"binary\", \"structured\" or \"debezium\") and \
    delivery (\"at-least-once\" or \"exactly-once\")";

/// The most calls that an HTTP endpoint gets at once.
const HTTP_IN_FLIGHT_MAX: u32 = 1_024;
/// The most records that are handed to Kafka's client before the first is acknowledged.
const KAFKA_IN_FLIGHT_MAX: u32 = 100_000;
/// So many unless it is said.
const KAFKA_IN_FLIGHT: u32 = 20_000;

/// The most headers that a subscription may add.
const HEADERS_MAX: usize = 32;

const LAG_BYTES_MAX: u64 = 1 << 50;

/// Credentials by their names: they must not stand in a table as text.
const CREDENTIALS: [&str; 8] = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "x-api-key",
    "api-key",
    "x-auth-token",
    "x-access-token",
    "x-amz-security-token",
];
/// Those of them that an event may not set, and a subscription may.
const RESERVED_CREDENTIALS: [&str; 3] = ["authorization", "proxy-authorization", "cookie"];

/// What is wrong with the options of a subscription.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// The whole is no JSON object.
    #[error("options are a JSON object")]
    NotAnObject,
    /// A name that there is no option of.
    #[error("there is no option {0:?}")]
    Unknown(String),
    /// A value that the option does not take.
    #[error("option {option:?} cannot be {value}")]
    Value {
        /// The option's name.
        option: String,
        /// The value that was given, as JSON.
        value: String,
    },
    /// Options that do not go together, or not with the destination.
    #[error("option {option:?} does not go with {with}")]
    Mismatch {
        /// The option's name.
        option: &'static str,
        /// What it does not go with.
        with: &'static str,
    },
}

impl Options {
    /// Reads options from JSON as [`Options::from_json`] does, and checks that they go with the destination.
    pub fn for_destination(json: &Value, destination: &Destination) -> Result<Self, OptionError> {
        let mut options = Options::from_json(json)?;
        let is_given = |name: &str| json.get(name).is_some();
        let mismatch = |option, with| Err(OptionError::Mismatch { option, with });
        let is_once = options.delivery == Guarantee::ExactlyOnce;
        match destination {
            Destination::Http(_) => {
                if let Some(option) = ["format", "delivery"].into_iter().find(|name| is_given(name)) {
                    return mismatch(option, "an HTTP destination");
                }
                if options.max_in_flight > HTTP_IN_FLIGHT_MAX {
                    return Err(bad("max_in_flight", &json["max_in_flight"]));
                }
            }
            Destination::Postgres { .. } => {
                if let Some(option) =
                    ["format", "delivery", "headers"].into_iter().find(|name| is_given(name))
                {
                    return mismatch(option, "a function in PostgreSQL");
                }
                if options.max_in_flight > HTTP_IN_FLIGHT_MAX {
                    return Err(bad("max_in_flight", &json["max_in_flight"]));
                }
            }
            Destination::Kafka { .. } => {
                if is_given("timeout") {
                    return mismatch(
                        "timeout",
                        "a Kafka destination: a record waits until its cluster is back",
                    );
                }
                if !is_given("max_in_flight") {
                    options.max_in_flight = KAFKA_IN_FLIGHT;
                }
                if is_once && options.on_dead == OnDead::Block {
                    return mismatch("on_dead", "\"delivery\": \"exactly-once\"");
                }
                let given =
                    ["rate_limit", "ordering", "max_in_flight"].into_iter().find(|name| is_given(name));
                if let Some(option) = given.filter(|_| is_once) {
                    return mismatch(option, "\"delivery\": \"exactly-once\"");
                }
            }
        }
        Ok(options)
    }

    /// Reads options from JSON. Unknown names and values out of bounds are errors; what is absent has its default.
    pub fn from_json(json: &Value) -> Result<Self, OptionError> {
        let object = json.as_object().ok_or(OptionError::NotAnObject)?;
        let mut options = Options { retry: retry(object)?, ..Options::default() };
        for (name, value) in object {
            let known = options.set(name, value).ok_or_else(|| bad(name, value))?;
            if !known {
                return Err(OptionError::Unknown(name.clone()));
            }
        }
        Ok(options)
    }

    /// Sets an option; `None` for a value that it does not take, false for a name that there is no option of.
    fn set(&mut self, name: &str, value: &Value) -> Option<bool> {
        match name {
            "timeout" => self.timeout = positive(value).filter(|t| *t <= Duration::from_secs(3_600))?,
            "max_in_flight" => self.max_in_flight = whole(value, KAFKA_IN_FLIGHT_MAX)?,
            "ordering" => self.ordering = one_of(value, &[("key", Ordering::Key), ("none", Ordering::None)])?,
            "rate_limit" => {
                self.rate_limit = Some(value.as_f64().filter(|rate| (0.001..=1e6).contains(rate))?);
            }
            "on_dead" => {
                self.on_dead = one_of(value, &[("continue", OnDead::Continue), ("block", OnDead::Block)])?;
            }
            "shards" => self.shards = whole(value, 64)?,
            "headers" => self.headers = headers(value)?,
            "on_restore" => {
                self.on_restore =
                    one_of(value, &[("pause", OnRestore::Pause), ("continue", OnRestore::Continue)])?;
            }
            "on_lag" => self.on_lag = one_of(value, &[("keep", OnLag::Keep), ("drop", OnLag::Drop)])?,
            "max_lag" => self.max_lag = positive(value)?,
            "max_lag_bytes" => {
                self.max_lag_bytes = Some(value.as_u64().filter(|n| (1..=LAG_BYTES_MAX).contains(n))?);
            }
            "format" => {
                let known = [
                    ("binary", Format::Binary),
                    ("structured", Format::Structured),
                    ("debezium", Format::Debezium),
                ];
                self.format = one_of(value, &known)?;
            }
            "delivery" => {
                let known =
                    [("at-least-once", Guarantee::AtLeastOnce), ("exactly-once", Guarantee::ExactlyOnce)];
                self.delivery = one_of(value, &known)?;
            }
            "retry_base" | "retry_cap" | "retry_attempts" | "retry_schedule" => {}
            _ => return Some(false),
        }
        Some(true)
    }
}

fn bad(name: &str, value: &Value) -> OptionError {
    OptionError::Value { option: name.to_owned(), value: value.to_string() }
}

fn positive(value: &Value) -> Option<Duration> {
    duration::from_json(value).ok().filter(|duration| !duration.is_zero())
}

fn whole(value: &Value, most: u32) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=most).contains(n))
}

fn one_of<T: Copy>(value: &Value, known: &[(&str, T)]) -> Option<T> {
    let text = value.as_str()?;
    known.iter().find(|(name, _)| *name == text).map(|(_, meaning)| *meaning)
}

fn retry(object: &Map<String, Value>) -> Result<Retry, OptionError> {
    if let Some(value) = object.get("retry_schedule") {
        if let Some(other) =
            ["retry_base", "retry_cap", "retry_attempts"].iter().find(|n| object.contains_key(**n))
        {
            let value = format!("{}: it does not go with {other}", value);
            return Err(OptionError::Value { option: "retry_schedule".into(), value });
        }
        let delays = value.as_array().filter(|delays| (1..=99).contains(&delays.len()));
        let delays = delays.and_then(|delays| delays.iter().map(|d| duration::from_json(d).ok()).collect());
        return delays.map(Retry::Schedule).ok_or_else(|| bad("retry_schedule", value));
    }
    let Retry::Exponential { mut base, mut cap, mut attempts } = Options::default().retry else {
        return Ok(Options::default().retry);
    };
    if let Some(value) = object.get("retry_base") {
        base = positive(value).ok_or_else(|| bad("retry_base", value))?;
    }
    if let Some(value) = object.get("retry_cap") {
        cap = positive(value).ok_or_else(|| bad("retry_cap", value))?;
    }
    if let Some(value) = object.get("retry_attempts") {
        attempts = whole(value, 100).ok_or_else(|| bad("retry_attempts", value))?;
    }
    if cap < base {
        let value = format!("{} s: it is below retry_base", cap.as_secs_f64());
        return Err(OptionError::Value { option: "retry_cap".into(), value });
    }
    Ok(Retry::Exponential { base, cap, attempts })
}

pub(crate) fn headers(value: &Value) -> Option<BTreeMap<String, HeaderSource>> {
    let object = value.as_object().filter(|object| object.len() <= HEADERS_MAX)?;
    let mut found = BTreeMap::new();
    for (name, value) in object {
        let text = value.as_str().filter(|text| check_value(text).is_ok())?;
        let source = match text.strip_prefix("secret:") {
            Some(secret) => HeaderSource::Secret(is_name(secret).then(|| secret.to_owned())?),
            None => HeaderSource::Text(text.to_owned()),
        };
        let lower = name.to_ascii_lowercase();
        if CREDENTIALS.contains(&lower.as_str()) && matches!(source, HeaderSource::Text(_)) {
            return None;
        }
        if !RESERVED_CREDENTIALS.contains(&lower.as_str()) {
            check_subscription_name(name).ok()?;
        }
        if found.insert(lower, source).is_some() {
            return None;
        }
    }
    Some(found)
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
