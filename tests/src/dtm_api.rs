// SPDX-License-Identifier: PostgreSQL
//! A relay with a server for DTM's clients, and a client that sends it whatever it is told.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::cluster::Cluster;
use crate::relay::Relay;
use crate::{port, process};

/// The relay, and where its server is.
pub struct DtmServer {
    /// The process.
    pub relay: Relay,
    address: String,
    token: Option<String>,
}

/// An answer.
#[derive(Debug)]
pub struct Answered {
    /// Of HTTP.
    pub status: u16,
    /// All headers.
    pub headers: HeaderMap,
    /// The body as it came.
    pub text: String,
}

impl Answered {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

impl DtmServer {
    /// Starts a relay of the cluster's database `shop`. `settings` are further lines of `[dtm_server]`.
    pub async fn start(cluster: &Cluster, settings: &str) -> DtmServer {
        let address = format!("127.0.0.1:{}", port::free());
        let url = cluster.url("shop");
        let configuration =
            format!("[database.shop]\nurl = \"{url}\"\n[dtm_server]\nlisten = \"{address}\"\n{settings}\n");
        let variables = [("DTM_TEST_TOKEN", "open sesame")];
        let relay = Relay::start_configured_with(&configuration, &variables);
        relay.wait_for_log("listening for DTM's clients").await;
        DtmServer { relay, address, token: None }
    }

    /// The client shows this token from now on.
    pub fn show(&mut self, token: Option<&str>) {
        self.token = token.map(str::to_owned);
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What DTM's clients are given.
    pub fn url(&self) -> String {
        format!("http://{}/api/dtmsvr", self.address)
    }

    /// One request over a connection of its own.
    pub async fn call(&self, method: Method, target: &str, body: impl Into<Bytes>) -> Answered {
        let stream = TcpStream::connect(&self.address).await.expect("a connection");
        self.call_over(stream, method, target, body).await
    }

    /// One request over a connection that is there.
    pub async fn call_over(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        method: Method,
        target: &str,
        body: impl Into<Bytes>,
    ) -> Answered {
        let mut request = Request::builder().method(method).uri(target).header("host", &self.address);
        if let Some(token) = &self.token {
            request = request.header("authorization", token);
        }
        send(stream, request.body(Full::new(body.into())).expect("a request")).await
    }

    /// One request with a header more, or instead of its own.
    pub async fn call_with(&self, target: &str, header: (&str, &str), body: impl Into<Bytes>) -> Answered {
        let stream = TcpStream::connect(&self.address).await.expect("a connection");
        let mut request = Request::post(target).header("host", &self.address);
        let (name, value) = header;
        let headers = request.headers_mut().expect("headers");
        headers.insert(
            HeaderName::from_bytes(name.as_bytes()).expect("a name"),
            value.parse().expect("a value"),
        );
        send(stream, request.body(Full::new(body.into())).expect("a request")).await
    }

    /// GET of one of DTM's endpoints.
    pub async fn get(&self, name: &str) -> Answered {
        self.call(Method::GET, &format!("/api/dtmsvr/{name}"), "").await
    }

    /// POST to one of DTM's endpoints.
    pub async fn post(&self, name: &str, body: &Value) -> Answered {
        self.call(Method::POST, &format!("/api/dtmsvr/{name}"), body.to_string()).await
    }

    /// Waits until a transaction has a status.
    pub async fn wait_for_status(&self, gid: &str, status: &str) {
        let found = process::eventually(Duration::from_secs(30), || async {
            let found = self.get(&format!("query?gid={gid}")).await.json();
            (found["transaction"]["status"] == status).then_some(())
        });
        assert!(
            found.await.is_some(),
            "{gid} is not {status}: {:?}",
            self.get(&format!("query?gid={gid}")).await
        );
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answered {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    let answer = sender.send_request(request);
    let answer = tokio::time::timeout(Duration::from_secs(60), answer).await.expect("in time");
    let (parts, body) = answer.expect("an answer").into_parts();
    let body = body.collect().await.expect("a body").to_bytes();
    let text = String::from_utf8(body.to_vec()).expect("UTF-8");
    Answered { status: parts.status.as_u16(), headers: parts.headers, text }
}
