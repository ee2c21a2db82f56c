// SPDX-License-Identifier: PostgreSQL
//! Access lists of a broker, in Kafka's own protocol: neither the client library nor the broker's programs can write them.

use std::time::Duration;

use bytes::{Buf, BufMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process;

const DEADLINE: Duration = Duration::from_secs(30);

/// The requests, in a version from before the protocol's compact encoding.
const DESCRIBE_ACLS: i16 = 29;
const CREATE_ACLS: i16 = 30;
const DELETE_ACLS: i16 = 31;
const VERSION: i16 = 1;

const RESOURCE_TOPIC: i8 = 2;
const PATTERN_LITERAL: i8 = 3;
const PERMISSION_DENY: i8 = 2;

/// What is denied of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading its records.
    Read = 3,
    /// Writing records.
    Write = 4,
    /// Knowing of it.
    Describe = 8,
}

/// What becomes of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Deny,
    Allow,
}

/// Makes or removes the entry that denies everybody an operation on a topic, and waits until the broker knows.
pub(crate) async fn change(bootstrap: &str, topic: &str, operation: Operation, change: Change) {
    let mut stream = TcpStream::connect(bootstrap).await.expect("a connection to the broker");
    let entry = entry(topic, operation);
    let mut list = 1_i32.to_be_bytes().to_vec();
    list.extend(&entry);
    let request = if change == Change::Deny { CREATE_ACLS } else { DELETE_ACLS };
    let mut answer = &ask(&mut stream, request, &list).await[..];
    assert_eq!(answer.get_i32(), 1, "one answer for one entry");
    assert_eq!(answer.get_i16(), 0, "Kafka does not change its access list: {}", text(&mut answer));
    // The controller has it; the broker learns of it from there.
    let expected = i32::from(change == Change::Deny);
    let stream = &tokio::sync::Mutex::new(stream);
    let attempt = || async { (count(&mut *stream.lock().await, &entry).await == expected).then_some(()) };
    let known = process::eventually(DEADLINE, attempt).await;
    assert!(known.is_some(), "the broker does not learn of its access list");
}

/// How many topics have this entry.
async fn count(stream: &mut TcpStream, entry: &[u8]) -> i32 {
    let mut answer = &ask(stream, DESCRIBE_ACLS, entry).await[..];
    assert_eq!(answer.get_i16(), 0, "Kafka does not tell its access list");
    text(&mut answer);
    answer.get_i32()
}

/// An entry, or the search for it: they look the same.
fn entry(topic: &str, operation: Operation) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_i8(RESOURCE_TOPIC);
    put_text(&mut bytes, topic);
    bytes.put_i8(PATTERN_LITERAL);
    put_text(&mut bytes, "User:*");
    put_text(&mut bytes, "*");
    bytes.put_i8(operation as i8);
    bytes.put_i8(PERMISSION_DENY);
    bytes
}

/// Sends a request and answers the response, from what follows the time that it says to wait.
async fn ask(stream: &mut TcpStream, request: i16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    message.put_i16(request);
    message.put_i16(VERSION);
    message.put_i32(1);
    put_text(&mut message, "pg_dtm");
    message.extend(body);
    let exchange = async {
        stream.write_i32(i32::try_from(message.len()).expect("a short request")).await?;
        stream.write_all(&message).await?;
        let length = stream.read_i32().await?;
        let mut answer = vec![0; usize::try_from(length).expect("a length")];
        stream.read_exact(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(DEADLINE, exchange).await.expect("an answer in time");
    // The request's number and the time to wait.
    answer.expect("the broker's answer").split_off(8)
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.put_i16(i16::try_from(text.len()).expect("a short text"));
    bytes.extend(text.as_bytes());
}

/// A text of a response, which may be missing.
fn text(bytes: &mut &[u8]) -> String {
    let length = usize::try_from(bytes.get_i16()).unwrap_or(0);
    String::from_utf8_lossy(&bytes.copy_to_bytes(length)).into_owned()
}
