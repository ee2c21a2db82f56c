// SPDX-License-Identifier: PostgreSQL
//! Calls to a server that keeps connections, closes them or says nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(10);

/// A server that does something with each connection: where it listens, and how many connections there were.
async fn server<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> (String, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(stream));
        }
    });
    (address, connections)
}

/// Reads one request without a body, and answers.
async fn answer(stream: &mut TcpStream, answer: &str) -> bool {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => read.push(byte),
            Err(_) => return false,
        }
    }
    stream.write_all(answer.as_bytes()).await.is_ok()
}

fn endpoint(uri: &str) -> Endpoint {
    HttpCaller::new(None).unwrap().endpoint(uri.parse().unwrap()).unwrap()
}

async fn post(endpoint: &Endpoint, timeout: Duration) -> Outcome {
    endpoint.post(HeaderMap::new(), Bytes::new(), timeout).await
}

const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

#[tokio::test]
async fn a_handshake_that_hangs_is_no_connection_and_a_request_that_hangs_is_no_answer() {
    let (address, _) = server(async |stream| {
        tokio::time::sleep(TIMEOUT).await;
        drop(stream);
    })
    .await;
    let timeout = Duration::from_millis(200);
    let unsent = post(&endpoint(&format!("https://{address}/")), timeout).await;
    assert_eq!((unsent.class, unsent.error.as_str()), (Class::Unsent, "no connection within 0.2 s"));
    let failed = post(&endpoint(&format!("http://{address}/")), timeout).await;
    assert_eq!((failed.class, failed.error.as_str()), (Class::Failed, "no answer within 0.2 s"));
}

#[tokio::test]
async fn a_handshake_is_waited_for_less_long_than_an_answer() {
    let (address, _) = server(async |stream| {
        tokio::time::sleep(2 * TIMEOUT).await;
        drop(stream);
    })
    .await;
    let begin = Instant::now();
    let unsent = post(&endpoint(&format!("https://{address}/")), TIMEOUT).await;
    assert_eq!((unsent.class, unsent.error.as_str()), (Class::Unsent, "no connection within 5 s"));
    assert!(begin.elapsed() < TIMEOUT);
}

#[tokio::test]
async fn a_connection_is_used_again_by_all_that_call_the_same_server() {
    for body in [
        "content-length: 0\r\n\r\n",
        "content-length: 2\r\n\r\nno",
        "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    ] {
        let text = format!("HTTP/1.1 500 No\r\n{body}");
        let (address, connections) = server(move |mut stream| {
            let text = text.clone();
            async move { while answer(&mut stream, &text).await {} }
        })
        .await;
        let caller = HttpCaller::new(None).unwrap();
        let endpoint = |path| caller.endpoint(format!("http://{address}/{path}").parse().unwrap()).unwrap();
        for endpoint in &[endpoint("a"), endpoint("b"), endpoint("c?d")] {
            let outcomes = [post(endpoint, TIMEOUT).await, post(endpoint, TIMEOUT).await];
            assert!(outcomes.iter().all(|outcome| outcome.status == Some(500)), "{outcomes:?}");
        }
        assert_eq!(connections.load(Ordering::SeqCst), 1, "{body:?}");
    }
}

#[tokio::test]
async fn a_kept_connection_that_the_server_has_closed_costs_no_call() {
    let (address, connections) = server(async |mut stream| {
        answer(&mut stream, EMPTY).await;
    })
    .await;
    let endpoint = endpoint(&format!("http://{address}/"));
    for turn in 1..=20 {
        let outcome = post(&endpoint, TIMEOUT).await;
        assert_eq!(outcome.class, Class::Accepted, "{outcome}");
        assert_eq!(connections.load(Ordering::SeqCst), turn);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn what_is_left_of_an_answer_is_not_taken_for_the_next_one() {
    let long = format!("HTTP/1.1 500 No\r\ncontent-length: 200000\r\n\r\n{}", "x".repeat(200_000));
    let (address, connections) = server(move |mut stream| {
        let long = long.clone();
        async move { while answer(&mut stream, &long).await {} }
    })
    .await;
    let endpoint = endpoint(&format!("http://{address}/"));
    for turn in 1..=3 {
        let outcome = post(&endpoint, TIMEOUT).await;
        assert_eq!((outcome.status, outcome.body.len()), (Some(500), 1024));
        assert_eq!(connections.load(Ordering::SeqCst), turn);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_no_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let outcome = post(&endpoint(&format!("http://{address}/")), TIMEOUT).await;
    assert_eq!(outcome.class, Class::Unsent, "{outcome}");
    assert!(outcome.error.contains("refused"), "{outcome}");
}

#[tokio::test]
async fn a_connection_that_is_not_used_is_closed() {
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let (address, _) = server(move |mut stream| {
        let ended = ended.clone();
        async move {
            while answer(&mut stream, EMPTY).await {}
            ended.send(()).unwrap();
        }
    })
    .await;
    let endpoint = endpoint(&format!("http://{address}/"));
    assert_eq!(post(&endpoint, TIMEOUT).await.class, Class::Accepted);
    let next = endpoint.connections.close_idle(Instant::now()).expect("it is kept");
    assert!(end.try_recv().is_err() && next > Instant::now() + Duration::from_secs(20));
    assert_eq!(endpoint.connections.close_idle(next), None);
    end.recv().await.unwrap();
    assert_eq!(post(&endpoint, TIMEOUT).await.class, Class::Accepted);
}
