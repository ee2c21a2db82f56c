// SPDX-License-Identifier: PostgreSQL
//! A receiving HTTP service for trying things out: takes CloudEvents, and prints a line for each. The first line that it
//! prints is its port.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;

use bytes::Bytes;
use clap::Parser;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rand::Rng;
use tokio::net::TcpListener;

/// A body that is greater is refused.
const BODY_MAX: usize = 16 << 20;
/// What is shown of a body.
const SHOWN: usize = 200;

/// Takes CloudEvents over HTTP and prints them.
#[derive(Parser)]
struct Arguments {
    /// Where to listen; port 0 is any free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Print a line for each event
    #[arg(long)]
    print: bool,
    /// Answer 503 to this part of the requests, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    fail: f64,
}

async fn answer(
    request: Request<Incoming>,
    print: bool,
    fail: f64,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let header =
        |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let mut response = Response::new(Full::new(Bytes::new()));
    let Ok(body) = Limited::new(body, BODY_MAX).collect().await else {
        *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
        return Ok(response);
    };
    let failing = rand::rng().random_bool(fail);
    if failing {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    if print {
        let text: String = String::from_utf8_lossy(&body.to_bytes()).chars().take(SHOWN).collect();
        let key = header("ce-partitionkey");
        println!(
            "{} {} {key} {text}{}",
            header("ce-id"),
            header("ce-type"),
            if failing { "  503" } else { "" }
        );
    }
    Ok(response)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { listen, print, fail } = Arguments::parse();
    if !(0.0..=1.0).contains(&fail) {
        return Err(format!("--fail {fail} is not between 0 and 1").into());
    }
    let listener = TcpListener::bind(listen).await.map_err(|error| format!("{listen}: {error}"))?;
    println!("{}", listener.local_addr()?.port());
    loop {
        let (stream, _) = listener.accept().await?;
        let service = service_fn(move |request| answer(request, print, fail));
        // A connection that breaks is the client's affair.
        tokio::spawn(
            async move { http1::Builder::new().serve_connection(TokioIo::new(stream), service).await },
        );
    }
}
