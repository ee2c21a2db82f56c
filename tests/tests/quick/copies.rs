// SPDX-License-Identifier: PostgreSQL
//! A dump that is restored is another database: transaction ids in it mean nothing there.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver};
use dtm_tests::relay::Relay;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokio_postgres::Client;

use crate::reading::{deliver_everything, pending};

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_waits_to_be_resumed_and_then_goes_on_where_the_dump_stood() {
    let (source, target) = (Cluster::builder().start().await, Cluster::builder().start().await);
    source.create_database("shop").await;
    let client = source.connect("shop").await;
    let receiver = Receiver::start().await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&source.url("shop"));
    client.execute("SELECT dtm.publish('t', '1', key => 'k')", &[]).await.expect("publish");
    receiver.wait_for(1).await;
    assert!(relay.terminate().await.success());
    // Committed and not delivered when the dump is made; and one whose transaction is still open then.
    client.execute("SELECT dtm.publish('t', '2', key => 'k')", &[]).await.expect("publish");
    let open = source.connect("shop").await;
    open.batch_execute("BEGIN; SELECT dtm.publish('t', '99')").await.expect("publish");
    let dump = process::run(Command::new(bin_dir().join("pg_dump")).args(["-d", &source.url("shop")]));
    open.batch_execute("COMMIT").await.expect("COMMIT");

    let admin = target.connect("postgres").await;
    admin.batch_execute("CREATE DATABASE shop").await.expect("a database");
    target.psql("shop", &dump);
    let restored = target.connect("shop").await;
    restored.execute("SELECT dtm.publish('t', '3', key => 'k')", &[]).await.expect("publish");
    let mut relay = Relay::start(&target.url("shop"));
    relay.wait_for_log("connected to").await;
    let sql = "SELECT state, reason FROM dtm.subscriptions";
    let row = restored.query_one(sql, &[]).await.expect("it");
    assert_eq!(
        (row.get::<_, &str>(0), row.get::<_, &str>(1)),
        ("paused", "the database was restored or copied")
    );
    assert_eq!(receiver.count(), 1, "a restored database calls nobody unasked");
    restored.execute("SELECT dtm.resume('s')", &[]).await.expect("resume");
    receiver.wait_for(3).await;
    restored.execute("SELECT dtm.publish('t', '4', key => 'k')", &[]).await.expect("publish");
    receiver.wait_until("the last", Duration::from_secs(30), |received| received.len() >= 4).await;
    assert!(relay.terminate().await.success());
    let bodies: Vec<_> = receiver.received().iter().map(|request| request.body.clone()).collect();
    assert_eq!(bodies, ["1", "2", "3", "4"]);
}

/// Restores a dump of one database of the cluster into a new one.
async fn copy(cluster: &Cluster, from: &str, to: &str) -> Client {
    let dump = process::run(Command::new(bin_dir().join("pg_dump")).args(["-d", &cluster.url(from)]));
    let create = format!("CREATE DATABASE {to}");
    cluster.connect("postgres").await.batch_execute(&create).await.expect("a database");
    cluster.psql(to, &dump);
    cluster.connect(to).await
}

async fn publish(client: &Client, n: i32) {
    let sql = "SELECT dtm.publish('t', to_jsonb($1::int), key => 'k')";
    client.execute(sql, &[&n]).await.expect("publish");
}

fn bodies(receiver: &Receiver) -> Vec<String> {
    let body = |request: &Received| String::from_utf8_lossy(&request.body).into_owned();
    receiver.received().iter().map(body).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_restored_twice_before_its_first_relay_is_delivered_oldest_first() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("first").await;
    let (waits, goes_on, late) = (Receiver::start().await, Receiver::start().await, Receiver::start().await);
    let client = cluster.connect("first").await;
    client.execute("SELECT dtm.subscribe('waits', 't', $1)", &[&waits.url()]).await.expect("subscribe");
    let subscribe = "SELECT dtm.subscribe($1, 't', $2, '{\"on_restore\": \"continue\"}', $3)";
    client.execute(subscribe, &[&"goes_on", &goes_on.url(), &"now"]).await.expect("subscribe");
    publish(&client, 1).await;
    publish(&client, 2).await;
    let client = copy(&cluster, "first", "second").await;
    publish(&client, 3).await;
    let client = copy(&cluster, "second", "third").await;
    publish(&client, 4).await;
    client.execute(subscribe, &[&"late", &late.url(), &"earliest"]).await.expect("subscribe");

    let mut relay = Relay::start(&cluster.url("third"));
    for receiver in [&goes_on, &late] {
        receiver.wait_for(4).await;
        assert_eq!(bodies(receiver), ["1", "2", "3", "4"]);
    }
    let sql = "SELECT state FROM dtm.subscriptions ORDER BY name";
    let rows = client.query(sql, &[]).await.expect("states");
    let states: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(states, ["active", "active", "paused"]);
    assert_eq!(waits.count(), 0, "a restored database calls nobody unasked");
    client.execute("SELECT dtm.resume('waits')", &[]).await.expect("resume");
    publish(&client, 5).await;
    for receiver in [&waits, &goes_on, &late] {
        receiver.wait_for(5).await;
        assert_eq!(bodies(receiver), ["1", "2", "3", "4", "5"]);
    }
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn eras_without_an_event_have_their_place_by_their_positions() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("first").await;
    let mut client = cluster.connect("first").await;
    let mut eras: Vec<i32> = Vec::new();
    for (name, current, next) in
        [("a", "first", "second"), ("b", "second", "third"), ("c", "third", "fourth")]
    {
        let sql = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/')";
        client.execute(sql, &[&name]).await.expect("subscribe");
        eras.push(client.query_one("SELECT era FROM dtm.installation", &[]).await.expect("era").get(0));
        client = copy(&cluster, current, next).await;
    }
    eras.push(client.query_one("SELECT era FROM dtm.installation", &[]).await.expect("era").get(0));
    let hello = "SELECT eras FROM dtm.relay_hello('default')";
    let found: Vec<i32> = client.query_one(hello, &[]).await.expect("hello").get(0);
    assert_eq!(found, eras);
    let again: Vec<i32> = client.query_one(hello, &[]).await.expect("hello").get(0);
    assert_eq!(again, eras);
}

/// Restores a part of a dump, as pg_restore lists it.
fn restore(url: &str, folder: &Path, entries: &[&str]) {
    let list = folder.join("list");
    std::fs::write(&list, entries.join("\n") + "\n").expect("a list");
    let mut restore = Command::new(bin_dir().join("pg_restore"));
    process::run(restore.args(["--exit-on-error", "-d", url, "-L"]).arg(&list).arg(folder.join("dump")));
}

/// Everything that a relay does which could destroy or move something. Answers the subscriptions that it would deliver.
async fn act_as_a_relay(client: &Client) -> Vec<String> {
    client.execute("SELECT * FROM dtm.relay_hello('default')", &[]).await.expect("hello");
    let assign =
        "SELECT name FROM dtm.relay_assign('00000000-0000-0000-0000-0000000000cc', 'test', 60) ORDER BY name";
    client.execute(assign, &[]).await.expect("leases");
    client.execute("SELECT * FROM dtm.relay_due(100)", &[]).await.expect("due");
    for _ in 0..4 {
        client.execute("SELECT dtm.rotate_log(), dtm.rotate_control(0)", &[]).await.expect("rotation");
    }
    let rows = client.query(assign, &[]).await.expect("leases");
    rows.iter().map(|row| row.get(0)).collect()
}

async fn restored_table_by_table(order: impl Fn(&mut Vec<&str>)) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    // Whatever is delivered is needless at once.
    let settings =
        "SELECT dtm.library_protocol(); SET dtm.retention = 0; SELECT * FROM dtm.relay_hello('default')";
    client.batch_execute(settings).await.expect("settings");
    let subscribe = "SELECT dtm.subscribe('waits', 't', 'http://127.0.0.1:9/'), \
                     dtm.subscribe('goes_on', 't', 'http://127.0.0.1:9/', '{\"on_restore\": \"continue\"}')";
    client.execute(subscribe, &[]).await.expect("subscribe");
    publish(&client, 1).await;
    deliver_everything(&client).await;
    // Three segments of the log with something in each, and both of control data.
    for n in [2, 3, 4] {
        publish(&client, n).await;
        client.execute("SELECT dtm.rotate_log(), dtm.rotate_control(0)", &[]).await.expect("rotation");
    }
    let delayed =
        "SELECT dtm.publish('t', '5', key => 'k', deliver_at => clock_timestamp() + interval '1 h')";
    client.execute(delayed, &[]).await.expect("publish");
    client.execute("UPDATE dtm.delayed SET due = clock_timestamp()", &[]).await.expect("it is due");
    let send = r#"SELECT dtm.msg_send('[{"action": "http://127.0.0.1:9/"}]')"#;
    client.execute(send, &[]).await.expect("msg_send");
    assert_eq!(pending(&client, "waits").await, ["2", "3", "4"]);
    let folder = tempfile::tempdir().expect("a folder");
    let dump = ["-Fc", "-d", &cluster.url("shop"), "-f"];
    process::run(Command::new(bin_dir().join("pg_dump")).args(dump).arg(folder.path().join("dump")));
    let list =
        process::run(Command::new(bin_dir().join("pg_restore")).arg("-l").arg(folder.path().join("dump")));

    cluster.connect("postgres").await.batch_execute("CREATE DATABASE again").await.expect("a database");
    let url = cluster.url("again");
    let of = |what: &str| -> Vec<&str> { list.lines().filter(|line| line.contains(what)).collect() };
    restore(&url, folder.path(), &of(" EXTENSION "));
    let again = cluster.connect("again").await;
    again.batch_execute("SELECT dtm.library_protocol(); SET dtm.retention = 0").await.expect("settings");
    let (mut tables, sequences) = (of(" TABLE DATA dtm "), of(" SEQUENCE SET dtm "));
    assert!(tables.len() > 10 && sequences.len() > 4, "{list}");
    order(&mut tables);
    assert!(act_as_a_relay(&again).await.is_empty());
    for entry in tables.iter().chain(&sequences[..sequences.len() - 1]) {
        restore(&url, folder.path(), &[entry]);
        assert!(act_as_a_relay(&again).await.is_empty(), "delivered before all is there: {entry}");
    }
    // A restore over several connections sets sequences while it still copies events.
    let copying = cluster.connect("again").await;
    copying.batch_execute("BEGIN; LOCK TABLE dtm.log_2 IN ROW EXCLUSIVE MODE").await.expect("a lock");
    restore(&url, folder.path(), &sequences[sequences.len() - 1..]);
    assert!(act_as_a_relay(&again).await.is_empty(), "delivered before all is there");
    copying.batch_execute("COMMIT").await.expect("COMMIT");
    assert_eq!(act_as_a_relay(&again).await, ["goes_on"]);
    let states = "SELECT string_agg(name || ' ' || state, ', ' ORDER BY name) FROM dtm.subscription";
    assert_eq!(
        again.query_one(states, &[]).await.expect("states").get::<_, &str>(0),
        "dtm.transactions paused, goes_on active, waits paused"
    );
    publish(&again, 6).await;
    let eras = "SELECT r.eras, (SELECT era FROM dtm.installation) FROM dtm.subscription s, dtm.relay_resume(s.id, 0, s.epoch) r";
    for row in again.query(eras, &[]).await.expect("eras") {
        let eras: Vec<i32> = row.get(0);
        assert_eq!((eras.len(), eras.last()), (2, Some(&row.get(1))));
    }
    // All that was not delivered is there, in its order, and within its era.
    let left = "SELECT string_agg(convert_from(l.payload, 'UTF8'), ' ' ORDER BY l.seq) FROM dtm.log l WHERE l.payload <> '1'";
    assert_eq!(again.query_one(left, &[]).await.expect("the log").get::<_, &str>(0), "2 3 4 5 6");
}

#[tokio::test]
async fn a_relay_that_is_there_while_tables_are_restored_in_pg_dumps_order_loses_nothing() {
    restored_table_by_table(|_| {}).await;
}

#[tokio::test]
async fn a_relay_that_is_there_while_subscriptions_are_restored_before_their_cursors_and_events_loses_nothing()
 {
    restored_table_by_table(|tables| tables.reverse()).await;
}

#[tokio::test]
async fn a_relay_that_is_there_while_tables_are_restored_in_any_order_loses_nothing() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    restored_table_by_table(|tables| tables.shuffle(&mut StdRng::seed_from_u64(seed))).await;
}

#[tokio::test]
async fn a_subscription_that_was_dropped_before_the_copy_waits_to_be_resumed_after_a_rewind() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    for (name, options) in [("waits", "{}"), ("goes_on", "{\"on_restore\": \"continue\"}")] {
        let subscribe = "SELECT dtm.subscribe($1, 't', 'http://127.0.0.1:9/', $2::text::jsonb)";
        client.execute(subscribe, &[&name, &options]).await.expect("subscribe");
    }
    let dropped =
        "UPDATE dtm.subscription SET state = 'dropped', state_before = 'active', reason = 'it lagged'";
    client.execute(dropped, &[]).await.expect("it is dropped");
    client.execute("SELECT dtm.adopt('staging')", &[]).await.expect("adopt");
    let states = "SELECT state FROM dtm.subscription ORDER BY name";
    for (expected, next) in [
        (["dropped", "dropped"], Some("SELECT dtm.rewind(name, 'now') FROM dtm.subscription")),
        (["active", "paused"], None),
    ] {
        let rows = client.query(states, &[]).await.expect("states");
        assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<&str>>(), expected);
        if let Some(next) = next {
            client.execute(next, &[]).await.expect(next);
        }
    }
}
