// SPDX-License-Identifier: PostgreSQL
//! pg_upgrade keeps the transaction counter, and with it the era: delivery goes on where it stood.

use std::path::Path;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir, older_bin_dirs, temporary_folder};
use dtm_tests::process::server_command;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(30);

async fn publish(client: &Client, first: i32, last: i32) {
    for n in first..=last {
        let sql = "SELECT dtm.publish('t', to_jsonb($1::int), key => 'k' || $1 % 3)";
        client.execute(sql, &[&n]).await.expect("publish");
    }
}

/// What pg_upgrade has logged beside its output.
fn logs(data: &Path) -> String {
    let mut folders = vec![data.join("pg_upgrade_output.d")];
    let mut text = String::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => folders.push(entry.path()),
                false => text += &std::fs::read_to_string(entry.path()).unwrap_or_default(),
            }
        }
    }
    let last = text.char_indices().rev().nth(4_000).map_or(0, |(at, _)| at);
    text.split_off(last)
}

async fn upgraded(old_bin: &Path) {
    let folder = temporary_folder();
    let (old_folder, new_folder) = (folder.path().join("old"), folder.path().join("new"));
    let receiver = Receiver::start().await;
    let mut old = Cluster::builder().bin(old_bin).preload().at(&old_folder).start().await;
    old.create_database("shop").await;
    let client = old.connect("shop").await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&old.url("shop"));
    publish(&client, 1, 20).await;
    receiver.wait_for(20).await;
    assert!(relay.terminate().await.success());
    publish(&client, 21, 40).await;
    // Transaction ids go on far from where a new cluster would begin.
    for _ in 0..100 {
        client.execute("SELECT pg_current_xact_id()", &[]).await.expect("an id");
    }
    drop(client);
    for database in ["shop", "postgres", "template1"] {
        // A build of version 15 marks columns with an option that no other build knows.
        let mark = "UPDATE pg_attribute SET attoptions = NULL WHERE attoptions::text LIKE '{pg_attver=%'";
        old.connect(database).await.batch_execute(mark).await.expect("unmarked columns");
    }
    old.stop().await;

    let mut new = Cluster::builder().preload().at(&new_folder).start().await;
    new.stop().await;
    let mut upgrade = server_command(bin_dir().join("pg_upgrade"));
    upgrade.current_dir(folder.path()).args(["-U", "postgres", "-b"]).arg(old_bin).arg("-B").arg(bin_dir());
    upgrade.arg("-d").arg(old.data()).arg("-D").arg(new.data()).arg("-s").arg(folder.path());
    let output = upgrade.output().expect("pg_upgrade");
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), logs(new.data()));
    drop(old);
    new.start().await;

    let client = new.connect("shop").await;
    publish(&client, 41, 50).await;
    let mut relay = Relay::start(&new.url("shop"));
    receiver.wait_until("all", DEADLINE, |received| received.len() >= 50).await;
    publish(&client, 51, 60).await;
    receiver.wait_until("all", DEADLINE, |received| received.len() >= 60).await;
    assert!(relay.terminate().await.success());
    let numbers: Vec<i32> = receiver
        .received()
        .iter()
        .map(|request| str::from_utf8(&request.body).expect("UTF-8").parse().expect("a number"))
        .collect();
    for key in 0..3 {
        let of_key = |numbers: &[i32]| numbers.iter().copied().filter(|n| n % 3 == key).collect::<Vec<_>>();
        assert_eq!(of_key(&numbers), of_key(&(1..=60).collect::<Vec<_>>()), "each once, in order");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_goes_on_where_it_stood_after_pg_upgrade_from_every_older_version() {
    for old_bin in older_bin_dirs() {
        println!("from {}", old_bin.display());
        upgraded(&old_bin).await;
    }
}
