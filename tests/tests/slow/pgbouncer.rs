// SPDX-License-Identifier: PostgreSQL
//! Publishers behind a real PgBouncer in transaction mode.

use std::collections::HashSet;
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::pgbouncer::Pgbouncer;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;
use futures_util::future::join_all;
use tokio_postgres::{Client, SimpleQueryMessage};

const CLIENTS: usize = 12;
const ROUNDS: usize = 40;

/// The first column of the last row. Without prepared statements, which clients that share connections do not have.
async fn value(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let rows = messages.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    });
    rows.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_pgbouncer_in_transaction_mode_what_commits_is_delivered_and_nothing_else() {
    let cluster = Cluster::builder().preload().config("max_prepared_transactions", "30").start().await;
    cluster.create_database("shop").await;
    let receiver = Receiver::start().await;
    let admin = cluster.connect("shop").await;
    admin.execute("SELECT dtm.subscribe('s', '>', $1)", &[&receiver.url()]).await.expect("subscribe");
    let pgbouncer = Pgbouncer::start(&cluster).await;
    let mut relay = Relay::start(&cluster.url("shop"));

    let clients = (0..CLIENTS).map(|n| {
        let pgbouncer = &pgbouncer;
        async move {
            let client = pgbouncer.connect("shop").await;
            let (mut committed, mut backends) = (Vec::new(), HashSet::new());
            for round in 0..ROUNDS {
                backends.insert(value(&client, "SELECT pg_backend_pid()").await);
                committed.push(value(&client, "SELECT dtm.publish('single', '1')").await);
                value(&client, "BEGIN").await;
                let kept = value(&client, "SELECT dtm.publish('kept', '1', key => 'k')").await;
                value(&client, "SAVEPOINT s; SELECT dtm.publish('undone', '1'); ROLLBACK TO s").await;
                match round % 4 {
                    0 => {
                        value(&client, "ROLLBACK").await;
                    }
                    1 => {
                        value(&client, &format!("PREPARE TRANSACTION 'p{n}-{round}'")).await;
                        value(&client, &format!("COMMIT PREPARED 'p{n}-{round}'")).await;
                        committed.push(kept);
                    }
                    _ => {
                        value(&client, "COMMIT").await;
                        committed.push(kept);
                    }
                }
            }
            (committed, backends)
        }
    });
    let (mut committed, mut backends) = (HashSet::new(), 0);
    for (ids, seen) in join_all(clients).await {
        committed.extend(ids);
        backends = backends.max(seen.len());
    }
    assert!(backends > 1, "no client was given different server connections");
    let count = committed.len();
    receiver.wait_until("all", Duration::from_secs(30), |received| received.len() >= count).await;
    assert!(relay.terminate().await.success());
    let received = receiver.received();
    let arrived: HashSet<String> = received.iter().map(|request| request.id().to_owned()).collect();
    assert_eq!((arrived.len(), received.len()), (count, count));
    assert!(arrived == committed, "what arrived is not what was committed");
}
