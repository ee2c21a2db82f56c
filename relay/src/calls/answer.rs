// SPDX-License-Identifier: PostgreSQL
//! What counts of an HTTP answer beside its status.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use http::header::{HeaderMap, RETRY_AFTER};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::connections::Connection;

/// What is read of a response's body at the most, so that its connection can be used again.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// How a body is read.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    /// So many bytes of its start are told.
    told: usize,
    /// For so long it is waited for.
    patience: Duration,
}

/// For people: more than is kept in the end, for what must not be kept is found in the whole of it. The status has said all that
/// counts, so it is not waited for long.
pub const START: Read = Read { told: 1024, patience: Duration::from_secs(1) };

/// For what it says.
pub fn all(until: Instant) -> Read {
    Read { told: BODY_BYTES_MAX, patience: until.saturating_duration_since(Instant::now()) }
}

/// What is wrong with an answer of which all is wanted.
pub const CUT: &str = "the answer was cut, or is longer than 64 KiB, or took too long";

/// Reads a body to its end, within bounds: a connection whose response is not read cannot be used again. Answers its start,
/// and whether it was read to its end.
pub async fn drain(mut body: Incoming, connection: &mut Connection, how: Read) -> (Vec<u8>, bool) {
    let mut start = Vec::new();
    let read = async {
        let mut left = BODY_BYTES_MAX;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            let data = frame.data_ref().map_or(&[][..], |data| data);
            start.extend(data.iter().take(how.told - start.len()));
            match left.checked_sub(data.len()) {
                Some(rest) => left = rest,
                None => return false,
            }
        }
        true
    };
    let is_whole = connection.wait(read, Instant::now() + how.patience).await.unwrap_or(false);
    (start, is_whole)
}

/// The start of a body for people: whatever is no text, or would disturb one line of it, is replaced.
pub fn text(start: &[u8]) -> String {
    let text = String::from_utf8_lossy(start);
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// `Retry-After` in seconds or as a date (RFC 9110 §10.2.3), where it means what the relay acts on.
pub fn retry_after(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let relevant = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
    let value = headers.get(RETRY_AFTER).filter(|_| relevant)?.to_str().ok()?.trim();
    match value.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        // A date that has passed asks for nothing more, but the word of overload stands.
        Err(_) => httpdate::parse_http_date(value).ok().map(|at| at.duration_since(now).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let after = |status: u16, value: &'static str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, http::HeaderValue::from_static(value))]);
            retry_after(StatusCode::from_u16(status).unwrap(), &headers, now)
        };
        let seconds = Duration::from_secs;
        assert_eq!(after(429, "120"), Some(seconds(120)));
        assert_eq!(after(503, " 7 "), Some(seconds(7)));
        assert_eq!(after(429, "Sun, 06 Nov 1994 08:49:47 GMT"), Some(seconds(10)));
        assert_eq!(after(429, "Sun, 06 Nov 1994 08:49:27 GMT"), Some(seconds(0)));
        assert_eq!(after(429, "soon"), None);
        assert_eq!(after(429, "-5"), None);
        assert_eq!(after(500, "5"), None);
        assert_eq!(retry_after(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new(), now), None);
    }

    #[test]
    fn a_body_is_shown_as_one_line_of_text() {
        assert_eq!(text(b"  not\r\nnow\x00 "), "not  now");
        assert_eq!(text(b"\xff\xfe"), "\u{fffd}\u{fffd}");
    }
}
