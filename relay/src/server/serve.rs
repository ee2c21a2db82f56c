// SPDX-License-Identifier: PostgreSQL
//! Connections and requests, all of them bounded: how many there are, how long each takes, how much it sends.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::answer::{Answer, Refusal};
use super::api::Api;
use super::endpoints::Endpoint;
use super::settings::ServerSettings;
use crate::config::Config;
use crate::source::connect::Connector;
use crate::source::desk::Desk;
use crate::source::dtm_api::Transactions;
use crate::source::error::SourceError;

/// Connections at once; the next ones wait to be accepted.
const CONNECTIONS_MAX: usize = 1_024;
/// For a TLS handshake, for a request's head (a connection that is kept waits no longer for the next one), and for a body.
const ARRIVAL: Duration = Duration::from_secs(30);
/// For doing what is asked for: longer than a client is kept waiting for a result.
const WORK: Duration = Duration::from_secs(45);
/// Bytes of a body: above what the payloads of a transaction may have, unless an administrator raises dtm.max_payload.
const BODY_MAX: usize = 4 << 20;
/// Of what is refused so much is read on, and for so long.
const DISCARDED_MAX: usize = 16 << 20;
const DISCARDING: Duration = Duration::from_secs(5);
/// For one statement.
const STATEMENT: Duration = Duration::from_secs(10);
/// After an error of accepting, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is taken, or none of this machine's.
    #[error("dtm_server.listen: {0}")]
    Listen(io::Error),
    /// A PEM file cannot be used.
    #[error("dtm_server.{key}: {file}: {problem}")]
    Tls {
        /// The setting.
        key: &'static str,
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A certificate that the database's URL names cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
}

/// The server.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    api: Arc<Api>,
    stop: CancellationToken,
    /// How long a shutdown waits for requests.
    patience: Duration,
}

impl Server {
    /// Listens from now on; nobody is answered yet.
    pub async fn bind(
        settings: &ServerSettings,
        config: &Config,
        stop: CancellationToken,
    ) -> Result<Self, ServerError> {
        let tls = match &settings.tls {
            None => None,
            Some((certificate, key)) => Some(TlsAcceptor::from(Arc::new(tls(certificate, key)?))),
        };
        let connector =
            Connector::new(settings.database.settings.clone(), config.statement_timeout.min(STATEMENT))?;
        let desk = Desk::new(connector, config.environment.clone());
        let api = Api::new(Transactions::new(desk), settings.token.clone(), stop.clone());
        let listener = TcpListener::bind(settings.listen).await.map_err(ServerError::Listen)?;
        info!(
            address = %settings.listen, tls = tls.is_some(), database = settings.database.name,
            "listening for DTM's clients"
        );
        Ok(Server { listener, tls, api: Arc::new(api), stop, patience: config.shutdown })
    }

    /// Answers until it is asked to stop; then what is being answered is waited for.
    pub async fn run(self) {
        let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let accepted = async {
                let turn = free.clone().acquire_owned().await;
                (turn, self.listener.accept().await)
            };
            let (turn, accepted) = tokio::select! {
                accepted = accepted => accepted,
                Some(_) = connections.join_next() => continue,
                () = self.stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection =
                        connection(stream, self.tls.clone(), self.api.clone(), self.stop.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(turn);
                    });
                }
                Err(error) => {
                    warn!("a client could not be accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        drop(self.listener);
        if timeout(self.patience, async { while connections.join_next().await.is_some() {} }).await.is_err() {
            warn!("some of DTM's clients have not had their answer");
        }
    }
}

/// What clients are shown.
fn tls(certificate: &Path, key: &Path) -> Result<ServerConfig, ServerError> {
    let wrong = |key: &'static str, file: &Path, problem: String| ServerError::Tls {
        key,
        file: file.display().to_string(),
        problem,
    };
    let read = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = read.map_err(|error| wrong("tls_cert", certificate, error.to_string()))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| wrong("tls_key", key, error.to_string()))?;
    let builder = ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into());
    let refused = |error: rustls::Error| wrong("tls_cert", certificate, error.to_string());
    let builder = builder.with_safe_default_protocol_versions().map_err(refused)?;
    builder.with_no_client_auth().with_single_cert(chain, private).map_err(refused)
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, api: Arc<Api>, stop: CancellationToken) {
    // An answer is small, and its client waits for it.
    if let Err(error) = stream.set_nodelay(true) {
        debug!("a client's connection: {error}");
    }
    match tls {
        None => requests(stream, api, stop).await,
        Some(tls) => match timeout(ARRIVAL, tls.accept(stream)).await {
            Ok(Ok(stream)) => requests(stream, api, stop).await,
            Ok(Err(error)) => debug!("a client's handshake failed: {error}"),
            Err(_) => debug!("a client's handshake took too long"),
        },
    }
}

async fn requests(stream: impl AsyncRead + AsyncWrite, api: Arc<Api>, stop: CancellationToken) {
    let mut stream = Box::pin(TimeoutStream::new(stream));
    // Who sends requests and reads no answers does not keep a connection for that.
    stream.as_mut().set_write_timeout_pinned(Some(ARRIVAL));
    let service = service_fn(|request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(respond(&api, request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(ARRIVAL);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("a client's connection: {error}");
    }
}

async fn respond(api: &Api, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let begun = Instant::now();
    let (endpoint, takes_method) = Endpoint::find(request.method(), request.uri().path());
    let answer = match work(api, endpoint, takes_method, request).await {
        Ok(answer) | Err(answer) => answer,
    };
    api.metrics.count(endpoint.name(), answer.status().as_u16(), begun.elapsed());
    answer.into_response()
}

async fn work(
    api: &Api,
    endpoint: Endpoint,
    takes_method: bool,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let (parts, mut body) = request.into_parts();
    let admitted = api.admit(endpoint, &parts.headers).and_then(|()| match takes_method {
        true => Ok(()),
        false => {
            let why = format!("{} does not take {}", endpoint.name(), parts.method);
            Err(Refusal::error(StatusCode::METHOD_NOT_ALLOWED, why))
        }
    });
    let arrived = match admitted {
        Ok(()) => arrived(&mut body).await,
        Err(refusal) => Err(refusal),
    };
    let body = match arrived {
        Ok(body) => body,
        Err(refusal) => {
            discard(&mut body).await;
            return Err(refusal);
        }
    };
    let late = || Refusal::error(StatusCode::SERVICE_UNAVAILABLE, "it took too long; it may have been done");
    timeout(WORK, api.answer(endpoint, &parts, &body)).await.unwrap_or_else(|_| Err(late()))
}

async fn arrived(body: &mut Incoming) -> Result<Bytes, Refusal> {
    let too_large =
        || Refusal::error(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {BODY_MAX} bytes"));
    if body.size_hint().lower() > BODY_MAX as u64 {
        return Err(too_large());
    }
    match timeout(ARRIVAL, Limited::new(body, BODY_MAX).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Refusal::bad(format!("the body did not arrive: {error}"))),
        Err(_) => Err(Refusal::error(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
    }
}

/// Passes over the rest of a body, within bounds: a client that is still sending when its connection is closed may never see
/// the answer.
async fn discard(body: &mut Incoming) {
    let rest = async {
        let mut size = 0;
        while let Some(Ok(frame)) = body.frame().await {
            size += frame.data_ref().map_or(0, Bytes::len);
            if size > DISCARDED_MAX {
                return;
            }
        }
    };
    if timeout(DISCARDING, rest).await.is_err() {
        debug!("a client goes on sending what is refused");
    }
}
