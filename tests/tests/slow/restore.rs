// SPDX-License-Identifier: PostgreSQL
//! A dump of a busy database, made while its log turns over, is restored: what was not delivered when it was made is delivered
//! from there, in order, and before what is published there; also where a relay runs there before the restore is complete.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::asking::{number, wait};
use crate::load::{self, Habits, Load};
use crate::numbered::{DEADLINE, publish, times, wait_for_all};
use crate::rotation::configured;

const HABITS: Habits = Habits { asynchronous_one_in: 0, prepared_one_in: 0, pause: Duration::from_millis(2) };

async fn source() -> (Cluster, Client, Receiver) {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let admin = cluster.connect("shop").await;
    let retention = "SELECT dtm.library_protocol(); ALTER DATABASE shop SET dtm.retention = '300ms'";
    admin.batch_execute(retention).await.expect("settings");
    let client = cluster.connect("shop").await;
    load::prepare(&client).await;
    let receiver = Receiver::start().await;
    // Slow enough that the dump finds something undelivered.
    let sql =
        "SELECT dtm.subscribe('load', 'load.*', $1, '{\"on_restore\": \"continue\", \"max_in_flight\": 8}')";
    client.execute(sql, &[&receiver.url()]).await.expect("subscribe");
    (cluster, client, receiver)
}

fn restore(cluster: &Cluster, database: &str, dump: &Path, is_custom: bool) {
    let (program, file) =
        if is_custom { ("pg_restore", "--exit-on-error") } else { ("psql", "-vON_ERROR_STOP=1") };
    let mut command = Command::new(bin_dir().join(program));
    command.args(["--single-transaction", file, "-d", &cluster.url(database)]);
    if !is_custom {
        command.arg("-Xqf");
    }
    process::run(command.arg(dump));
}

/// Sends what the restored database delivers elsewhere, publishes there, and holds what arrives against its aggregates.
async fn assert_goes_on(cluster: &Cluster, database: &str) {
    let (client, receiver) = (cluster.connect(database).await, Receiver::start().await);
    client
        .execute("UPDATE dtm.subscription SET destination = $1", &[&receiver.url()])
        .await
        .expect("an update");
    let dumped = client.query("SELECT name, version FROM aggregate", &[]).await.expect("aggregates");
    let next = "WITH raised AS (UPDATE aggregate SET version = version + 1 RETURNING name, version) \
                SELECT count(dtm.publish('load.event', to_jsonb(version), key => name)) FROM raised";
    // Before any relay has met it, and after.
    client.execute(next, &[]).await.expect("publish");
    let mut relay = Relay::start_configured(&configured(cluster, database));
    relay.wait_for_log("delivering").await;
    client.execute(next, &[]).await.expect("publish");
    let expected: BTreeMap<String, i32> =
        dumped.iter().map(|row| (row.get(0), row.get::<_, i32>(1) + 2)).collect();
    let is_last = |received: &[Received]| {
        let versions = load::versions(received);
        expected.iter().all(|(name, last)| versions.get(name).is_some_and(|of_key| of_key.contains(last)))
    };
    receiver.wait_until("the last of each key", DEADLINE, is_last).await;
    assert!(relay.terminate().await.success());
    let mut undelivered = 0;
    for (name, of_key) in load::versions(&receiver.received()) {
        let (first, last) = (of_key[0], expected[&name]);
        assert_eq!(of_key, (first..=last).collect::<Vec<_>>(), "versions of {name}");
        undelivered += (last - 1 - first).max(0);
    }
    println!("{undelivered} events were not delivered when the dump was made");
}

async fn dumped_and_restored(is_custom: bool) {
    let (cluster, client, receiver) = source().await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop"));
    let load = Load::start(&cluster, "shop", 4, HABITS);
    receiver.wait_for(500).await;
    // The log turns over under a horizon that is held: it only grows then.
    let pinned = cluster.connect("shop").await;
    let pin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM aggregate";
    pinned.batch_execute(pin).await.expect("a snapshot");
    receiver.wait_for(1_000).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dump");
    let mut dump = Command::new(bin_dir().join("pg_dump"));
    dump.args(["-d", &cluster.url("shop"), if is_custom { "-Fc" } else { "-Fp" }, "-f"]).arg(&file);
    process::run(&mut dump);
    pinned.batch_execute("COMMIT").await.expect("COMMIT");
    let ledger = load.stop().await;
    receiver.wait_until("all", DEADLINE, |received| ledger.is_complete(received)).await;
    ledger.assert_kept(&receiver.received());
    load::assert_versions(&client, &receiver.received()).await;
    assert!(relay.terminate().await.success());

    let other = Cluster::builder().preload().start().await;
    for (target, database) in [(&cluster, "again"), (&other, "shop")] {
        let admin = target.connect("postgres").await;
        admin.batch_execute(&format!("CREATE DATABASE {database}")).await.expect("a database");
        restore(target, database, &file, is_custom);
        assert_goes_on(target, database).await;
    }
    // What was restored is dumped and restored once more.
    let twice = folder.path().join("twice");
    let mut dump = Command::new(bin_dir().join("pg_dump"));
    process::run(dump.args(["-d", &other.url("shop"), "-Fc", "-f"]).arg(&twice));
    other.connect("postgres").await.batch_execute("CREATE DATABASE third").await.expect("a database");
    restore(&other, "third", &twice, true);
    assert_goes_on(&other, "third").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_dump_of_a_busy_database_goes_on_where_it_was_made() {
    dumped_and_restored(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_dump_of_a_busy_database_goes_on_where_it_was_made() {
    dumped_and_restored(true).await;
}

/// Restores a part of a dump, as pg_restore lists it.
fn restore_entry(cluster: &Cluster, database: &str, dump: &Path, entry: &str) {
    let list = dump.with_extension("list");
    std::fs::write(&list, format!("{entry}\n")).expect("a list");
    let mut restore = Command::new(bin_dir().join("pg_restore"));
    process::run(restore.args(["--exit-on-error", "-d", &cluster.url(database), "-L"]).arg(&list).arg(dump));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_runs_during_a_restore_delivers_what_the_dump_had_not_delivered_and_nothing_twice() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let (client, receiver) = (cluster.connect("shop").await, Receiver::start().await);
    let sql = "SELECT dtm.subscribe('s', 't', $1, '{\"on_restore\": \"continue\"}')";
    client.execute(sql, &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start_configured(&configured(&cluster, "shop"));
    publish(&client, "t", 1, 20).await;
    wait_for_all(&receiver, 20).await;
    assert!(relay.terminate().await.success());
    publish(&client, "t", 21, 40).await;
    let delayed =
        "SELECT dtm.publish('t', '41', key => 'k1', deliver_at => clock_timestamp() + interval '1 h')";
    client.execute(delayed, &[]).await.expect("publish");
    client.execute("UPDATE dtm.delayed SET due = clock_timestamp()", &[]).await.expect("it is due");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dump");
    let mut dump = Command::new(bin_dir().join("pg_dump"));
    process::run(dump.args(["-Fc", "-d", &cluster.url("shop"), "-f"]).arg(&file));
    let list = process::run(Command::new(bin_dir().join("pg_restore")).arg("-l").arg(&file));
    let of = |what: &str| -> Vec<&str> { list.lines().filter(|line| line.contains(what)).collect() };

    cluster.connect("postgres").await.batch_execute("CREATE DATABASE again").await.expect("a database");
    restore_entry(&cluster, "again", &file, of(" EXTENSION ")[0]);
    let settings = "ALTER DATABASE again SET dtm.retention = '300ms'";
    cluster.connect("again").await.batch_execute(settings).await.expect("settings");
    let again = cluster.connect("again").await;
    let mut relay = Relay::start_configured(&format!("lease = \"1s\"\n{}", configured(&cluster, "again")));
    relay.wait_for_log("connected to").await;
    // Subscriptions come first, and what they need long after.
    let heartbeats = "SELECT coalesce(max(id), 0) FROM dtm.heartbeat_log";
    for entry in of(" TABLE DATA dtm ").into_iter().rev().chain(of(" SEQUENCE SET dtm ")) {
        restore_entry(&cluster, "again", &file, entry);
        let before = number(&again, heartbeats).await;
        wait(&again, heartbeats, |now| now > before + 1).await;
    }
    wait_for_all(&receiver, 41).await;
    publish(&again, "t", 42, 50).await;
    wait_for_all(&receiver, 50).await;
    assert!(relay.terminate().await.success());
    assert_eq!(times(&receiver, 50), [1; 50]);
}
