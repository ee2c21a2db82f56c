// SPDX-License-Identifier: PostgreSQL
//! Connections to one server, kept between calls: those of HTTP/1.1 have one call at a time, one of HTTP/2 has them all.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Scheme;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::{Connection as _, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, timeout_at};
use tower_service::Service;

use crate::causes::with_causes;

/// How long a connection is kept without use. Many servers close theirs after a minute.
const KEEP_IDLE: Duration = Duration::from_secs(30);

/// What the headers of an answer may take over HTTP/2.
const HEADERS_BYTES_MAX: u32 = 64 * 1024;

/// Makes connections: TCP, and TLS over it where the URI says so.
pub type Connector = HttpsConnector<HttpConnector>;

type Stream = <Connector as Service<Uri>>::Response;
type Body = Full<Bytes>;
/// What was not sent comes back in the error.
pub type Answer = Result<Response<Incoming>, TrySendError<Request<Body>>>;

/// A connection of HTTP/1.1. Whoever waits for something that comes over it drives it meanwhile: an answer does not have to
/// be handed over from one task to another.
pub struct Http1 {
    sender: http1::SendRequest<Body>,
    /// `None` when it has ended.
    driven: Option<http1::Connection<Stream, Body>>,
    /// Kept with the connection: to put off a timer is cheaper than to make one.
    timer: Pin<Box<Sleep>>,
}

impl Http1 {
    fn poll(&mut self, context: &mut Context<'_>) {
        // Why it has ended is told to whom it concerns.
        if self.driven.as_mut().is_some_and(|driven| Pin::new(driven).poll(context).is_ready()) {
            self.driven = None;
        }
    }

    /// Whether it can take the next request. One that the server has answered before it had read all of the request is not: the
    /// rest would stand in the way.
    fn is_idle(&mut self) -> bool {
        if !self.sender.is_ready() {
            self.poll(&mut Context::from_waker(Waker::noop()));
        }
        self.driven.is_some() && self.sender.is_ready()
    }

    /// Waits until a request can be sent. If the connection has ended, that comes back.
    async fn ready(&mut self, until: Instant) {
        let ready = poll_fn(|context| {
            self.poll(context);
            self.sender.poll_ready(context)
        });
        let _ = timeout_at(until, ready).await;
    }
}

pin_project! {
    /// Something that comes over a connection, or does not come in time.
    struct Driven<'a, F> {
        http1: &'a mut Http1,
        #[pin]
        awaited: F,
    }
}

impl<F: Future> Future for Driven<'_, F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.http1.poll(context);
        match this.awaited.poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => this.http1.timer.as_mut().poll(context).map(|()| None),
        }
    }
}

/// A connection that a call can be made over.
pub enum Connection {
    /// For one call at a time.
    Http1(Box<Http1>),
    /// For calls side by side.
    Http2(http2::SendRequest<Body>),
}

impl Connection {
    /// Makes a call; `None` if there is no answer in time.
    pub async fn ask(&mut self, request: Request<Body>, until: Instant) -> Option<Answer> {
        match self {
            Connection::Http1(http1) => {
                if !http1.sender.is_ready() {
                    Box::pin(http1.ready(until)).await;
                }
                let awaited = http1.sender.try_send_request(request);
                http1.timer.as_mut().reset(until);
                Driven { http1, awaited }.await
            }
            Connection::Http2(sender) => {
                Box::pin(timeout_at(until, sender.try_send_request(request))).await.ok()
            }
        }
    }

    /// Waits for the rest of an answer; `None` if it does not come in time.
    pub async fn wait<F: Future>(&mut self, awaited: F, until: Instant) -> Option<F::Output> {
        match self {
            Connection::Http1(http1) => {
                http1.timer.as_mut().reset(until);
                Driven { http1, awaited }.await
            }
            Connection::Http2(_) => timeout_at(until, awaited).await.ok(),
        }
    }
}

/// What is kept, and since when it is not used.
#[derive(Default)]
struct Kept {
    /// The one that was used last is the last.
    http1: Vec<(Box<Http1>, Instant)>,
    http2: Option<(http2::SendRequest<Body>, Instant)>,
    /// The server has answered over TLS, and speaks HTTP/1.1 only.
    is_http1: bool,
    /// Whether a task is there that closes what is not used.
    swept: bool,
}

impl Kept {
    fn http2(&mut self, now: Instant) -> Option<Connection> {
        self.http2.take_if(|(sender, _)| sender.is_closed());
        let (sender, used) = self.http2.as_mut()?;
        *used = now;
        Some(Connection::Http2(sender.clone()))
    }
}

async fn http1(stream: Stream) -> hyper::Result<Connection> {
    let (sender, connection) = http1::handshake(stream).await?;
    let timer = Box::pin(tokio::time::sleep(KEEP_IDLE));
    Ok(Connection::Http1(Box::new(Http1 { sender, driven: Some(connection), timer })))
}

/// The connections to one server.
pub struct Connections {
    connector: Connector,
    to: Uri,
    kept: Mutex<Kept>,
    /// As long as it may be that one connection is enough, one at a time is made.
    first: tokio::sync::Mutex<()>,
}

impl Connections {
    /// None yet. `to`: scheme and authority count.
    pub fn new(connector: Connector, to: Uri) -> Self {
        Connections { connector, to, kept: Mutex::default(), first: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that was kept.
    pub fn kept(&self, now: Instant) -> Option<Connection> {
        let mut kept = self.state();
        kept.http2(now).or_else(|| kept.http1.pop().map(|(http1, _)| Connection::Http1(http1)))
    }

    /// Keeps a connection of which nothing is awaited any more.
    pub fn keep(self: &Arc<Self>, mut connection: Connection, now: Instant) {
        if let Connection::Http1(http1) = &mut connection
            && !http1.is_idle()
        {
            return;
        }
        let mut kept = self.state();
        match connection {
            Connection::Http1(http1) => kept.http1.push((http1, now)),
            Connection::Http2(sender) if kept.http2.is_none() => kept.http2 = Some((sender, now)),
            Connection::Http2(_) => return,
        }
        if !kept.swept {
            kept.swept = true;
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// A new connection, or one of HTTP/2 that was made meanwhile. An error says why there is none.
    pub async fn connect(self: &Arc<Self>) -> Result<Connection, String> {
        let may_be_http2 = || self.to.scheme() == Some(&Scheme::HTTPS) && !self.state().is_http1;
        let mut turn = None;
        if may_be_http2() {
            turn = Some(self.first.lock().await);
            if let Some(connection) = self.state().http2(Instant::now()) {
                return Ok(connection);
            }
        }
        if !may_be_http2() {
            turn = None;
        }
        let mut connector = self.connector.clone();
        let stream = match poll_fn(|context| connector.poll_ready(context)).await {
            Ok(()) => connector.call(self.to.clone()).await,
            Err(error) => Err(error),
        };
        let stream = stream.map_err(|error| with_causes(&*error))?;
        let is_http2 = stream.connected().is_negotiated_h2();
        self.state().is_http1 = !is_http2;
        let connection = match is_http2 {
            true => self.http2(stream).await,
            false => http1(stream).await,
        };
        drop(turn);
        connection.map_err(|error| with_causes(&error))
    }

    async fn http2(self: &Arc<Self>, stream: Stream) -> hyper::Result<Connection> {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_IDLE)
            .max_header_list_size(HEADERS_BYTES_MAX);
        let (sender, connection) = builder.handshake(stream).await?;
        // It ends when nobody has a sender any more.
        tokio::spawn(connection);
        self.keep(Connection::Http2(sender.clone()), Instant::now());
        Ok(Connection::Http2(sender))
    }

    /// Closes what was not used for long. Answers when the next one may be due; `None` if none is left.
    pub fn close_idle(&self, now: Instant) -> Option<Instant> {
        let mut kept = self.state();
        let is_due = |used: Instant| used + KEEP_IDLE <= now;
        let due = kept.http1.partition_point(|(_, used)| is_due(*used));
        kept.http1.drain(..due);
        kept.http2.take_if(|(sender, used)| is_due(*used) || sender.is_closed());
        let oldest = kept.http1.first().map(|(_, used)| *used);
        let next = oldest.into_iter().chain(kept.http2.as_ref().map(|(_, used)| *used)).min();
        kept.swept = next.is_some();
        next.map(|used| used + KEEP_IDLE)
    }
}

/// Closes what is not used, until nothing is left.
async fn sweep(connections: Weak<Connections>) {
    loop {
        let next = connections.upgrade().and_then(|connections| connections.close_idle(Instant::now()));
        let Some(next) = next else { return };
        tokio::time::sleep_until(next).await;
    }
}
