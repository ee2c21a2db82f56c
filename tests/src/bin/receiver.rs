// SPDX-License-Identifier: PostgreSQL
//! A receiving HTTP service: takes CloudEvents, and prints a line for each, or takes note of when each arrived. The first
//! line that it prints is its port.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use clap::Parser;
use dtm_tests::arrivals::{ARRIVALS, COUNT, Log, monotonic_ns};
use http::{Method, Request, Response, StatusCode};
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
#[derive(Clone, Copy, Parser)]
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
    /// Keep the id, or gid, and the time of each call; GET /count and /arrivals?FROM answer them
    #[arg(long)]
    record: bool,
}

/// What is kept of the events that were taken.
type Kept = Arc<Mutex<Log>>;

async fn answer(
    request: Request<Incoming>,
    arguments: Arguments,
    kept: Kept,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    if head.method == Method::GET {
        let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        return Ok(match (head.uri.path(), head.uri.query().unwrap_or("0").parse()) {
            (COUNT, _) => Response::new(Full::from(kept.len().to_string())),
            (ARRIVALS, Ok(from)) => Response::new(Full::from(kept.encode(from))),
            _ => status(StatusCode::NOT_FOUND),
        });
    }
    let header =
        |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let Ok(body) = Limited::new(body, BODY_MAX).collect().await else {
        return Ok(status(StatusCode::PAYLOAD_TOO_LARGE));
    };
    let failing = arguments.fail > 0.0 && rand::rng().random_bool(arguments.fail);
    if arguments.record && !failing {
        let id = head.uri.query().and_then(gid).unwrap_or_else(|| header("ce-id"));
        let Ok(id) = id.parse() else { return Ok(status(StatusCode::BAD_REQUEST)) };
        kept.lock().unwrap_or_else(PoisonError::into_inner).push(id, monotonic_ns());
    }
    if arguments.print {
        let text: String = String::from_utf8_lossy(&body.to_bytes()).chars().take(SHOWN).collect();
        let key = header("ce-partitionkey");
        println!(
            "{} {} {key} {text}{}",
            header("ce-id"),
            header("ce-type"),
            if failing { "  503" } else { "" }
        );
    }
    Ok(status(if failing { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }))
}

/// Of a branch of a global transaction: the call bears no other id.
fn gid(query: &str) -> Option<String> {
    query.split('&').find_map(|pair| pair.strip_prefix("gid=")).map(str::to_owned)
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = status;
    response
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    if !(0.0..=1.0).contains(&arguments.fail) {
        return Err(format!("--fail {} is not between 0 and 1", arguments.fail).into());
    }
    let listen = arguments.listen;
    let listener = TcpListener::bind(listen).await.map_err(|error| format!("{listen}: {error}"))?;
    println!("{}", listener.local_addr()?.port());
    let kept = Kept::default();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let kept = kept.clone();
        let service = service_fn(move |request| answer(request, arguments, kept.clone()));
        // A connection that breaks is the client's affair.
        tokio::spawn(
            async move { http1::Builder::new().serve_connection(TokioIo::new(stream), service).await },
        );
    }
}
