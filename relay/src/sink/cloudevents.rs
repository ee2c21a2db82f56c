// SPDX-License-Identifier: PostgreSQL
//! What the bindings of CloudEvents 1.0.2 have in common.

use std::fmt;

use dtm_core::page::Event;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use serde::de::{Deserializer as _, MapAccess, Visitor};

/// The version of the specification that every event says.
pub const SPEC_VERSION: &str = "1.0";

/// An event that a sink has no form for. What was published through `dtm.publish` always has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unsendable(pub String);

impl Unsendable {
    /// Something of it does not fit a header.
    pub fn header(what: &str) -> Self {
        Unsendable(format!("{what} cannot be sent as a header"))
    }
}

/// A header that an event was published with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own<'a> {
    /// `ce-name`: the attribute of this name.
    Attribute(&'a str),
    /// Anything else.
    Header(&'a str),
}

/// Calls `each` with every header of the event's own, and its value.
pub fn own_headers(
    event: &Event,
    each: impl FnMut(Own<'_>, &str) -> Result<(), String>,
) -> Result<(), Unsendable> {
    let Some(json) = &event.headers else { return Ok(()) };
    let read = serde_json::Deserializer::from_str(json).deserialize_map(Each(each));
    read.map_err(|error| Unsendable::header(&format!("a header of its own ({error})")))
}

struct Each<F>(F);

impl<'de, F: FnMut(Own<'_>, &str) -> Result<(), String>> Visitor<'de> for Each<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<String, String>()? {
            let own = name.strip_prefix("ce-").map_or(Own::Header(&name), Own::Attribute);
            (self.0)(own, &value).map_err(serde::de::Error::custom)?;
        }
        Ok(())
    }
}

/// A time in microseconds since the Unix epoch, as RFC 3339 in UTC with microseconds.
pub fn time(us: i64) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
    let time = Timestamp::from_microsecond(us);
    PRINTER.timestamp_to_string(&time.unwrap_or(if us < 0 { Timestamp::MIN } else { Timestamp::MAX }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_always_have_microseconds() {
        assert_eq!(time(0), "1970-01-01T00:00:00.000000Z");
        assert!(time(i64::MAX).starts_with("9999-"));
    }
}
