// SPDX-License-Identifier: PostgreSQL
//! An event in the JSON format of CloudEvents 1.0.2.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use dtm_core::page::Event;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use super::cloudevents::{self, Own, SPEC_VERSION, Unsendable};

/// The event as one JSON object; its own headers that are no attributes go to `header`. JSON in it is as it was published, with
/// all digits of its numbers.
pub fn envelope(
    event: &Event,
    source: &str,
    mut header: impl FnMut(&str, &str),
) -> Result<String, Unsendable> {
    let wrong = |error: serde_json::Error| Unsendable(error.to_string());
    let mut members = BTreeMap::new();
    let text = |value: &str| to_raw_value(value).map_err(wrong);
    for (name, value) in [
        ("specversion", SPEC_VERSION),
        ("id", &event.id.to_string()),
        ("source", source),
        ("type", &event.topic),
        ("time", &cloudevents::time(event.published_at_us)),
    ] {
        members.insert(name.to_owned(), text(value)?);
    }
    // An attribute must not be empty.
    if let Some(key) = event.key.as_ref().filter(|key| !key.is_empty()) {
        members.insert("partitionkey".to_owned(), text(key)?);
    }
    cloudevents::own_headers(event, |own, value| {
        match own {
            Own::Attribute(name) => {
                let value = to_raw_value(value).map_err(|error| error.to_string())?;
                members.insert(name.to_owned(), value);
            }
            Own::Header(name) => header(name, value),
        }
        Ok(())
    })?;
    if event.payload.is_some() {
        members.insert("datacontenttype".to_owned(), text(&event.content_type)?);
    }
    if let Some((name, value)) = data(event).map_err(wrong)? {
        members.insert(name.to_owned(), value);
    }
    serde_json::to_string(&members).map_err(wrong)
}

/// The payload (§3.1): JSON as it is, text as a string, other bytes in Base64.
fn data(event: &Event) -> Result<Option<(&'static str, Box<RawValue>)>, serde_json::Error> {
    let Some(payload) = &event.payload else { return Ok(None) };
    let media = event.content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let text = std::str::from_utf8(payload).ok();
    if media.ends_with("/json") || media.ends_with("+json") {
        if let Some(json) = text.and_then(|text| serde_json::from_str::<Box<RawValue>>(text).ok()) {
            return Ok(Some(("data", json)));
        }
    } else if let Some(text) = text.filter(|_| media.starts_with("text/")) {
        return Ok(Some(("data", to_raw_value(text)?)));
    }
    Ok(Some(("data_base64", to_raw_value(&Value::from(BASE64.encode(payload)))?)))
}
