// SPDX-License-Identifier: PostgreSQL
//! Events that are numbered, so that what arrived shows what is missing, what came twice and in which order.

use std::time::Duration;

use dtm_tests::receiver::{Received, Receiver};
use tokio_postgres::Client;

/// For what takes well under a second where nothing else is going on.
pub const DEADLINE: Duration = Duration::from_secs(40);
/// Options of a subscription that does not wait for long.
pub const EAGER: &str = r#"{"timeout": 2, "retry_base": "50ms", "retry_cap": "500ms"}"#;

/// Subscribes a receiver.
pub async fn subscribe(client: &Client, name: &str, topic: &str, receiver: &Receiver) {
    let sql = format!("SELECT dtm.subscribe($1, $2, $3, '{EAGER}')");
    client.execute(&sql, &[&name, &topic, &receiver.url()]).await.expect("subscribe");
}

/// Publishes payloads `first` to `last`, each in a transaction of its own, under keys by the remainder of 5.
pub async fn publish(client: &Client, topic: &str, first: i32, last: i32) {
    for n in first..=last {
        let key = format!("k{}", n % 5);
        let sql = "SELECT dtm.publish($1, to_jsonb($2::int), key => $3)";
        client.execute(sql, &[&topic, &n, &key]).await.expect("publish");
    }
}

/// The payload.
pub fn number(received: &Received) -> i32 {
    str::from_utf8(&received.body).expect("UTF-8").parse().expect("a number")
}

/// Numbers that were accepted, each at its first arrival.
pub fn arrived(received: &[Received]) -> Vec<i32> {
    let mut numbers = Vec::new();
    for n in received.iter().filter(|request| request.accepted).map(number) {
        if !numbers.contains(&n) {
            numbers.push(n);
        }
    }
    numbers
}

/// Waits until 1 to `last` have arrived, each key in order.
pub async fn wait_for_all(receiver: &Receiver, last: i32) {
    let what = format!("1 to {last}");
    receiver.wait_until(&what, DEADLINE, |received| arrived(received).len() >= last as usize).await;
    let numbers = arrived(&receiver.received());
    for key in 0..5 {
        let of_key: Vec<i32> = numbers.iter().copied().filter(|n| n % 5 == key).collect();
        assert!(of_key.is_sorted(), "order of key k{key}: {of_key:?}");
    }
}

/// How often each number from 1 to `last` was accepted.
pub fn times(receiver: &Receiver, last: i32) -> Vec<usize> {
    let numbers: Vec<i32> = receiver.accepted().iter().map(number).collect();
    (1..=last).map(|n| numbers.iter().filter(|&&accepted| accepted == n).count()).collect()
}
