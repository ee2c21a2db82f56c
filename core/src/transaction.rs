// SPDX-License-Identifier: PostgreSQL
//! What a global transaction is asked to do: steps and options, checked when it is made, read by the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Uri;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::destination::{Destination, DestinationError};
use crate::duration;
use crate::headers::{HEADERS_BYTES_MAX, KEY_BYTES_MAX};
use crate::names::is_name;
use crate::options::{HeaderSource, headers};

/// The topic of the events by which submitted transactions announce themselves; the key is the gid.
pub const TOPIC: &str = "dtm.transactions";

/// The destination of the subscription to [`TOPIC`]: the relay's coordinator.
pub const COORDINATOR: &str = "coordinator:";

/// The most steps of one transaction: what two digits of a branch's id can tell apart.
pub const STEPS_MAX: usize = 99;

const DAY: Duration = Duration::from_secs(86_400);

/// What a step calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A destination, as subscriptions have them.
    Call(Destination),
    /// `topic://NAME`: what is subscribed to a message topic (dtm.msg_topics) when the transaction is made.
    Topic(String),
}

impl Action {
    /// Reads an action.
    pub fn parse(text: &str) -> Result<Self, DestinationError> {
        match text.strip_prefix("topic://") {
            Some(name) if is_name(name) => Ok(Action::Topic(name.to_owned())),
            Some(_) => Err(DestinationError::Malformed),
            None => Destination::parse(text).map(Action::Call),
        }
    }
}

/// Who knows whether a prepared message is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decider {
    /// It answers as DTM's query-prepared does.
    Http(Uri),
    /// `postgres://TARGET`: a database of the relay's configuration, by dtm.query_prepared there.
    Postgres(String),
}

impl Decider {
    /// Reads what a message names.
    pub fn parse(text: &str) -> Result<Self, TransactionError> {
        match text.strip_prefix("postgres://") {
            Some(target) if is_name(target) => Ok(Decider::Postgres(target.to_owned())),
            Some(_) => Err(TransactionError::Decider),
            None => match Destination::parse(text) {
                Ok(Destination::Http(uri)) => Ok(Decider::Http(uri)),
                Ok(Destination::Kafka { .. } | Destination::Postgres { .. }) => {
                    Err(TransactionError::Decider)
                }
                Err(error) => Err(TransactionError::DeciderUri(error)),
            },
        }
    }
}

/// What is wrong with steps or options; the text is a full sentence without its stop.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransactionError {
    /// Not an array of 1 to [`STEPS_MAX`] objects.
    #[error(
        "steps are an array of 1 to {STEPS_MAX} objects, such as [{{\"action\": \"https://…\", \"payload\": {{}}}}]"
    )]
    Steps,
    /// A member that a step does not have.
    #[error("step {step} has a member {name:?}; a step has action, payload, key and headers")]
    Member {
        /// From 1 on.
        step: usize,
        /// Its name.
        name: String,
    },
    /// A step without an action, or one that is no text.
    #[error("step {0} has no action")]
    NoAction(usize),
    /// An action that is no destination.
    #[error("the action of step {step}: {error}")]
    Action {
        /// From 1 on.
        step: usize,
        /// What is wrong.
        error: DestinationError,
    },
    /// A key or headers where they mean nothing, or of a wrong shape.
    #[error(
        "step {step}: {name} is a text of at most {KEY_BYTES_MAX} bytes for key, an object of strings, \
         together at most {HEADERS_BYTES_MAX} bytes, for headers, and only for kafka://"
    )]
    Record {
        /// From 1 on.
        step: usize,
        /// `key` or `headers`.
        name: &'static str,
    },
    /// Neither HTTP nor a database.
    #[error("query_prepared is http://…, https://… or postgres://TARGET")]
    Decider,
    /// A URL that is none.
    #[error("query_prepared: {0}")]
    DeciderUri(DestinationError),
    /// Options are no JSON object.
    #[error("options are a JSON object")]
    NotAnObject,
    /// A name that there is no option of.
    #[error("there is no option {0:?}")]
    Unknown(String),
    /// A value that the option does not take.
    #[error("option {option:?} cannot be {value}")]
    Value {
        /// Its name.
        option: String,
        /// The value that was given, as JSON.
        value: String,
    },
}

/// What steps are made into.
#[derive(Debug, PartialEq, Eq)]
pub struct Branches {
    /// An array of objects: a step's members but for its payload, `branch_id`, which is 01, 02 and so on, and `op`.
    pub json: Value,
    /// Of each branch, as JSON text; `None`: the step has none.
    pub payloads: Vec<Option<String>>,
    /// Some of them call `topic://`.
    pub has_topics: bool,
}

/// Checks the steps of a transaction, which are JSON. Payloads are passed on as they are: what the database takes for a number may
/// be none to others.
pub fn branches(steps: &str) -> Result<Branches, TransactionError> {
    let steps: Vec<BTreeMap<String, &RawValue>> =
        serde_json::from_str(steps).map_err(|_| TransactionError::Steps)?;
    if !(1..=STEPS_MAX).contains(&steps.len()) {
        return Err(TransactionError::Steps);
    }
    let mut branches = Branches { json: Value::Null, payloads: Vec::new(), has_topics: false };
    let mut array = Vec::new();
    for (at, mut step) in steps.into_iter().enumerate() {
        branches.payloads.push(step.remove("payload").map(|payload| payload.get().to_owned()));
        let members = step.into_iter().map(|(name, value)| Ok((name, serde_json::from_str(value.get())?)));
        let members: Result<Map<String, Value>, serde_json::Error> = members.collect();
        let mut branch = members.map_err(|_| TransactionError::Steps)?;
        branches.has_topics |= check_step(at + 1, &branch)?;
        branch.insert("branch_id".into(), format!("{:02}", at + 1).into());
        branch.insert("op".into(), "action".into());
        array.push(Value::Object(branch));
    }
    branches.json = Value::Array(array);
    Ok(branches)
}

/// Answers whether it calls a topic.
fn check_step(step: usize, object: &Map<String, Value>) -> Result<bool, TransactionError> {
    let text = object.get("action").and_then(Value::as_str).ok_or(TransactionError::NoAction(step))?;
    let action = Action::parse(text).map_err(|error| TransactionError::Action { step, error })?;
    let is_record = matches!(action, Action::Call(Destination::Kafka { .. }));
    for (name, value) in object {
        match name.as_str() {
            "action" => {}
            "key" if is_record && value.as_str().is_some_and(|key| key.len() <= KEY_BYTES_MAX) => {}
            "headers" if is_record && headers(value).is_some_and(|_| is_small(value)) => {}
            "key" => return Err(TransactionError::Record { step, name: "key" }),
            "headers" => return Err(TransactionError::Record { step, name: "headers" }),
            _ => return Err(TransactionError::Member { step, name: name.clone() }),
        }
    }
    Ok(matches!(action, Action::Topic(_)))
}

/// Every option of a transaction with what it takes, for hints. The names are DTM's.
pub const OPTIONS: &str = "concurrent (boolean), delay (duration), timeout_to_fail (duration), \
    request_timeout (duration, at most 1h), retry_interval (duration, at most 1h), retry_limit (attempts of a branch), \
    branch_headers (an object of strings; \"secret:NAME\" is looked up by the relay), \
    success_status (\"2xx\" or \"200\"), outcome_in_body (boolean); 0 and null leave one at its default";

/// The options of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// All branches are called side by side.
    pub concurrent: bool,
    /// Not before so long after it was made.
    pub delay: Duration,
    /// What is prepared for longer is asked about.
    pub timeout_to_fail: Duration,
    /// What one call may take.
    pub request_timeout: Duration,
    /// The first bound of the pauses between attempts; it doubles.
    pub retry_interval: Duration,
    /// After so many failed attempts of a branch it stands still until somebody says what shall become of it.
    pub retry_limit: Option<u32>,
    /// Beside those of the protocol.
    pub branch_headers: BTreeMap<String, HeaderSource>,
    /// Only 200 is success: DTM's rule. Else any 2xx is.
    pub strict_success: bool,
    /// `FAILURE` and `ONGOING` anywhere in the body of an answer count: DTM's rule.
    pub outcome_in_body: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            concurrent: false,
            delay: Duration::ZERO,
            timeout_to_fail: Duration::from_secs(35),
            request_timeout: Duration::from_secs(3),
            retry_interval: Duration::from_secs(1),
            retry_limit: None,
            branch_headers: BTreeMap::new(),
            strict_success: false,
            outcome_in_body: false,
        }
    }
}

impl Options {
    /// Reads options from JSON. Unknown names and values out of bounds are errors; what is absent has its default.
    pub fn from_json(json: &Value) -> Result<Self, TransactionError> {
        let mut options = Options::default();
        for (name, value) in json.as_object().ok_or(TransactionError::NotAnObject)? {
            // Null and 0 are what clients send for what they do not say.
            let is_default = value.is_null() || value.as_f64() == Some(0.0);
            let set = if is_default {
                Options::default().set(name, value).or(Some(true))
            } else {
                options.set(name, value)
            };
            let wrong = || TransactionError::Value { option: name.clone(), value: value.to_string() };
            if !set.ok_or_else(wrong)? {
                return Err(TransactionError::Unknown(name.clone()));
            }
        }
        Ok(options)
    }

    /// Sets an option; `None` for a value that it does not take, false for a name that there is no option of.
    fn set(&mut self, name: &str, value: &Value) -> Option<bool> {
        let hour = Duration::from_secs(3_600);
        match name {
            "concurrent" => self.concurrent = value.as_bool()?,
            "delay" => self.delay = up_to(value, 366 * DAY)?,
            "timeout_to_fail" => self.timeout_to_fail = some(value, 366 * DAY)?,
            "request_timeout" => self.request_timeout = some(value, hour)?,
            "retry_interval" => self.retry_interval = some(value, hour)?,
            "retry_limit" => self.retry_limit = Some(u32::try_from(value.as_u64()?).ok()?),
            "branch_headers" => self.branch_headers = headers(value).filter(|_| is_small(value))?,
            "success_status" => {
                self.strict_success = match value.as_str()? {
                    "2xx" => false,
                    "200" => true,
                    _ => return None,
                }
            }
            "outcome_in_body" => self.outcome_in_body = value.as_bool()?,
            _ => return Some(false),
        }
        Some(true)
    }
}

/// Whether names and values of headers have no more bytes than an event's may have.
fn is_small(headers: &Value) -> bool {
    let bytes = |(name, value): (&String, &Value)| name.len() + value.as_str().map_or(0, str::len);
    headers.as_object().is_some_and(|all| all.iter().map(bytes).sum::<usize>() <= HEADERS_BYTES_MAX)
}

fn up_to(value: &Value, most: Duration) -> Option<Duration> {
    duration::from_json(value).ok().filter(|duration| *duration <= most)
}

/// The same of what cannot be nothing.
fn some(value: &Value, most: Duration) -> Option<Duration> {
    up_to(value, most).filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_are_actions_with_payloads() {
        let good = json!([
            {"action": "https://stock.internal/take", "payload": {"id": 1}},
            {"action": "http://127.0.0.1/x"},
            {"action": "topic://paid", "payload": null},
            {"action": "kafka://main/orders", "payload": 1, "key": "7", "headers": {"a": "b"}},
        ]);
        let made = branches(&good.to_string()).unwrap();
        assert_eq!(
            made.payloads,
            [Some("{\"id\":1}"), None, Some("null"), Some("1")].map(|p| p.map(str::to_owned))
        );
        assert_eq!(
            made.json[3],
            json!({"action": "kafka://main/orders", "key": "7", "headers": {"a": "b"},
                                        "branch_id": "04", "op": "action"})
        );
        assert!(made.has_topics);
    }

    #[test]
    fn a_payload_is_passed_on_as_it_is() {
        let deep = "[".repeat(5_000) + "1e400" + &"]".repeat(5_000);
        let made = branches(&format!(r#"[{{"action": "http://h/", "payload": {deep}}}]"#)).unwrap();
        assert_eq!((made.payloads, made.has_topics), (vec![Some(deep)], false));
    }

    #[test]
    fn a_wrong_step_is_named() {
        use TransactionError as E;
        let many = Value::Array(vec![json!({"action": "http://h/"}); 100]);
        for (bad, error) in [
            (json!({}), E::Steps),
            (json!([]), E::Steps),
            (many, E::Steps),
            (json!([{"action": "http://h/"}, 1]), E::Steps),
            (json!([{"payload": 1}]), E::NoAction(1)),
            (json!([{"action": "http://h/"}, {"action": 7}]), E::NoAction(2)),
            (json!([{"action": "h"}]), E::Action { step: 1, error: DestinationError::Malformed }),
            (json!([{"action": "topic://a b"}]), E::Action { step: 1, error: DestinationError::Malformed }),
            (json!([{"action": "http://h/", "key": "a"}]), E::Record { step: 1, name: "key" }),
            (json!([{"action": "kafka://m/t", "headers": 1}]), E::Record { step: 1, name: "headers" }),
            (
                json!([{"action": "kafka://m/t", "key": "k".repeat(1_025)}]),
                E::Record { step: 1, name: "key" },
            ),
            (json!([{"action": "http://h/", "data": 1}]), E::Member { step: 1, name: "data".into() }),
        ] {
            assert_eq!(branches(&bad.to_string()), Err(error), "{bad}");
        }
    }

    #[test]
    fn whoever_is_asked_is_a_service_or_a_database_and_no_function_of_it() {
        assert_eq!(Decider::parse("postgres://stock"), Ok(Decider::Postgres("stock".into())));
        assert!(matches!(Decider::parse("https://shop/asked?x=1"), Ok(Decider::Http(_))));
        for bad in [
            "",
            "h",
            "postgres://stock/app.f",
            "postgres://a b",
            "kafka://m/t",
            "http://u:p@h/",
            "http://h st/",
        ] {
            assert!(Decider::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_are_dtms_and_may_be_null_or_zero() {
        let options = json!({"concurrent": true, "delay": 0.5, "retry_interval": "200ms", "retry_limit": 0,
                             "request_timeout": null, "branch_headers": {"x-a": "b"}, "success_status": "200"});
        let options = Options::from_json(&options).unwrap();
        assert!(options.concurrent && options.strict_success && options.retry_limit.is_none());
        assert_eq!(options.delay, Duration::from_millis(500));
        assert_eq!(options.retry_interval, Duration::from_millis(200));
        assert_eq!(options.request_timeout, Duration::from_secs(3));
        for bad in [
            json!({"delay": -1}),
            json!({"retries": 1}),
            json!({"concurrent": "yes"}),
            json!([]),
            json!({"x": null}),
            json!({"branch_headers": {"x-a": "b".repeat(20_000)}}),
            json!({"retry_interval": "0s"}),
            json!({"request_timeout": "0ms"}),
        ] {
            assert!(Options::from_json(&bad).is_err(), "{bad}");
        }
    }
}
