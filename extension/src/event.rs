// SPDX-License-Identifier: PostgreSQL
//! One event on its way into the log: every rule for what may be published.

use dtm_core::headers::{self, HEADERS_BYTES_MAX, HeaderError, KEY_BYTES_MAX};
use dtm_core::topic;
use pgrx::prelude::*;

use crate::refusal::{Refusal, quoted};
use crate::{settings, varlena};

/// An event that was checked, as values of the log's columns.
#[derive(Clone, Copy, Debug)]
pub struct NewEvent {
    /// Its id, and whether the publisher gave it.
    pub id: [u8; 16],
    /// A given id must not have been published before.
    pub id_given: bool,
    /// text
    pub topic: pg_sys::Datum,
    /// text
    pub key: Option<pg_sys::Datum>,
    /// text; none: `application/json`
    pub content_type: Option<pg_sys::Datum>,
    /// text: a JSON object of strings
    pub headers: Option<pg_sys::Datum>,
    /// bytea
    pub payload: Option<pg_sys::Datum>,
    /// Not before this time.
    pub deliver_at: Option<pg_sys::TimestampTz>,
}

const TOPIC_HINT: &str = "A topic is dot-separated segments of letters, digits, \"_\" and \"-\", such as orders.created, \
     in at most 249 bytes.";

/// Checks a topic (an argument of type text).
///
/// # Safety
/// `topic` is null or a text value.
pub unsafe fn check_topic(topic: Option<pg_sys::Datum>) -> Result<pg_sys::Datum, Refusal> {
    let Some(datum) = topic else {
        return Err(Refusal::argument("the topic is missing", "It is null.", TOPIC_HINT));
    };
    // SAFETY: by this function's contract.
    let text = String::from_utf8_lossy(unsafe { varlena::bytes(datum) });
    match topic::check_topic(&text) {
        Ok(()) => Ok(datum),
        Err(error) => {
            let detail = format!("The topic is {}: {error}.", quoted(&text));
            Err(Refusal::argument("malformed topic", detail, TOPIC_HINT))
        }
    }
}

/// Checks a key: its length is that of what is delivered.
///
/// # Safety
/// `key` is a text value.
pub unsafe fn check_key(key: pg_sys::Datum) -> Result<pg_sys::Datum, Refusal> {
    // SAFETY: by this function's contract.
    let length = varlena::check_utf8(unsafe { varlena::bytes(key) }, "key")?.len();
    if length > KEY_BYTES_MAX {
        let detail = format!("It has {length} bytes, at most {KEY_BYTES_MAX} are allowed.");
        return Err(Refusal::limit(
            "the key is too long",
            detail,
            "Publish a short identifier of the aggregate as key.",
        ));
    }
    Ok(key)
}

/// The body of an event that came as jsonb: its text in UTF-8.
///
/// # Safety
/// `payload` is a jsonb value.
pub unsafe fn json_body(payload: pg_sys::Datum) -> Result<pg_sys::Datum, Refusal> {
    // SAFETY: by this function's contract; json_text answers a text value.
    unsafe {
        let text = varlena::json_text(payload);
        let stored = varlena::bytes(text);
        let body = varlena::check_utf8(stored, "payload")?;
        Ok(if std::ptr::eq(body, stored) { text } else { varlena::from_bytes(body) })
    }
}

/// Checks the size of a payload.
///
/// # Safety
/// `payload` is a bytea value.
pub unsafe fn check_payload(payload: pg_sys::Datum) -> Result<pg_sys::Datum, Refusal> {
    // SAFETY: by this function's contract; looks at the header only.
    let length = unsafe { pg_sys::toast_raw_datum_size(payload) } - 4;
    let max = settings::max_payload_bytes();
    if length > max {
        let detail = format!("It has {length} bytes; dtm.max_payload is {max}.");
        return Err(Refusal::limit(
            "the payload is too large",
            detail,
            "Store the body elsewhere and publish a reference to it.",
        ));
    }
    Ok(payload)
}

/// Checks the content type of a payload that came as bytes.
///
/// # Safety
/// `content_type` is null or a text value.
pub unsafe fn check_content_type(content_type: Option<pg_sys::Datum>) -> Result<pg_sys::Datum, Refusal> {
    const HINT: &str = "Pass the media type of the payload, such as 'application/octet-stream'.";
    let Some(datum) = content_type else {
        return Err(Refusal::argument("the content type is missing", "It is null.", HINT));
    };
    // SAFETY: by this function's contract.
    let text = String::from_utf8_lossy(unsafe { varlena::bytes(datum) });
    if headers::is_content_type(&text) {
        return Ok(datum);
    }
    Err(Refusal::argument("malformed content type", format!("It is {}.", quoted(&text)), HINT))
}

/// Checks headers and answers their text; none for an empty object.
///
/// # Safety
/// `headers` is a jsonb value.
pub unsafe fn check_headers(headers: pg_sys::Datum) -> Result<Option<pg_sys::Datum>, Refusal> {
    // SAFETY: by this function's contract.
    let text = unsafe { varlena::json_text(headers) };
    // SAFETY: json_text answers a text value.
    let json = varlena::check_utf8(unsafe { varlena::bytes(text) }, "headers")?;
    let shape = |detail: String| {
        let hint = "Pass a flat JSON object of strings, such as {\"x-tenant\": \"7\"}.";
        Refusal::argument("malformed headers", detail, hint)
    };
    if json.len() > HEADERS_BYTES_MAX {
        let detail = format!("They have {} bytes, at most {HEADERS_BYTES_MAX} are allowed.", json.len());
        return Err(Refusal::limit(
            "the headers are too large",
            detail,
            "Put what is large into the payload.",
        ));
    }
    let value: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| shape(format!("They cannot be read: {error}.")))?;
    let Some(object) = value.as_object() else {
        return Err(shape(format!("They are {}.", quoted(&value.to_string()))));
    };
    let mut names = std::collections::HashSet::with_capacity(object.len());
    for (name, value) in object {
        let Some(value) = value.as_str() else {
            return Err(shape(format!(
                "Header {} has the value {}.",
                quoted(name),
                quoted(&value.to_string())
            )));
        };
        headers::check(name, value).map_err(|error| header_refusal(name, error))?;
        if !names.insert(name.to_ascii_lowercase()) {
            return Err(shape(format!("Header {} is there twice: case makes no difference.", quoted(name))));
        }
    }
    Ok((!object.is_empty()).then_some(text))
}

fn header_refusal(name: &str, error: HeaderError) -> Refusal {
    let hint = match error {
        HeaderError::Reserved => {
            "The relay or the connection sets this header itself; choose another name. Of CloudEvents' attributes, \
             subject (ce-subject) and extensions are yours to set."
        }
        HeaderError::NotAToken => "A name has letters, digits and any of !#$%&'*+-.^_`|~ only.",
        HeaderError::AttributeName => "Name it like ce-subject.",
        HeaderError::EmptyAttribute => "Leave the attribute out, or give it a value.",
        HeaderError::ControlCharacter => {
            "Encode the value, for example as base64, or put it into the payload."
        }
    };
    Refusal::argument("malformed headers", format!("Header {}: {error}.", quoted(name)), hint)
}
