// SPDX-License-Identifier: PostgreSQL
//! The same promise where nobody arranges the interleaving: writers run side by side as fast as they can, transactions are
//! prepared and rolled back, and a reader takes one position after the other all the while.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dtm_core::page::Page;
use dtm_tests::cluster::Cluster;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

const WRITERS: u64 = 8;
const RUN_FOR: Duration = Duration::from_secs(5);

/// One writer; answers what it committed. Its events are numbered `writer * 10^9 + k`.
async fn write(client: Client, writer: u64, until: Instant) -> Vec<i64> {
    let mut random = StdRng::seed_from_u64(writer);
    let mut next = writer as i64 * 1_000_000_000;
    let mut committed = Vec::new();
    while Instant::now() < until {
        let mut sql = String::from("BEGIN; ");
        let mut events = Vec::new();
        for _ in 0..random.random_range(0..4) {
            next += 1;
            if random.random_range(0..4) == 0 {
                sql += &format!("SAVEPOINT s; SELECT dtm.publish('t', '{next}'); ROLLBACK TO s; ");
            } else {
                sql += &format!("SELECT dtm.publish('t', '{next}'); ");
                events.push(next);
            }
        }
        let commit = random.random_range(0..5) > 0;
        let gid = format!("{writer}-{next}");
        let end = match (random.random_range(0..4), commit) {
            (0, true) => {
                format!("SELECT pg_current_xact_id(); PREPARE TRANSACTION '{gid}'; COMMIT PREPARED '{gid}'")
            }
            (0, false) => {
                format!("SELECT pg_current_xact_id(); PREPARE TRANSACTION '{gid}'; ROLLBACK PREPARED '{gid}'")
            }
            (_, true) => "COMMIT".to_owned(),
            (_, false) => "ROLLBACK".to_owned(),
        };
        // One statement at a time: what is sent as one string would be one implicit transaction.
        for statement in (sql + &end).split("; ").filter(|statement| !statement.is_empty()) {
            client.simple_query(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        if commit {
            committed.append(&mut events);
        }
    }
    committed
}

/// Reads window after window until told that writing is over, and then to the end.
async fn read(client: Client, writing: &AtomicBool) -> (Vec<i64>, u64) {
    let poll = client.prepare("SELECT dtm.relay_poll($1)").await.expect("prepare");
    let page = client
        .prepare("SELECT dtm.relay_page($1, $2, $3, ARRAY['t'], NULL, 1000, 1000000)")
        .await
        .expect("prepare");
    let start = client
        .query_one("SELECT dtm.start_of_era((SELECT era FROM dtm.installation))", &[])
        .await
        .expect("start");
    let mut position: String = start.get(0);
    let (mut read, mut windows) = (Vec::new(), 0);
    loop {
        let last_round = !writing.load(Ordering::SeqCst);
        let head: Option<String> = client.query_one(&poll, &[&position]).await.expect("poll").get(0);
        let Some(head) = head else {
            if last_round {
                return (read, windows);
            }
            continue;
        };
        let mut after = 0i64;
        loop {
            let row = client.query_one(&page, &[&position, &head, &after]).await.expect("page");
            let page = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page");
            let number =
                |payload: &Bytes| str::from_utf8(payload).expect("UTF-8").parse::<i64>().expect("a number");
            read.extend(page.events.iter().filter_map(|event| event.payload.as_ref()).map(number));
            after = page.scanned;
            if page.done {
                break;
            }
        }
        position = head;
        windows += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_full_speed_lose_nothing_to_a_reader_at_full_speed() {
    let cluster =
        Cluster::builder().config("max_prepared_transactions", "50").config("fsync", "off").start().await;
    cluster.create_database("concurrent").await;
    let writing = std::sync::Arc::new(AtomicBool::new(true));
    let reader = {
        let (client, writing) = (cluster.connect("concurrent").await, writing.clone());
        tokio::spawn(async move { read(client, &writing).await })
    };
    let until = Instant::now() + RUN_FOR;
    let mut writers = Vec::new();
    for writer in 1..=WRITERS {
        let client = cluster.connect("concurrent").await;
        writers.push(tokio::spawn(write(client, writer, until)));
    }
    let mut committed = HashSet::new();
    for writer in writers {
        committed.extend(writer.await.expect("writer"));
    }
    writing.store(false, Ordering::SeqCst);
    let (read, windows) = reader.await.expect("reader");
    println!("{} events in {windows} windows", read.len());
    let distinct: HashSet<i64> = read.iter().copied().collect();
    assert_eq!(distinct.len(), read.len(), "an event was read twice");
    assert_eq!(
        committed.difference(&distinct).count(),
        0,
        "lost: {:?}",
        committed.difference(&distinct).take(5).collect::<Vec<_>>()
    );
    assert_eq!(distinct.difference(&committed).count(), 0, "rolled back and read");
    assert!(windows > 10, "the reader hardly ran");
}
