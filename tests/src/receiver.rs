// SPDX-License-Identifier: PostgreSQL
//! An HTTP endpoint that takes note of every request and can be told to misbehave.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::process;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// When its body was complete.
    pub at: Instant,
    /// POST, if all is well.
    pub method: Method,
    /// Of HTTP.
    pub version: Version,
    /// Path and query.
    pub target: String,
    /// All headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// Whether it was answered with 2xx.
    pub accepted: bool,
}

impl Received {
    /// A header; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("a visible header"))
    }

    /// The event's id.
    pub fn id(&self) -> &str {
        self.header("ce-id")
    }
}

/// What the endpoint does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Answers with a status and headers, after a delay.
    Status(u16, Vec<(&'static str, String)>, Duration),
    /// Answers with a status and a body, which is called JSON.
    Body(u16, String),
    /// Never answers.
    Hang,
    /// Closes the connection without an answer.
    Reset,
    /// Answers what is no HTTP.
    Garbage,
    /// Answers with a status, one byte after the other with a pause before each.
    Dribble(u16, Duration),
    /// Answers with a status and a body that never ends.
    Endless(u16),
}

impl Reply {
    /// An answer at once, without more.
    pub fn status(status: u16) -> Self {
        Reply::Status(status, Vec::new(), Duration::ZERO)
    }

    /// An answer that takes its time.
    pub fn slow(status: u16, delay: Duration) -> Self {
        Reply::Status(status, Vec::new(), delay)
    }
}

type Body = BoxBody<Bytes, Infallible>;

type Behaviour = Box<dyn FnMut(&Received) -> Reply + Send>;

struct State {
    received: Vec<Received>,
    behaviour: Behaviour,
}

/// A running endpoint. Dropping it closes it.
pub struct Receiver {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    tls: Option<TlsAcceptor>,
    server: Option<JoinHandle<()>>,
}

impl Receiver {
    /// An endpoint that answers 200 to everything.
    pub async fn start() -> Receiver {
        Receiver::start_with(|_| Reply::status(200)).await
    }

    /// An endpoint that does with each request what it is told.
    pub async fn start_with(behaviour: impl FnMut(&Received) -> Reply + Send + 'static) -> Receiver {
        Receiver::begin(Box::new(behaviour), None).await
    }

    /// An endpoint that answers 200 to everything, over TLS.
    pub async fn start_tls(config: ServerConfig) -> Receiver {
        Receiver::begin(Box::new(|_| Reply::status(200)), Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn begin(behaviour: Behaviour, tls: Option<TlsAcceptor>) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(Mutex::new(State { received: Vec::new(), behaviour }));
        let server = tokio::spawn(serve(listener, state.clone(), tls.clone()));
        Receiver { address, state, tls, server: Some(server) }
    }

    /// Changes what is done with requests from now on.
    pub fn behave(&self, behaviour: impl FnMut(&Received) -> Reply + Send + 'static) {
        self.state.lock().expect("state").behaviour = Box::new(behaviour);
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        match self.tls {
            None => format!("http://{}/events", self.address),
            Some(_) => format!("https://localhost:{}/events", self.address.port()),
        }
    }

    /// Everything that arrived so far, in the order of arrival.
    pub fn received(&self) -> Vec<Received> {
        self.state.lock().expect("state").received.clone()
    }

    /// What arrived and was accepted, in the order of arrival.
    pub fn accepted(&self) -> Vec<Received> {
        self.received().into_iter().filter(|received| received.accepted).collect()
    }

    /// How many requests arrived so far.
    pub fn count(&self) -> usize {
        self.state.lock().expect("state").received.len()
    }

    /// Waits until what arrived satisfies a condition; panics with a summary if it does not in time.
    pub async fn wait_until(&self, what: &str, deadline: Duration, condition: impl Fn(&[Received]) -> bool) {
        let holds = || condition(&self.state.lock().expect("state").received);
        if !process::holds_within(deadline, holds).await {
            let received = self.received();
            let last: Vec<String> = received
                .iter()
                .rev()
                .take(5)
                .map(|r| format!("{} {}", r.header("ce-type"), r.id()))
                .collect();
            panic!("{what}: not within {deadline:?}; {} requests, the last: {last:?}", received.len());
        }
    }

    /// Waits until a number of requests arrived.
    pub async fn wait_for(&self, count: usize) {
        self.wait_until(&format!("{count} requests"), Duration::from_secs(30), |received| {
            received.len() >= count
        })
        .await;
    }

    /// Closes the port and all connections: nobody is there any more.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
        }
    }

    /// Listens again on the same port.
    pub async fn restart(&mut self) {
        self.stop();
        let bind = || async { TcpListener::bind(self.address).await.ok() };
        let listener = process::eventually(Duration::from_secs(10), bind).await.expect("the same port");
        self.server = Some(tokio::spawn(serve(listener, self.state.clone(), self.tls.clone())));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, tls: Option<TlsAcceptor>) {
    // Connections end with this task, since the set is dropped with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                stream.set_nodelay(true).ok();
                let state = state.clone();
                match tls.clone() {
                    None => connections.spawn(serve_plain(stream, state)),
                    Some(tls) => connections.spawn(async move {
                        if let Ok(stream) = tls.accept(stream).await {
                            serve_connection(stream, state, None).await;
                        }
                    }),
                };
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// An answer that is no HTTP ends the connection: the service fails with this.
#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection is broken on purpose")
    }
}

impl std::error::Error for Broken {}

async fn serve_plain(stream: TcpStream, state: Arc<Mutex<State>>) {
    let raw = stream.into_std().ok().and_then(|stream| {
        let copy = stream.try_clone().ok()?;
        Some((TcpStream::from_std(stream).ok()?, copy))
    });
    let Some((stream, raw)) = raw else { return };
    serve_connection(stream, state, Some(Arc::new(raw))).await;
}

/// `raw` is the socket below, for answers that are no HTTP.
async fn serve_connection<S>(stream: S, state: Arc<Mutex<State>>, raw: Option<Arc<std::net::TcpStream>>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| answer(request, state.clone(), raw.clone()));
    auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await.ok();
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    raw: Option<Arc<std::net::TcpStream>>,
) -> Result<Response<Body>, Broken> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let mut received = Received {
        at: Instant::now(),
        method: head.method,
        version: head.version,
        target: head.uri.to_string(),
        headers: head.headers,
        body,
        accepted: false,
    };
    let reply = {
        let mut state = state.lock().expect("state");
        let reply = (state.behaviour)(&received);
        received.accepted = matches!(
            reply,
            Reply::Status(200..=299, ..)
                | Reply::Body(200..=299, _)
                | Reply::Dribble(200..=299, _)
                | Reply::Endless(200..=299)
        );
        state.received.push(received);
        reply
    };
    match reply {
        Reply::Status(status, headers, delay) => {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let mut response = response(status, Full::new(Bytes::new()).boxed());
            for (name, value) in headers {
                response.headers_mut().insert(name, value.parse().expect("a header value"));
            }
            Ok(response)
        }
        Reply::Body(status, body) => {
            let mut response = response(status, Full::new(Bytes::from(body)).boxed());
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Ok(response)
        }
        Reply::Hang => match std::future::pending::<Infallible>().await {},
        Reply::Reset => Err(Broken),
        Reply::Garbage => {
            write_raw(raw.as_deref(), b"this is no HTTP\r\n\r\n");
            Err(Broken)
        }
        Reply::Dribble(status, pause) => {
            for byte in format!("HTTP/1.1 {status} Slow\r\ncontent-length: 2\r\n\r\nok").bytes() {
                tokio::time::sleep(pause).await;
                write_raw(raw.as_deref(), &[byte]);
            }
            Err(Broken)
        }
        Reply::Endless(status) => {
            let chunk = || Some((Ok(Frame::data(Bytes::from_static(&[b'x'; 16 * 1024]))), ()));
            let body = futures_util::stream::unfold((), move |()| std::future::ready(chunk()));
            Ok(response(status, BodyExt::boxed(StreamBody::new(body))))
        }
    }
}

fn response(status: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

fn write_raw(raw: Option<&std::net::TcpStream>, bytes: &[u8]) {
    use std::io::Write;
    if let Some(mut raw) = raw {
        raw.write_all(bytes).ok();
    }
}
