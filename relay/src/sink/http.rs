// SPDX-License-Identifier: PostgreSQL
//! HTTP: one POST an event, over connections that are kept.

use std::time::Duration;

use bytes::Bytes;
use dtm_core::page::Event;
use http::header::{HeaderValue, USER_AGENT};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::{ClientConfig, RootCertStore};

use super::cloudevents::{self, Unsendable};
use super::{Failure, FailureKind};

/// What is read of a response's body at the most, so that its connection can be used again.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// How long the body of a response is waited for. The status has said all that counts.
const BODY_PATIENCE: Duration = Duration::from_secs(1);

/// How long a connection is kept without use. Many servers close theirs after a minute.
const KEEP_IDLE: Duration = Duration::from_secs(30);

/// The connections of the whole relay to all its endpoints.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// The client has no way to do TLS.
#[derive(Debug, thiserror::Error)]
#[error("TLS: {0}")]
pub struct TlsError(#[from] rustls::Error);

impl HttpClient {
    /// A client without connections yet. For https it trusts whom the operating system trusts.
    pub fn new() -> Result<Self, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls()?).https_or_http();
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEEP_IDLE)
            .build(https.enable_http1().wrap_connector(tcp));
        Ok(HttpClient { client })
    }
}

fn tls() -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    let (usable, _) = roots.add_parsable_certificates(native.certs);
    if usable == 0 {
        tracing::warn!(
            "the operating system has no certificates of authorities: https destinations will fail"
        );
    }
    let provider = rustls::crypto::ring::default_provider();
    let builder =
        ClientConfig::builder_with_provider(provider.into()).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// One endpoint that events are posted to.
pub struct HttpSink {
    client: HttpClient,
    uri: Uri,
    timeout: Duration,
    source: HeaderValue,
}

impl HttpSink {
    /// `timeout` bounds each attempt, from connecting to the status. `source`: who the events are from.
    pub fn new(client: HttpClient, uri: Uri, timeout: Duration, source: &str) -> Result<Self, Unsendable> {
        let source = cloudevents::attribute("the source", source)?;
        Ok(HttpSink { client, uri, timeout, source })
    }

    /// Makes one attempt. Only a 2xx status is a success.
    pub async fn send(&self, event: &Event) -> Result<(), Failure> {
        let request = self.request(event).map_err(|unsendable| Failure {
            kind: FailureKind::Unsendable,
            detail: unsendable.to_string(),
        })?;
        match tokio::time::timeout(self.timeout, self.client.client.request(request)).await {
            Err(_) => Err(Failure {
                kind: FailureKind::Timeout,
                detail: format!("no answer within {} s", self.timeout.as_secs_f64()),
            }),
            Ok(Err(error)) => Err(failure(&error)),
            Ok(Ok(response)) => {
                let status = response.status();
                drain(response.into_body()).await;
                if status.is_success() {
                    return Ok(());
                }
                let reason = status.canonical_reason().unwrap_or("no success");
                let detail = if status.is_redirection() {
                    format!("{reason}: redirects are not followed")
                } else {
                    reason.to_owned()
                };
                Err(Failure { kind: FailureKind::Status(status.as_u16()), detail })
            }
        }
    }

    fn request(&self, event: &Event) -> Result<Request<Full<Bytes>>, Unsendable> {
        let mut request = Request::new(Full::new(event.payload.clone().unwrap_or_default()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = cloudevents::headers(event, &self.source)?;
        let agent = HeaderValue::from_static(concat!("dtm-relay/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().entry(USER_AGENT).or_insert(agent);
        Ok(request)
    }
}

/// Reads a body to its end, within bounds: a connection whose response is not read cannot be used again.
async fn drain(mut body: Incoming) {
    if body.is_end_stream() {
        return;
    }
    let read = async {
        let mut left = BODY_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    let _ = tokio::time::timeout(BODY_PATIENCE, read).await;
}

fn failure(error: &legacy::Error) -> Failure {
    let kind = if error.is_connect() { FailureKind::Unreachable } else { FailureKind::Broken };
    let mut detail = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !detail.contains(&text) {
            detail = if detail.is_empty() { text } else { format!("{detail}: {text}") };
        }
        cause = error.source();
    }
    if detail.is_empty() {
        detail = error.to_string();
    }
    Failure { kind, detail: detail.replace('\n', " ") }
}
