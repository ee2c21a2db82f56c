// SPDX-License-Identifier: PostgreSQL
//! The log turns over under load, with readers, dumps and prepared transactions in its way: nothing is lost, no publisher waits,
//! and space comes back. Who lags too far behind is told of, and dropped if it says so.

use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::asking::{number, wait};
use crate::load::{self, Habits, Load};
use crate::numbered::{DEADLINE, publish, wait_for_all};

const HABITS: Habits =
    Habits { asynchronous_one_in: 0, prepared_one_in: 20, pause: Duration::from_millis(2) };

/// A database whose log is kept for no longer than it must.
async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().preload().config("max_prepared_transactions", "20").start().await;
    cluster.create_database("shop").await;
    let admin = cluster.connect("shop").await;
    // Nobody waits long for a lock: if somebody did, it would stand in the server's log.
    let settings = "SELECT dtm.library_protocol(); ALTER DATABASE shop SET dtm.retention = '500ms'; \
                    ALTER DATABASE shop SET lock_timeout = '900ms'";
    admin.batch_execute(settings).await.expect("settings");
    let client = cluster.connect("shop").await;
    (cluster, client)
}

/// Of a relay under which segments turn over all the time.
pub fn configured(cluster: &Cluster, database: &str) -> String {
    let url = cluster.url(database);
    format!("upkeep_every = \"50ms\"\ncontrol_bytes = 65536\n[database.it]\nurl = \"{url}\"\n")
}

const SEGMENT: &str = "SELECT log_segment::bigint FROM dtm.installation";
const CONTROL: &str = "SELECT control_segment::bigint FROM dtm.installation";
const EVENTS: &str = "SELECT count(*) FROM dtm.log";

/// Waits until the log has gone on to other segments so many times.
async fn turns(client: &Client, sql: &str, times: usize) {
    for _ in 0..times {
        let before = number(client, sql).await;
        wait(client, sql, |now| now != before).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nobody_waits_while_segments_turn_over_under_load() {
    let (cluster, client) = shop().await;
    load::prepare(&client).await;
    let receiver = Receiver::start().await;
    let subscribe = "SELECT dtm.subscribe('s', 'load.*', $1)";
    client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start_configured(&configured(&cluster, "shop"));
    let load = Load::start(&cluster, "shop", 4, HABITS);
    turns(&client, SEGMENT, 4).await;
    turns(&client, CONTROL, 2).await;

    // A reader on every segment, and a prepared transaction in one of them.
    let reader = cluster.connect("shop").await;
    reader.batch_execute("BEGIN; SELECT count(*) FROM dtm.log").await.expect("a reader");
    let preparing = cluster.connect("shop").await;
    let prepare = "BEGIN; SELECT dtm.publish('other', '1'); PREPARE TRANSACTION 'long'";
    preparing.batch_execute(prepare).await.expect("a prepared transaction");
    let held = number(&client, EVENTS).await;
    wait(&client, EVENTS, |events| events > held + 1_000).await;
    reader.batch_execute("COMMIT").await.expect("COMMIT");
    preparing.batch_execute("COMMIT PREPARED 'long'").await.expect("COMMIT PREPARED");
    turns(&client, SEGMENT, 4).await;

    for _ in 0..3 {
        let mut dump = Command::new(bin_dir().join("pg_dump"));
        process::run(dump.args(["-d", &cluster.url("shop")]));
    }
    relay.kill9();
    relay.restart();
    turns(&client, SEGMENT, 3).await;
    let ledger = load.stop().await;
    receiver.wait_until("all", DEADLINE, |received| ledger.is_complete(received)).await;
    ledger.assert_kept(&receiver.received());
    let events = load::assert_versions(&client, &receiver.received()).await;
    println!("{events} events, of which the log has {}", number(&client, EVENTS).await);
    // Events that are older than the retention time and delivered do not stay, whatever is published.
    wait(&client, EVENTS, |events| events < 2_000).await;
    publish(&client, "other", 1, 1).await;
    turns(&client, SEGMENT, 1).await;
    publish(&client, "other", 2, 2).await;
    wait(&client, EVENTS, |events| events <= 2).await;
    assert!(!cluster.log().contains("lock timeout"), "somebody waited:\n{}", cluster.log());
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_was_away_for_several_retention_times_delivers_everything() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    let subscribe = "SELECT dtm.subscribe('s', 't', $1)";
    client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start_configured(&configured(&cluster, "shop"));
    publish(&client, "t", 1, 10).await;
    wait_for_all(&receiver, 10).await;
    receiver.behave(|_| Reply::Hang);
    for first in [11, 21] {
        // Read before anything is published: on a slow machine the log has gone on before that is done.
        let before = number(&client, SEGMENT).await;
        publish(&client, "t", first, first + 9).await;
        wait(&client, SEGMENT, |now| now != before).await;
    }
    relay.kill9();
    let published = "SELECT pg_sleep(2)";
    client.execute(published, &[]).await.expect("four retention times");
    publish(&client, "t", 31, 40).await;
    receiver.behave(|_| Reply::status(200));
    relay.restart();
    wait_for_all(&receiver, 40).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    publish(&client, "t", 41, 41).await;
    wait(&client, EVENTS, |events| events <= 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_lags_is_told_of_and_dropped_if_it_says_so() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    for (name, options) in
        [("keeps", r#"{"max_lag": "1s"}"#), ("drops", r#"{"max_lag_bytes": 5000, "on_lag": "drop"}"#)]
    {
        let sql = format!("SELECT dtm.subscribe('{name}', 't', $1, '{options}'), dtm.pause('{name}')");
        client.execute(&sql, &[&receiver.url()]).await.expect("subscribe");
    }
    let relay = Relay::start_configured(&format!("lag_patience = 0\n{}", configured(&cluster, "shop")));
    publish(&client, "t", 1, 500).await;
    relay.wait_for_log("it lags far behind, and the log is kept for it").await;
    relay.wait_for_log("it lagged too far behind and is dropped: it has lost events 1 to").await;
    let sql = "SELECT state, reason, lag_bytes FROM dtm.subscriptions ORDER BY name";
    let rows = client.query(sql, &[]).await.expect("both");
    let states: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(states, ["dropped", "paused"]);
    assert!(rows[0].get::<_, &str>(1).contains("has lost events 1 to"), "{:?}", rows[0]);
    assert!(rows[1].get::<_, i64>(2) > 5_000, "{:?}", rows[1]);
    for refused in ["SELECT dtm.resume('drops')", "SELECT dtm.pause('drops')"] {
        let error = client.execute(refused, &[]).await.expect_err("it is dropped");
        let error = error.as_db_error().expect("a database's error");
        assert_eq!(error.code().code(), "55000");
        assert!(error.hint().expect("a hint").contains("dtm.rewind"));
    }
    assert_eq!(number(&client, EVENTS).await, 500, "one that keeps holds the log");
    // With the limit that it had it would be dropped again before it has caught up.
    let more = "SELECT dtm.subscribe('drops', 't', $1), dtm.rewind('drops', 'earliest'), dtm.resume('drops'), dtm.resume('keeps')";
    client.execute(more, &[&receiver.url()]).await.expect("both go on");
    receiver.wait_until("all, twice", DEADLINE, |received| received.len() == 1_000).await;
    publish(&client, "t", 501, 501).await;
    wait(&client, EVENTS, |events| events <= 1).await;
}
