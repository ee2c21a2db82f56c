// SPDX-License-Identifier: PostgreSQL
//! What a relay is measured against: a bare client that has all events in memory and posts them over connections that are
//! kept, with the headers and bodies that a relay sends. It prints a line when it is ready, and begins when it reads one.

use std::error::Error;
use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use clap::Parser;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_postgres::{NoTls, Row};

/// Posts the events of a database's log.
#[derive(Parser)]
struct Arguments {
    /// The database
    #[arg(long)]
    database_url: String,
    /// Where to post
    #[arg(long)]
    to: Uri,
    /// Connections, each with one request at a time
    #[arg(long)]
    connections: usize,
    /// So many events
    #[arg(long)]
    events: i64,
}

struct Post {
    headers: HeaderMap,
    body: Bytes,
}

const SQL: &str = "SELECT id::text, topic, key, body, content_type, headers ->> 'x-tenant', \
    to_char(published_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') FROM dtm.events ORDER BY seq LIMIT $1";

fn post(row: &Row, host: &HeaderValue) -> Result<Post, Box<dyn Error + Send + Sync>> {
    let mut headers = HeaderMap::new();
    headers.insert(HOST, host.clone());
    headers.insert(USER_AGENT, HeaderValue::from_static("poster"));
    headers.insert(HeaderName::from_static("ce-specversion"), HeaderValue::from_static("1.0"));
    headers.insert(HeaderName::from_static("ce-source"), HeaderValue::from_static("/pg_dtm/bench"));
    for (at, name) in [(0, "ce-id"), (1, "ce-type"), (2, "ce-partitionkey"), (5, "x-tenant"), (6, "ce-time")]
    {
        headers.insert(HeaderName::from_static(name), row.get::<_, &str>(at).parse()?);
    }
    headers.insert(CONTENT_TYPE, row.get::<_, &str>(4).parse()?);
    Ok(Post { headers, body: Bytes::from(row.get::<_, Vec<u8>>(3)) })
}

async fn deliver(
    to: Uri,
    posts: Arc<Vec<Post>>,
    next: Arc<AtomicUsize>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let address = to.authority().ok_or("a URL has a host")?.as_str();
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    while let Some(post) = posts.get(next.fetch_add(1, Ordering::Relaxed)) {
        let mut request = Request::new(Full::new(post.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = to.path().parse()?;
        *request.headers_mut() = post.headers.clone();
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        if !response.status().is_success() {
            return Err(format!("{} from the endpoint", response.status()).into());
        }
        response.into_body().collect().await?;
    }
    Ok(())
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let Arguments { database_url, to, connections, events } = Arguments::parse();
    let (client, connection) = tokio_postgres::connect(&database_url, NoTls).await?;
    tokio::spawn(connection);
    let host: HeaderValue = to.authority().ok_or("a URL has a host")?.as_str().parse()?;
    let rows = client.query(SQL, &[&events]).await?;
    let posts: Vec<Post> = rows.iter().map(|row| post(row, &host)).collect::<Result<_, _>>()?;
    drop(rows);
    let posts = Arc::new(posts);
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new())?;
    let next = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> =
        (0..connections).map(|_| tokio::spawn(deliver(to.clone(), posts.clone(), next.clone()))).collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}
