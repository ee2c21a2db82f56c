// SPDX-License-Identifier: PostgreSQL
//! 2-phase messages of two HTTP steps, from COMMIT to their end, against a bare program that writes the same rows and makes the
//! same calls; and how long what an outage has held up takes after it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_postgres::Client;
use uuid::Uuid;

use super::load::{self, DATABASE};
use super::processor::Watch;
use super::report::{Goal, Row};
use super::sink::Sink;
use super::statistics::Sample;
use crate::arrivals;
use crate::cluster::Cluster;
use crate::process;
use crate::receiver::{Receiver, Reply};
use crate::relay::Relay;

const RUN: Duration = Duration::from_secs(3);
const CLIENTS: usize = 16;
const STEPS: usize = 2;
const DRAIN: Duration = Duration::from_secs(120);
/// Messages that an outage holds up.
const STUCK: usize = 10_000;
const PAYLOAD: &str =
    r#"{"order": 4711, "customer": "customer-7", "items": [{"sku": "4711-0815", "quantity": 2}]}"#;

/// Tables as dtm's, to be written without it.
const BARE_TABLES: &str = "CREATE TABLE bare_transaction (LIKE dtm.transaction INCLUDING ALL);
    CREATE TABLE bare_log (LIKE dtm.log_1 INCLUDING ALL)";
const BARE_INSERT: &str =
    "INSERT INTO bare_transaction (gid, trans_type, status, branches, payloads, payload_bytes, options)
    VALUES ($1, 'msg', 'submitted', $2::text::jsonb, ARRAY[$3::bytea, $3::bytea], 2 * length($3), '{}')";
const BARE_LOG: &str = "INSERT INTO bare_log (seq, xid, published_at, era, id, topic, key)
    VALUES (nextval('dtm.event_seq'), pg_current_xact_id(), clock_timestamp(), 1, gen_random_uuid(), 'dtm.transactions', $1)";
const BARE_END: &str = "UPDATE bare_transaction SET status = 'succeed', finished_at = clock_timestamp()
    WHERE gid = $1 AND status = 'submitted'";

fn steps(url: &str) -> String {
    let step = format!(r#"{{"action": "{url}", "payload": {PAYLOAD}}}"#);
    format!("[{step}, {step}]")
}

/// Waits until a count is so high.
async fn until_so_many(client: &Client, count: i64, sql: &str) {
    let holds = process::eventually(DRAIN, || async {
        let found: i64 = client.query_one(sql, &[]).await.expect("a count").get(0);
        (found >= count).then_some(())
    });
    assert!(holds.await.is_some(), "less than {count}: {sql}");
}

async fn until_all_have_ended(client: &Client, count: i64) {
    let sql = "SELECT count(*) FILTER (WHERE status = 'succeed') FROM dtm.transaction";
    until_so_many(client, count, sql).await;
}

/// What a message took, beside its time.
struct Cost {
    server_ms: f64,
    relay_ms: f64,
    wal_bytes: f64,
    statements: f64,
}

async fn counters(client: &Client) -> (i64, i64) {
    let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8, sum(calls)::int8 FROM pg_stat_statements";
    let row = client.query_one(sql, &[]).await.expect("counters");
    (row.get(0), row.get(1))
}

/// Messages a second, from the first COMMIT to the last end.
async fn by_relay(cluster: &Cluster, client: &Client) -> (f64, Cost) {
    client.batch_execute("TRUNCATE dtm.transaction, dtm.branch, dtm.due").await.expect("TRUNCATE");
    let sink = Sink::start();
    let mut relay = Relay::start(&cluster.url(DATABASE));
    relay.wait_for_log("connected to").await;
    let steps = steps(&sink.url());
    // The first message calls for the coordinator.
    client.execute("SELECT dtm.msg_send($1::text::jsonb)", &[&steps]).await.expect("msg_send");
    until_all_have_ended(client, 1).await;
    let (wal, statements) = counters(client).await;
    let watch = Watch::begin(cluster, relay.pid(), sink.pid());
    let begun = Instant::now();
    let send = |client: Client| {
        let steps = steps.clone();
        async move {
            let statement =
                client.prepare("SELECT dtm.msg_send($1::text::jsonb, $2)").await.expect("a statement");
            let mut gids = Vec::new();
            while begun.elapsed() < RUN {
                let gid = Uuid::now_v7();
                client.execute(&statement, &[&steps, &gid.to_string()]).await.expect("msg_send");
                gids.push(gid);
            }
            gids
        }
    };
    let mut senders = Vec::new();
    for _ in 0..CLIENTS {
        senders.push(tokio::spawn(send(cluster.connect(DATABASE).await)));
    }
    let mut gids = Vec::new();
    for sender in senders {
        gids.extend(sender.await.expect("a client"));
    }
    let sent = begun.elapsed();
    // Counting rows would cost as much as what is measured.
    sink.wait_for(STEPS * (gids.len() + 1), DRAIN).await;
    until_all_have_ended(client, gids.len() as i64 + 1).await;
    let elapsed = begun.elapsed();
    eprintln!("{} messages sent in {sent:?}, ended in {elapsed:?}", gids.len());
    let (shares, (wal_after, statements_after)) = (watch.end(), counters(client).await);
    assert!(relay.terminate().await.success());
    let arrived: Vec<_> = sink.arrivals(STEPS);
    arrivals::assert_each(&arrived, &gids, STEPS);
    let count = gids.len() as f64;
    let ms = |share: f64| share * elapsed.as_secs_f64() * 1_000.0 / count;
    let cost = Cost {
        server_ms: ms(shares.server),
        relay_ms: ms(shares.relay),
        wal_bytes: (wal_after - wal) as f64 / count,
        statements: (statements_after - statements) as f64 / count,
    };
    (count / elapsed.as_secs_f64(), cost)
}

/// A connection to the endpoint.
async fn endpoint(sink: &Sink) -> SendRequest<Full<Bytes>> {
    let authority = sink.url().trim_start_matches("http://").trim_end_matches("/events").to_owned();
    let stream = TcpStream::connect(authority).await.expect("the endpoint");
    stream.set_nodelay(true).expect("nodelay");
    let (requests, connection) = handshake(TokioIo::new(stream)).await.expect("a connection");
    tokio::spawn(connection);
    requests
}

async fn call(endpoint: &mut SendRequest<Full<Bytes>>, gid: &str, branch: usize) {
    endpoint.ready().await.expect("a connection");
    let request = Request::post(format!("/events?gid={gid}&trans_type=msg&branch_id=0{branch}&op=action"))
        .header("host", "127.0.0.1")
        .header("content-type", "application/json")
        .body(Full::from(PAYLOAD))
        .expect("a request");
    let response = endpoint.send_request(request).await.expect("an answer");
    assert!(response.status().is_success());
    response.into_body().collect().await.expect("its body");
}

/// The same by hand; without the database, the calls alone.
async fn by_hand(cluster: &Cluster, writes: bool) -> f64 {
    let sink = Sink::start();
    let begun = Instant::now();
    let work = |mut client: Client, mut endpoint: SendRequest<Full<Bytes>>, steps: String| async move {
        let insert = client.prepare(BARE_INSERT).await.expect("a statement");
        let log = client.prepare(BARE_LOG).await.expect("a statement");
        let end = client.prepare(BARE_END).await.expect("a statement");
        let mut gids = Vec::new();
        while begun.elapsed() < RUN {
            let gid = Uuid::now_v7();
            let text = gid.to_string();
            if writes {
                let transaction = client.transaction().await.expect("BEGIN");
                transaction.execute(&insert, &[&text, &steps, &PAYLOAD.as_bytes()]).await.expect("INSERT");
                transaction.execute(&log, &[&text]).await.expect("INSERT");
                transaction.commit().await.expect("COMMIT");
            }
            for branch in 1..=STEPS {
                call(&mut endpoint, &text, branch).await;
            }
            if writes {
                client.execute(&end, &[&text]).await.expect("UPDATE");
            }
            gids.push(gid);
        }
        gids
    };
    let url = sink.url();
    let branches = format!(
        r#"[{{"branch_id": "01", "op": "action", "action": "{url}"}}, {{"branch_id": "02", "op": "action", "action": "{url}"}}]"#
    );
    let mut workers = Vec::new();
    for _ in 0..CLIENTS {
        let (client, endpoint) = (cluster.connect(DATABASE).await, endpoint(&sink).await);
        workers.push(tokio::spawn(work(client, endpoint, branches.clone())));
    }
    let gids: Vec<Uuid> =
        join_all(workers).await.into_iter().flat_map(|gids| gids.expect("a client")).collect();
    let elapsed = begun.elapsed();
    arrivals::assert_each(&sink.arrivals(0), &gids, STEPS);
    gids.len() as f64 / elapsed.as_secs_f64()
}

/// Seconds from an endpoint's return to the end of all that it has held up.
async fn recovery(cluster: &Cluster, client: &Client) -> f64 {
    client.batch_execute("TRUNCATE dtm.transaction, dtm.branch, dtm.due").await.expect("TRUNCATE");
    let mut receiver = Receiver::start_with(|_| Reply::status(200)).await;
    let url = receiver.url();
    receiver.stop();
    let mut relay = Relay::start(&cluster.url(DATABASE));
    let sql = "SELECT dtm.msg_send($1::text::jsonb) FROM generate_series(1, $2::int)";
    client.query(sql, &[&steps(&url), &(STUCK as i32)]).await.expect("msg_send");
    // All wait for the endpoint, and a few have tried it.
    until_so_many(client, STUCK as i64, "SELECT count(*) FROM dtm.due WHERE endpoint IS NOT NULL").await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let begun = Instant::now();
    receiver.restart().await;
    until_all_have_ended(client, STUCK as i64).await;
    let elapsed = begun.elapsed().as_secs_f64();
    assert_eq!(receiver.count(), STUCK * STEPS, "each step was called once");
    assert!(relay.terminate().await.success());
    elapsed
}

/// Runs the benchmark.
pub async fn run(pairs: usize) -> Vec<Row> {
    let libraries = Cluster::builder().config("shared_preload_libraries", "pg_dtm,pg_stat_statements");
    let cluster = load::cluster_of(libraries).await;
    let client = cluster.connect(DATABASE).await;
    client.batch_execute("CREATE EXTENSION pg_stat_statements").await.expect("statistics");
    client.batch_execute(BARE_TABLES).await.expect("tables");
    let (mut rates, mut to_calls, mut costs, mut recovered) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // The first pair warms up.
    for pair in 0..=pairs {
        let (mut ours, mut by_hand_rate) = (0.0, 0.0);
        for is_ours in [pair.is_multiple_of(2), !pair.is_multiple_of(2)] {
            if is_ours {
                let (rate, cost) = by_relay(&cluster, &client).await;
                ours = rate;
                costs.push(cost);
            } else {
                by_hand_rate = by_hand(&cluster, true).await;
            }
        }
        let calls = by_hand(&cluster, false).await;
        eprintln!("relay {ours:.0}/s, by hand {by_hand_rate:.0}/s, calls alone {calls:.0}/s");
        if pair > 0 {
            rates.push((ours, by_hand_rate));
            to_calls.push((ours, calls));
        }
    }
    for _ in 0..pairs.min(3) {
        recovered.push(recovery(&cluster, &client).await);
    }
    let cost = |of: fn(&Cost) -> f64| Sample::new(costs.iter().skip(1).map(of).collect());
    vec![
        Row::of_pairs("messages of 2 steps, 16 clients", "messages/s", &rates, Some(Goal::AtLeast(0.7))),
        Row::of_pairs("  against their calls alone", "messages/s", &to_calls, None),
        Row::of_values("  processor time of PostgreSQL", "ms a message", &cost(|c| c.server_ms), None),
        Row::of_values("  processor time of the relay", "ms a message", &cost(|c| c.relay_ms), None),
        Row::of_values("  statements", "a message", &cost(|c| c.statements), None),
        Row::of_values("  WAL", "bytes a message", &cost(|c| c.wal_bytes), None),
        Row::of_values(
            format!("{STUCK} messages after an outage"),
            "s",
            &Sample::new(recovered),
            Some(Goal::AtMost(10.0)),
        ),
    ]
}
