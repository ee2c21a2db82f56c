// SPDX-License-Identifier: PostgreSQL
//! An event as a Kafka record: the Kafka binding of CloudEvents 1.0.2 in binary or structured content mode, or the layout of
//! Debezium's outbox event router.

use std::borrow::Cow;

use dtm_core::options::Format;
use dtm_core::page::Event;
use rdkafka::message::{Header, OwnedHeaders};

use super::cloudevents::{self, Own, SPEC_VERSION, Unsendable};
use super::cloudevents_json;

/// The media type of an event in CloudEvents' JSON format (§3.3.2 of the binding).
const STRUCTURED: &str = "application/cloudevents+json";

/// Framing of a record and a header in a batch, about (KIP-98): the most that they have.
const RECORD_FRAME: usize = 90;
const HEADER_FRAME: usize = 10;

/// So many headers there is room for before more is made.
const HEADERS: usize = 12;

/// A record, but for its topic and its key.
pub struct Record<'a> {
    /// Its headers; they are taken when it is sent.
    pub headers: Option<OwnedHeaders>,
    /// `None`: a tombstone.
    pub value: Option<Cow<'a, [u8]>>,
    /// What it takes in a batch before compression, at the most.
    pub size: usize,
}

/// Headers as they are put together.
struct Headers {
    list: Option<OwnedHeaders>,
    size: usize,
}

impl Headers {
    fn add(&mut self, name: &str, value: &str) {
        let list = self.list.take().unwrap_or_else(|| OwnedHeaders::new_with_capacity(HEADERS));
        self.list = Some(list.insert(Header { key: name, value: Some(value) }));
        self.size += name.len() + value.len() + HEADER_FRAME;
    }
}

/// The record of an event. `source` is its `source` attribute, `headers` those of the subscription.
pub fn record<'a>(
    event: &'a Event,
    format: Format,
    source: &str,
    subscription: &[(String, String)],
) -> Result<Record<'a>, Unsendable> {
    let mut headers = Headers { list: None, size: 0 };
    for (name, value) in subscription {
        headers.add(name, value);
    }
    let of_subscription = |name: &str| subscription.iter().any(|(set, _)| set.eq_ignore_ascii_case(name));
    let mut id = uuid::Uuid::encode_buffer();
    let id: &str = event.id.hyphenated().encode_lower(&mut id);
    let value = match format {
        Format::Structured => {
            headers.add("content-type", STRUCTURED);
            let text = cloudevents_json::envelope(event, source, |name, value| {
                if !of_subscription(name) {
                    headers.add(name, value);
                }
            })?;
            Some(Cow::Owned(text.into_bytes()))
        }
        Format::Binary | Format::Debezium => {
            if format == Format::Debezium {
                headers.add("id", id);
            } else {
                attributes(event, id, source, |name, value| headers.add(name, value));
                if event.payload.is_some() {
                    headers.add("content-type", &event.content_type);
                }
            }
            cloudevents::own_headers(event, |own, value| {
                match own {
                    Own::Attribute(name) => headers.add(&["ce_", name].concat(), value),
                    Own::Header(name) if of_subscription(name) => {}
                    Own::Header(name) => headers.add(name, value),
                }
                Ok(())
            })?;
            event.payload.as_deref().map(Cow::Borrowed)
        }
    };
    let key = event.key.as_ref().map_or(0, |key| key.len());
    let size = RECORD_FRAME + headers.size + key + value.as_ref().map_or(0, |value| value.len());
    Ok(Record { headers: headers.list, value, size })
}

/// All attributes that pg_dtm sets, by the names of their headers (§3.2.3.1).
fn attributes(event: &Event, id: &str, source: &str, mut each: impl FnMut(&str, &str)) {
    each("ce_id", id);
    each("ce_source", source);
    each("ce_type", &event.topic);
    each("ce_specversion", SPEC_VERSION);
    each("ce_time", &cloudevents::time(event.published_at_us));
    // An attribute must not be empty; as a record's key an empty one is a key like any other.
    if let Some(key) = event.key.as_ref().filter(|key| !key.is_empty()) {
        each("ce_partitionkey", key);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rdkafka::message::Headers as _;
    use serde_json::Value;

    use super::*;

    fn event() -> Event {
        Event {
            seq: 1,
            published_at_us: 1_767_225_600_000_001,
            id: uuid::uuid!("0193f000-1234-7abc-8def-0123456789ab"),
            topic: "orders.created".into(),
            key: Some("Zürich 1".into()),
            content_type: "application/json".into(),
            headers: Some(r#"{"ce-subject": "a b", "traceparent": "00-ab", "x-tenant": "own"}"#.into()),
            payload: Some(Bytes::from_static(b"{\"n\": 1.50}")),
        }
    }

    fn texts(record: &Record<'_>) -> Vec<(String, String)> {
        let text = |header: Header<'_, &[u8]>| {
            (header.key.to_owned(), String::from_utf8(header.value.unwrap().to_vec()).unwrap())
        };
        record.headers.as_ref().unwrap().iter().map(text).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn binary_mode_has_attributes_as_headers_and_the_payload_as_it_is() {
        let (event, set) = (event(), [("x-tenant".to_owned(), "7".to_owned())]);
        let record = record(&event, Format::Binary, "/pg_dtm/shop", &set).unwrap();
        assert_eq!(
            texts(&record),
            pairs(&[
                ("x-tenant", "7"),
                ("ce_id", "0193f000-1234-7abc-8def-0123456789ab"),
                ("ce_source", "/pg_dtm/shop"),
                ("ce_type", "orders.created"),
                ("ce_specversion", "1.0"),
                ("ce_time", "2026-01-01T00:00:00.000001Z"),
                ("ce_partitionkey", "Zürich 1"),
                ("content-type", "application/json"),
                ("ce_subject", "a b"),
                ("traceparent", "00-ab"),
            ])
        );
        assert_eq!(record.value.as_deref(), Some(&b"{\"n\": 1.50}"[..]));
    }

    #[test]
    fn structured_mode_has_the_event_as_json() {
        let structured = |event: &Event| -> Value {
            let record = record(event, Format::Structured, "/s", &[]).unwrap();
            let content_type = ("content-type".to_owned(), STRUCTURED.to_owned());
            assert!(texts(&record).contains(&content_type));
            serde_json::from_slice(&record.value.unwrap()).unwrap()
        };
        let found = structured(&event());
        assert_eq!(found["data"], serde_json::json!({"n": 1.50}));
        assert_eq!((&found["subject"], &found["partitionkey"]), (&"a b".into(), &"Zürich 1".into()));
        assert_eq!(
            (&found["specversion"], &found["datacontenttype"]),
            (&"1.0".into(), &"application/json".into())
        );
        let bytes =
            Event { content_type: "image/png".into(), payload: Some(Bytes::from_static(b"\xff")), ..event() };
        assert_eq!(structured(&bytes)["data_base64"], "/w==");
        let text =
            Event { content_type: "text/plain".into(), payload: Some(Bytes::from_static(b"a")), ..event() };
        assert_eq!(structured(&text)["data"], "a");
        let nothing = structured(&Event { payload: None, ..event() });
        assert!(nothing.get("data").is_none() && nothing.get("datacontenttype").is_none());
    }

    #[test]
    fn debeziums_layout_has_the_id_and_a_null_payload_is_a_tombstone() {
        let event = Event { headers: None, ..event() };
        let found = record(&event, Format::Debezium, "/s", &[]).unwrap();
        assert_eq!(texts(&found), pairs(&[("id", "0193f000-1234-7abc-8def-0123456789ab")]));
        let none = Event { payload: None, ..event.clone() };
        for format in [Format::Debezium, Format::Binary] {
            assert!(record(&none, format, "/s", &[]).unwrap().value.is_none());
            let empty = Event { payload: Some(Bytes::new()), ..event.clone() };
            assert_eq!(record(&empty, format, "/s", &[]).unwrap().value.as_deref(), Some(&b""[..]));
        }
    }
}
