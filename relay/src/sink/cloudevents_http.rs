// SPDX-License-Identifier: PostgreSQL
//! The HTTP binding of CloudEvents 1.0.2, binary content mode: attributes are headers, the body is the payload as it is.

use dtm_core::page::Event;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::cloudevents::{self, Own, Unsendable};

const ID: HeaderName = HeaderName::from_static("ce-id");
const SOURCE: HeaderName = HeaderName::from_static("ce-source");
const TYPE: HeaderName = HeaderName::from_static("ce-type");
const SPECVERSION: HeaderName = HeaderName::from_static("ce-specversion");
const TIME: HeaderName = HeaderName::from_static("ce-time");
const PARTITIONKEY: HeaderName = HeaderName::from_static("ce-partitionkey");

/// The headers of an event. `source` is already a header's value, see [`attribute`].
pub fn headers(event: &Event, source: &HeaderValue) -> Result<HeaderMap, Unsendable> {
    let mut headers = HeaderMap::with_capacity(12);
    let mut id = uuid::Uuid::encode_buffer();
    let id: &str = event.id.hyphenated().encode_lower(&mut id);
    headers.insert(ID, attribute("the id", id)?);
    headers.insert(SOURCE, source.clone());
    headers.insert(TYPE, attribute("the topic", &event.topic)?);
    headers.insert(SPECVERSION, HeaderValue::from_static("1.0"));
    headers.insert(TIME, attribute("the time", &cloudevents::time(event.published_at_us))?);
    // An empty key keeps its events' order like any other, but the attribute must not be empty (partitioning extension).
    if let Some(key) = event.key.as_ref().filter(|key| !key.is_empty()) {
        headers.insert(PARTITIONKEY, attribute("the key", key)?);
    }
    if event.payload.is_some() {
        let value = HeaderValue::from_str(&event.content_type);
        headers.insert(CONTENT_TYPE, value.map_err(|_| Unsendable::header("the content type"))?);
    }
    cloudevents::own_headers(event, |own, value| {
        let (name, value) = match own {
            Own::Attribute(name) => {
                let value = attribute(name, value).map_err(|error| error.to_string())?;
                (HeaderName::from_bytes([b"ce-", name.as_bytes()].concat().as_slice()), value)
            }
            Own::Header(name) => {
                let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|error| error.to_string())?;
                (HeaderName::from_bytes(name.as_bytes()), value)
            }
        };
        headers.append(name.map_err(|error| error.to_string())?, value);
        Ok(())
    })?;
    Ok(headers)
}

/// An attribute's value as a header's (§3.1.3.2): space, double quote, percent and everything outside U+0021 to U+007E are
/// percent-encoded as UTF-8.
pub fn attribute(what: &str, value: &str) -> Result<HeaderValue, Unsendable> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let is_plain = |b: u8| (0x21..=0x7e).contains(&b) && b != b'"' && b != b'%';
    let encoded = if value.bytes().all(is_plain) {
        HeaderValue::from_str(value)
    } else {
        let mut bytes = Vec::with_capacity(value.len() * 3);
        for b in value.bytes() {
            match is_plain(b) {
                true => bytes.push(b),
                false => bytes.extend([b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]),
            }
        }
        HeaderValue::from_maybe_shared(bytes::Bytes::from(bytes))
    };
    encoded.map_err(|_| Unsendable::header(what))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn event() -> Event {
        Event {
            seq: 1,
            published_at_us: 1_767_225_600_000_001,
            id: uuid::uuid!("0193f000-1234-7abc-8def-0123456789ab"),
            topic: "orders.created".into(),
            key: None,
            content_type: "application/json".into(),
            headers: None,
            payload: Some(Bytes::from_static(b"{}")),
        }
    }

    fn texts(event: &Event) -> Vec<(String, String)> {
        let headers = headers(event, &HeaderValue::from_static("/pg_dtm/shop")).unwrap();
        let text = |value: &HeaderValue| String::from_utf8(value.as_bytes().to_vec()).unwrap();
        headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn an_event_has_the_required_attributes_and_no_others() {
        assert_eq!(
            texts(&event()),
            pairs(&[
                ("ce-id", "0193f000-1234-7abc-8def-0123456789ab"),
                ("ce-source", "/pg_dtm/shop"),
                ("ce-type", "orders.created"),
                ("ce-specversion", "1.0"),
                ("ce-time", "2026-01-01T00:00:00.000001Z"),
                ("content-type", "application/json"),
            ])
        );
    }

    #[test]
    fn an_empty_key_is_no_attribute() {
        let found = texts(&Event { key: Some("".into()), ..event() });
        assert!(found.iter().all(|(name, _)| name != "ce-partitionkey"));
    }

    #[test]
    fn without_a_body_there_is_no_content_type() {
        let found = texts(&Event { payload: None, ..event() });
        assert!(found.iter().all(|(name, _)| name != "content-type"));
        let empty = texts(&Event { payload: Some(Bytes::new()), ..event() });
        assert!(empty.iter().any(|(name, _)| name == "content-type"), "an empty body is a body");
    }

    #[test]
    fn key_and_own_headers_go_along() {
        let own = r#"{"ce-subject": "Zürich 1", "traceparent": "00-ab", "X-Name": "Zürich \"1\""}"#;
        let found = texts(&Event { key: Some("a b".into()), headers: Some(own.into()), ..event() });
        for pair in pairs(&[
            ("ce-partitionkey", "a%20b"),
            ("ce-subject", "Z%C3%BCrich%201"),
            ("traceparent", "00-ab"),
            ("x-name", "Zürich \"1\""),
        ]) {
            assert!(found.contains(&pair), "{pair:?} in {found:?}");
        }
    }

    #[test]
    fn attribute_values_are_encoded_as_the_binding_says() {
        for (plain, encoded) in [
            ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
            ("100%", "100%25"),
            ("say \"hi\"", "say%20%22hi%22"),
            ("a\tb~!", "a%09b~!"),
            ("", ""),
        ] {
            assert_eq!(attribute("x", plain).unwrap().as_bytes(), encoded.as_bytes());
        }
    }

    #[test]
    fn headers_that_are_none_are_refused() {
        for own in [r#"{"a b": "c"}"#, r#"{"a": 1}"#, "[]", r#"{"a": "b\nc"}"#] {
            let event = Event { headers: Some(own.into()), ..event() };
            assert!(headers(&event, &HeaderValue::from_static("s")).is_err(), "{own}");
        }
    }
}
