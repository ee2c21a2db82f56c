// SPDX-License-Identifier: PostgreSQL
//! Which headers an event may carry.

/// The longest key that an event, or a step that is a record, may have beside them, in bytes.
pub const KEY_BYTES_MAX: usize = 1_024;

/// The most that the names and values of one event's headers may add up to, in bytes.
pub const HEADERS_BYTES_MAX: usize = 16 * 1024;

/// What is wrong with a header; the text is a full sentence without its stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not a token (RFC 9110 §5.6.2).
    #[error("its name is no HTTP token")]
    NotAToken,
    /// Set by the relay or by the HTTP connection.
    #[error("its name is reserved")]
    Reserved,
    /// CloudEvents 1.0.2 §3.1: attribute names are lower-case letters and digits.
    #[error("a CloudEvents attribute is named \"ce-\" and then only lower-case letters and digits")]
    AttributeName,
    /// CloudEvents 1.0.2: an attribute that is there has a value.
    #[error("a CloudEvents attribute must not be empty")]
    EmptyAttribute,
    /// A value with a control character.
    #[error("its value has a control character")]
    ControlCharacter,
}

/// Names that belong to the connection, to the message's framing, or to what the relay says itself.
const RESERVED: [&str; 22] = [
    "authorization",
    "ce-datacontenttype",
    "ce-id",
    "ce-partitionkey",
    "ce-source",
    "ce-specversion",
    "ce-time",
    "ce-type",
    "connection",
    "expect",
    "host",
    "id",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "trailers",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

const RESERVED_PREFIXES: [&str; 3] = ["content-", "webhook-", "ce_"];

fn is_token(name: &str) -> bool {
    let tchar = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !name.is_empty() && name.bytes().all(tchar)
}

/// Checks a header: its name, and a value that fits it.
pub fn check(name: &str, value: &str) -> Result<(), HeaderError> {
    check_name(name)?;
    check_value(value)?;
    if name.starts_with("ce-") && value.is_empty() { Err(HeaderError::EmptyAttribute) } else { Ok(()) }
}

/// Checks a header's name: an HTTP token that is not reserved; `ce-name` is a CloudEvents attribute.
fn check_name(name: &str) -> Result<(), HeaderError> {
    if !is_token(name) {
        return Err(HeaderError::NotAToken);
    }
    let lower = name.to_ascii_lowercase();
    if RESERVED.contains(&lower.as_str()) || RESERVED_PREFIXES.iter().any(|prefix| lower.starts_with(prefix))
    {
        return Err(HeaderError::Reserved);
    }
    match lower.strip_prefix("ce-") {
        Some(_) if !name.starts_with("ce-") => Err(HeaderError::AttributeName),
        Some("") => Err(HeaderError::AttributeName),
        Some(_) if !name[3..].bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) => {
            Err(HeaderError::AttributeName)
        }
        _ => Ok(()),
    }
}

/// Checks the name of a header that a subscription adds to every request: one that an event may carry, and no attribute of
/// the event.
pub fn check_subscription_name(name: &str) -> Result<(), HeaderError> {
    check_name(name)?;
    if name.to_ascii_lowercase().starts_with("ce-") { Err(HeaderError::Reserved) } else { Ok(()) }
}

/// Checks a header's value: any text without control characters.
pub fn check_value(value: &str) -> Result<(), HeaderError> {
    if value.chars().any(char::is_control) { Err(HeaderError::ControlCharacter) } else { Ok(()) }
}

/// Whether a media type can stand in a `content-type` header: visible ASCII and spaces, not empty, at most 255 bytes.
pub fn is_content_type(text: &str) -> bool {
    let visible = |b: u8| (b' '..=b'~').contains(&b);
    !text.trim().is_empty() && text.trim() == text && text.len() <= 255 && text.bytes().all(visible)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_tokens_that_are_not_reserved() {
        for good in ["x-tenant", "traceparent", "ce-subject", "ce-dataschema", "X-A", "identity"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in
            ["ID", "Content-Length", "webhook-id", "CE_type", "ce-id", "Transfer-Encoding", "authorization"]
        {
            assert_eq!(check_name(bad), Err(HeaderError::Reserved), "{bad}");
        }
        for bad in ["", "a b", "a:b", "naïve"] {
            assert_eq!(check_name(bad), Err(HeaderError::NotAToken), "{bad}");
        }
        for bad in ["ce-", "ce-My", "Ce-subject", "ce-a-b"] {
            assert_eq!(check_name(bad), Err(HeaderError::AttributeName), "{bad}");
        }
    }

    #[test]
    fn an_attribute_is_not_empty_but_another_header_may_be() {
        assert_eq!(check("ce-subject", ""), Err(HeaderError::EmptyAttribute));
        assert_eq!(check("ce-subject", " "), Ok(()));
        assert_eq!(check("x-tenant", ""), Ok(()));
        assert_eq!(check("x-tenant", "a\nb"), Err(HeaderError::ControlCharacter));
    }

    #[test]
    fn values_have_no_control_characters() {
        assert_eq!(check_value("Zürich = 1"), Ok(()));
        for bad in ["a\r\nb", "a\tb", "\u{7f}", "\u{85}"] {
            assert_eq!(check_value(bad), Err(HeaderError::ControlCharacter));
        }
    }

    #[test]
    fn content_types_fit_a_header() {
        assert!(is_content_type("application/json; charset=utf-8"));
        for bad in ["", " ", "a\nb", "ünï", " text/plain"] {
            assert!(!is_content_type(bad), "{bad:?}");
        }
    }
}
