// SPDX-License-Identifier: PostgreSQL
//! Durations as users write them: a number of seconds, or a string with its unit.

use std::time::Duration;

use serde_json::Value;

/// The longest duration that can be written, in seconds: a hundred years.
const SECONDS_MAX: f64 = 100.0 * 365.25 * 86_400.0;

/// A text or value that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is no duration: it is a number of seconds, or a string with its unit, such as \"500ms\", \"15s\", \"10min\", \"2h\" or \"3d\""
)]
pub struct MalformedDuration(String);

/// Reads a duration: `15`, `0.5`, `500ms`, `15s`, `10m` or `10min`, `2h`, `3d`. Neither negative nor over a hundred years.
pub fn parse(text: &str) -> Result<Duration, MalformedDuration> {
    let malformed = || MalformedDuration(format!("{text:?}"));
    let trimmed = text.trim();
    let unit_at = trimmed.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(unit_at);
    let seconds_per_unit = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err(malformed()),
    };
    let number: f64 = number.trim_end().parse().map_err(|_| malformed())?;
    from_seconds(number * seconds_per_unit).ok_or_else(malformed)
}

/// Reads a duration from JSON: a number of seconds, or a string for [`parse`].
pub fn from_json(value: &Value) -> Result<Duration, MalformedDuration> {
    let malformed = || MalformedDuration(value.to_string());
    match value {
        Value::Number(seconds) => seconds.as_f64().and_then(from_seconds).ok_or_else(malformed),
        Value::String(text) => parse(text),
        _ => Err(malformed()),
    }
}

/// A duration of that many seconds; `None` if it is negative, not finite or over a hundred years.
pub fn from_seconds(seconds: f64) -> Option<Duration> {
    (0.0..=SECONDS_MAX).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_or_have_a_unit() {
        let cases = [
            ("15", 15_000),
            ("0.5", 500),
            ("500ms", 500),
            ("1.5s", 1_500),
            ("10m", 600_000),
            ("10 min", 600_000),
            ("2h", 7_200_000),
            ("3d", 259_200_000),
        ];
        for (text, ms) in cases {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(from_json(&serde_json::json!(0.25)), Ok(Duration::from_millis(250)));
        assert_eq!(from_json(&serde_json::json!("2h")), Ok(Duration::from_secs(7_200)));
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for bad in ["", "s", "-1", "1w", "1e99", "inf", "NaN", "5 5", "1h30m"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for bad in [serde_json::json!(-1), serde_json::json!(null), serde_json::json!(true)] {
            assert!(from_json(&bad).is_err(), "{bad}");
        }
    }
}
