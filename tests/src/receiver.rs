// SPDX-License-Identifier: PostgreSQL
//! An HTTP endpoint that takes note of every request and can be told to misbehave.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::process;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// When its body was complete.
    pub at: Instant,
    /// POST, if all is well.
    pub method: Method,
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
    /// Never answers.
    Hang,
    /// Closes the connection without an answer.
    Reset,
    /// Answers what is no HTTP.
    Garbage,
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

type Behaviour = Box<dyn FnMut(&Received) -> Reply + Send>;

struct State {
    received: Vec<Received>,
    behaviour: Behaviour,
}

/// A running endpoint. Dropping it closes it.
pub struct Receiver {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    server: Option<JoinHandle<()>>,
}

impl Receiver {
    /// An endpoint that answers 200 to everything.
    pub async fn start() -> Receiver {
        Receiver::start_with(|_| Reply::status(200)).await
    }

    /// An endpoint that does with each request what it is told.
    pub async fn start_with(behaviour: impl FnMut(&Received) -> Reply + Send + 'static) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(Mutex::new(State { received: Vec::new(), behaviour: Box::new(behaviour) }));
        let server = tokio::spawn(serve(listener, state.clone()));
        Receiver { address, state, server: Some(server) }
    }

    /// Changes what is done with requests from now on.
    pub fn behave(&self, behaviour: impl FnMut(&Received) -> Reply + Send + 'static) {
        self.state.lock().expect("state").behaviour = Box::new(behaviour);
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}/events", self.address)
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
        self.server = Some(tokio::spawn(serve(listener, self.state.clone())));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    // Connections end with this task, since the set is dropped with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                stream.set_nodelay(true).ok();
                connections.spawn(serve_connection(stream, state.clone()));
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

async fn serve_connection(stream: TcpStream, state: Arc<Mutex<State>>) {
    let raw = stream.into_std().ok().and_then(|stream| {
        let copy = stream.try_clone().ok()?;
        Some((TcpStream::from_std(stream).ok()?, copy))
    });
    let Some((stream, raw)) = raw else { return };
    let raw = Arc::new(raw);
    let service = service_fn(move |request| answer(request, state.clone(), raw.clone()));
    auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await.ok();
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    raw: Arc<std::net::TcpStream>,
) -> Result<Response<Full<Bytes>>, Broken> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let mut received = Received {
        at: Instant::now(),
        method: head.method,
        target: head.uri.to_string(),
        headers: head.headers,
        body,
        accepted: false,
    };
    let reply = {
        let mut state = state.lock().expect("state");
        let reply = (state.behaviour)(&received);
        received.accepted = matches!(reply, Reply::Status(200..=299, ..));
        state.received.push(received);
        reply
    };
    match reply {
        Reply::Status(status, headers, delay) => {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() = StatusCode::from_u16(status).expect("a status");
            for (name, value) in headers {
                response.headers_mut().insert(name, value.parse().expect("a header value"));
            }
            Ok(response)
        }
        Reply::Hang => match std::future::pending::<Infallible>().await {},
        Reply::Reset => Err(Broken),
        Reply::Garbage => {
            use std::io::Write;
            (&*raw).write_all(b"this is no HTTP\r\n\r\n").ok();
            Err(Broken)
        }
    }
}
