// SPDX-License-Identifier: PostgreSQL
//! HTTP calls: over connections that are kept, HTTP/1.1 or, where it is negotiated, HTTP/2.

use std::error::Error as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{HeaderMap, RETRY_AFTER};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use super::outcome::{Class, Outcome};
use crate::causes::with_causes;

/// What is read of a response's body at the most, so that its connection can be used again.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What is told of it: more than is kept in the end, for what must not be kept is found in the whole of it.
const BODY_START_BYTES: usize = 1024;

/// How long the body of a response is waited for. The status has said all that counts.
const BODY_PATIENCE: Duration = Duration::from_secs(1);

/// How long a connection is kept without use. Many servers close theirs after a minute.
const KEEP_IDLE: Duration = Duration::from_secs(30);

/// The connections of the whole relay to all services that it calls.
#[derive(Clone)]
pub struct HttpCaller {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// There is no way to do TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The library refuses.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
    /// The file with certificates of authorities cannot be used.
    #[error("{file}: {problem}")]
    Authorities {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl HttpCaller {
    /// A caller without connections yet. For https it trusts whom the operating system trusts, and the authorities whose
    /// certificates are in `ca_file` (PEM).
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls(ca_file)?).https_or_http();
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEEP_IDLE)
            .http2_keep_alive_interval(KEEP_IDLE)
            .http2_max_header_list_size(BODY_BYTES_MAX as u32)
            .build(https.enable_http1().enable_http2().wrap_connector(tcp));
        Ok(HttpCaller { client })
    }

    /// Makes one call. `timeout` bounds it from connecting to the status.
    pub async fn call(&self, request: Request<Full<Bytes>>, timeout: Duration) -> Outcome {
        match tokio::time::timeout(timeout, self.client.request(request)).await {
            Err(_) => {
                let error = format!("no answer within {} s", timeout.as_secs_f64());
                Outcome::without_answer(Class::Failed, error)
            }
            Ok(Err(error)) => {
                let class = if error.is_connect() { Class::Unsent } else { Class::Failed };
                Outcome::without_answer(class, causes(&error))
            }
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                let start = drain(body).await;
                // What a success says is of no use to anybody.
                let start = if head.status.is_success() { String::new() } else { text(&start) };
                let reason = head.status.canonical_reason().unwrap_or("no success");
                let after = retry_after(head.status, &head.headers, SystemTime::now());
                Outcome::of_status(head.status.as_u16(), reason, start, after)
            }
        }
    }
}

fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    let (usable, _) = roots.add_parsable_certificates(native.certs);
    if let Some(file) = ca_file {
        add_authorities(&mut roots, file)?;
    } else if usable == 0 {
        tracing::warn!(
            "the operating system has no certificates of authorities: https destinations will fail"
        );
    }
    let provider = rustls::crypto::ring::default_provider();
    let builder =
        ClientConfig::builder_with_provider(provider.into()).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn add_authorities(roots: &mut RootCertStore, file: &Path) -> Result<(), TlsError> {
    let wrong = |problem: String| TlsError::Authorities { file: file.display().to_string(), problem };
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))?;
    let mut found = 0;
    for certificate in certificates {
        roots
            .add(certificate.map_err(|error| wrong(error.to_string()))?)
            .map_err(|e| wrong(e.to_string()))?;
        found += 1;
    }
    if found == 0 { Err(wrong("there is no certificate in it".into())) } else { Ok(()) }
}

/// Reads a body to its end, within bounds: a connection whose response is not read cannot be used again. Answers its start.
async fn drain(mut body: Incoming) -> Vec<u8> {
    let mut start = Vec::new();
    if body.is_end_stream() {
        return start;
    }
    let read = async {
        let mut left = BODY_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let data = frame.data_ref().map_or(&[][..], |data| data);
            start.extend(data.iter().take(BODY_START_BYTES - start.len()));
            match left.checked_sub(data.len()) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    let _ = tokio::time::timeout(BODY_PATIENCE, read).await;
    start
}

/// The start of a body for people: whatever is no text, or would disturb one line of it, is replaced.
fn text(start: &[u8]) -> String {
    let text = String::from_utf8_lossy(start);
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// `Retry-After` in seconds or as a date (RFC 9110 §10.2.3), where it means what the relay acts on.
fn retry_after(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let relevant = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
    let value = headers.get(RETRY_AFTER).filter(|_| relevant)?.to_str().ok()?.trim();
    match value.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        // A date that has passed asks for nothing more, but the word of overload stands.
        Err(_) => httpdate::parse_http_date(value).ok().map(|at| at.duration_since(now).unwrap_or_default()),
    }
}

/// What the client says itself says less than its cause.
fn causes(error: &legacy::Error) -> String {
    with_causes(error.source().unwrap_or(error))
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
