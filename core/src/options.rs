// SPDX-License-Identifier: PostgreSQL
//! The options of a subscription: checked when it is made, read by the relay.

use std::time::Duration;

use serde_json::Value;

use crate::duration;

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

/// The options of a subscription, with their defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long one attempt may take, connecting included.
    pub timeout: Duration,
    /// How many requests may be on their way at once.
    pub max_in_flight: u32,
    /// In which order events go out.
    pub ordering: Ordering,
    /// The bound of the first retry's delay; it doubles from there.
    pub retry_base: Duration,
    /// The greatest bound that it doubles up to.
    pub retry_cap: Duration,
    /// What a restore does.
    pub on_restore: OnRestore,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Duration::from_secs(15),
            max_in_flight: 32,
            ordering: Ordering::Key,
            retry_base: Duration::from_secs(1),
            retry_cap: Duration::from_secs(3_600),
            on_restore: OnRestore::Pause,
        }
    }
}

/// Every option with what it takes, for hints.
pub const OPTIONS: &str = "timeout (duration, above 0, at most 1h), max_in_flight (1 to 1024), \
    ordering (\"key\" or \"none\"), retry_base (duration, above 0), retry_cap (duration, at least retry_base), \
    on_restore (\"pause\" or \"continue\")";

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
}

impl Options {
    /// Reads options from JSON. Unknown names and values out of bounds are errors; what is absent has its default.
    pub fn from_json(json: &Value) -> Result<Self, OptionError> {
        let object = json.as_object().ok_or(OptionError::NotAnObject)?;
        let mut options = Options::default();
        for (name, value) in object {
            let bad = || OptionError::Value { option: name.clone(), value: value.to_string() };
            match name.as_str() {
                "timeout" => {
                    let longest = Duration::from_secs(3_600);
                    options.timeout = positive(value).filter(|t| *t <= longest).ok_or_else(bad)?;
                }
                "max_in_flight" => {
                    let count = value.as_u64().filter(|n| (1..=1_024).contains(n)).ok_or_else(bad)?;
                    options.max_in_flight = count as u32;
                }
                "ordering" => {
                    options.ordering = match value.as_str() {
                        Some("key") => Ordering::Key,
                        Some("none") => Ordering::None,
                        _ => return Err(bad()),
                    }
                }
                "retry_base" => options.retry_base = positive(value).ok_or_else(bad)?,
                "retry_cap" => options.retry_cap = positive(value).ok_or_else(bad)?,
                "on_restore" => {
                    options.on_restore = match value.as_str() {
                        Some("pause") => OnRestore::Pause,
                        Some("continue") => OnRestore::Continue,
                        _ => return Err(bad()),
                    }
                }
                _ => return Err(OptionError::Unknown(name.clone())),
            }
        }
        if options.retry_cap < options.retry_base {
            let value = format!("{} s: it is below retry_base", options.retry_cap.as_secs_f64());
            return Err(OptionError::Value { option: "retry_cap".into(), value });
        }
        Ok(options)
    }
}

fn positive(value: &Value) -> Option<Duration> {
    duration::from_json(value).ok().filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_options_have_their_defaults() {
        assert_eq!(Options::from_json(&json!({})), Ok(Options::default()));
    }

    #[test]
    fn options_are_read() {
        let json = json!({"timeout": "500ms", "max_in_flight": 4, "ordering": "none", "retry_base": 0.1,
                          "retry_cap": "10min", "on_restore": "continue"});
        let options = Options::from_json(&json).unwrap();
        assert_eq!(options.timeout, Duration::from_millis(500));
        assert_eq!(options.max_in_flight, 4);
        assert_eq!(options.ordering, Ordering::None);
        assert_eq!(options.retry_base, Duration::from_millis(100));
        assert_eq!(options.retry_cap, Duration::from_secs(600));
        assert_eq!(options.on_restore, OnRestore::Continue);
    }

    #[test]
    fn unknown_names_and_bad_values_are_refused() {
        assert_eq!(Options::from_json(&json!([])), Err(OptionError::NotAnObject));
        assert_eq!(Options::from_json(&json!({"timeuot": 1})), Err(OptionError::Unknown("timeuot".into())));
        for bad in [
            json!({"timeout": 0}),
            json!({"timeout": "2h"}),
            json!({"max_in_flight": 0}),
            json!({"max_in_flight": 1.5}),
            json!({"max_in_flight": 1025}),
            json!({"ordering": "fifo"}),
            json!({"retry_base": "soon"}),
            json!({"retry_cap": 0.5}),
            json!({"on_restore": null}),
        ] {
            assert!(matches!(Options::from_json(&bad), Err(OptionError::Value { .. })), "{bad}");
        }
    }
}
