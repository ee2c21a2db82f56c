// SPDX-License-Identifier: PostgreSQL
//! HTTP calls: over connections that are kept, HTTP/1.1 or, where it is negotiated, HTTP/2.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderValue};
use http::uri::{Authority, Scheme};
use http::{Method, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::time::Instant;

use super::answer;
use super::connections::{Connection, Connections, Connector};
use super::outcome::{Class, Outcome};
use super::tls::{self, TlsError};
use crate::causes::with_causes;

/// How long a connection is waited for: name, TCP and TLS.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// So many new connections are made for a call at the most, if they are closed before it could be sent.
const ANEW_MAX: usize = 2;

/// What the relay calls itself, unless it is told otherwise.
pub fn agent() -> HeaderValue {
    HeaderValue::from_static(concat!("dtm-relay/", env!("CARGO_PKG_VERSION")))
}

/// The servers that are called without TLS.
type Servers = HashMap<Authority, Weak<Connections>>;

/// The connections of the whole relay to all services that it calls.
#[derive(Clone)]
pub struct HttpCaller {
    connector: Connector,
    servers: Arc<Mutex<Servers>>,
}

/// What is called: a URI, over connections that, without TLS, are shared with all others at the same server.
pub struct Endpoint {
    connections: Arc<Connections>,
    uri: Uri,
    /// Path and query alone, as they are sent over HTTP/1.1.
    target: Uri,
    host: HeaderValue,
}

type Call = Request<Full<Bytes>>;
type Answered = (Response<Incoming>, Connection);

/// Why there is no answer.
enum NoAnswer {
    /// The connection has ended before anything was sent.
    Unsent(Box<Call>),
    /// See there.
    Failed(Outcome),
}

/// A URI that cannot be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no absolute URI")]
pub struct NotAbsolute(Uri);

impl HttpCaller {
    /// A caller without connections yet. For https it trusts whom the operating system trusts, and the authorities whose
    /// certificates are in `ca_file` (PEM).
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        // It is divided among a name's addresses: one that does not answer leaves time for the next.
        tcp.set_connect_timeout(Some(CONNECT_WITHIN));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls::client(ca_file)?).https_or_http();
        let connector = https.enable_http1().enable_http2().wrap_connector(tcp);
        Ok(HttpCaller { connector, servers: Arc::default() })
    }

    /// What is called at a URI.
    pub fn endpoint(&self, uri: Uri) -> Result<Endpoint, NotAbsolute> {
        let parts = uri.clone().into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(NotAbsolute(uri));
        };
        let default_port = if scheme == Scheme::HTTPS { 443 } else { 80 };
        let host = match authority.port_u16() {
            Some(port) if port != default_port => HeaderValue::from_str(authority.as_str()),
            _ => HeaderValue::from_str(authority.host()),
        };
        let (Ok(host), Some(target)) = (host, parts.path_and_query) else { return Err(NotAbsolute(uri)) };
        // A server that speaks HTTP/2 takes a bounded number of calls over one connection: whoever lets them hang shall hold up
        // nobody else's.
        let connections =
            if scheme == Scheme::HTTPS { self.connections(&uri) } else { self.shared(&uri, authority) };
        Ok(Endpoint { connections, target: Uri::from(target), uri, host })
    }

    fn connections(&self, to: &Uri) -> Arc<Connections> {
        Arc::new(Connections::new(self.connector.clone(), to.clone()))
    }

    /// Those that others at the same server have.
    fn shared(&self, to: &Uri, server: Authority) -> Arc<Connections> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|_, connections| connections.strong_count() > 0);
        servers.get(&server).and_then(Weak::upgrade).unwrap_or_else(|| {
            let connections = self.connections(to);
            servers.insert(server, Arc::downgrade(&connections));
            connections
        })
    }
}

/// What a caller wants of an answer's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its start, for people: the status says what counts.
    Start,
    /// All of it, for it says what counts. One that is cut, or too long, is no answer.
    All,
}

impl Endpoint {
    /// Another URI at the same server, over the same connections.
    pub fn at(&self, uri: Uri) -> Self {
        let target = uri.path_and_query().cloned().map_or_else(Uri::default, Uri::from);
        Endpoint { connections: self.connections.clone(), uri, target, host: self.host.clone() }
    }

    /// Posts. Of a success nothing is told but that it is one: what it says is of no use to anybody.
    pub async fn post(&self, headers: HeaderMap, body: Bytes, timeout: Duration) -> Outcome {
        let mut outcome = self.call(Method::POST, headers, body, timeout, Wanted::Start).await;
        if outcome.class == Class::Accepted {
            outcome.body = String::new();
        }
        outcome
    }

    /// Makes one call. `timeout` bounds it from connecting to the status, and to the end of the body if all of it is wanted.
    pub async fn call(
        &self,
        method: Method,
        headers: HeaderMap,
        body: Bytes,
        timeout: Duration,
        wanted: Wanted,
    ) -> Outcome {
        let begin = Instant::now();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.headers_mut() = headers;
        let asked = match self.connections.kept(begin) {
            Some(connection) => self.ask(connection, request, begin, timeout).await,
            None => Err(NoAnswer::Unsent(Box::new(request))),
        };
        let asked = match asked {
            Err(NoAnswer::Unsent(request)) => Box::pin(self.ask_anew(*request, begin, timeout)).await,
            Err(NoAnswer::Failed(outcome)) => Err(outcome),
            Ok(answered) => Ok(answered),
        };
        let (response, mut connection) = match asked {
            Ok(answered) => answered,
            Err(outcome) => return outcome,
        };
        let (head, body) = response.into_parts();
        let (start, is_whole) = if body.is_end_stream() {
            (Vec::new(), true)
        } else {
            let read = match wanted {
                Wanted::Start => answer::START,
                Wanted::All => answer::all(begin + timeout),
            };
            Box::pin(answer::drain(body, &mut connection, read)).await
        };
        // The rest of a body would be taken for the next answer.
        if is_whole {
            self.connections.keep(connection, Instant::now());
        }
        let status = head.status.as_u16();
        let reason = if head.status.is_success() {
            ""
        } else {
            head.status.canonical_reason().unwrap_or("no success")
        };
        if wanted == Wanted::All && !is_whole {
            return Outcome { status: Some(status), ..Outcome::without_answer(Class::Failed, answer::CUT) };
        }
        let after = answer::retry_after(head.status, &head.headers, SystemTime::now());
        Outcome::of_status(status, reason, answer::text(&start), after)
    }

    /// Asks over new connections: one that was kept may have been closed by the server meanwhile.
    async fn ask_anew(
        &self,
        mut request: Call,
        begin: Instant,
        timeout: Duration,
    ) -> Result<Answered, Outcome> {
        for _ in 0..ANEW_MAX {
            let connection = self.connect(begin, timeout).await?;
            match self.ask(connection, request, begin, timeout).await {
                Ok(answered) => return Ok(answered),
                Err(NoAnswer::Failed(outcome)) => return Err(outcome),
                Err(NoAnswer::Unsent(unsent)) => request = *unsent,
            }
        }
        Err(Outcome::without_answer(Class::Unsent, "the connection is closed as soon as it is made"))
    }

    async fn ask(
        &self,
        mut connection: Connection,
        mut request: Call,
        begin: Instant,
        timeout: Duration,
    ) -> Result<Answered, NoAnswer> {
        match connection {
            // Each version of HTTP says in its own way where a request goes.
            Connection::Http1(_) => {
                *request.uri_mut() = self.target.clone();
                request.headers_mut().entry(HOST).or_insert_with(|| self.host.clone());
            }
            Connection::Http2(_) => *request.uri_mut() = self.uri.clone(),
        }
        let failed = |error| Err(NoAnswer::Failed(Outcome::without_answer(Class::Failed, error)));
        match connection.ask(request, begin + timeout).await {
            Some(Ok(response)) => Ok((response, connection)),
            Some(Err(mut error)) => match error.take_message() {
                Some(unsent) => Err(NoAnswer::Unsent(Box::new(unsent))),
                None => failed(with_causes(error.error())),
            },
            None => failed(format!("no answer within {} s", timeout.as_secs_f64())),
        }
    }

    async fn connect(&self, begin: Instant, timeout: Duration) -> Result<Connection, Outcome> {
        let until = (Instant::now() + CONNECT_WITHIN).min(begin + timeout);
        let connected = tokio::time::timeout_at(until, self.connections.connect()).await;
        let too_late =
            || Err(format!("no connection within {} s", timeout.min(CONNECT_WITHIN).as_secs_f64()));
        let connected = connected.unwrap_or_else(|_| too_late());
        connected.map_err(|error| Outcome::without_answer(Class::Unsent, error))
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
