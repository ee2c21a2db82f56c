// SPDX-License-Identifier: PostgreSQL
//! A dump that is restored is another database: transaction ids in it mean nothing there.

use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::process;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_waits_to_be_resumed_and_then_goes_on_where_the_dump_stood() {
    let (source, target) = (Cluster::builder().start().await, Cluster::builder().start().await);
    source.create_database("shop").await;
    let client = source.connect("shop").await;
    let receiver = Receiver::start().await;
    client.execute("SELECT dtm.subscribe('s', 't', $1)", &[&receiver.url()]).await.expect("subscribe");
    let mut relay = Relay::start(&source.url("shop"));
    client.execute("SELECT dtm.publish('t', '1')", &[]).await.expect("publish");
    receiver.wait_for(1).await;
    assert!(relay.terminate().await.success());
    // Committed and not delivered when the dump is made; and one whose transaction is still open then.
    client.execute("SELECT dtm.publish('t', '2')", &[]).await.expect("publish");
    let open = source.connect("shop").await;
    open.batch_execute("BEGIN; SELECT dtm.publish('t', '99')").await.expect("publish");
    let dump = process::run(Command::new(bin_dir().join("pg_dump")).args(["-d", &source.url("shop")]));
    open.batch_execute("COMMIT").await.expect("COMMIT");

    let admin = target.connect("postgres").await;
    admin.batch_execute("CREATE DATABASE shop").await.expect("a database");
    target.psql("shop", &dump);
    let restored = target.connect("shop").await;
    restored.execute("SELECT dtm.publish('t', '3')", &[]).await.expect("publish");
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
    restored.execute("SELECT dtm.publish('t', '4')", &[]).await.expect("publish");
    receiver.wait_until("the last", Duration::from_secs(30), |received| received.len() >= 4).await;
    assert!(relay.terminate().await.success());
    let bodies: Vec<_> = receiver.received().iter().map(|request| request.body.clone()).collect();
    assert_eq!(bodies, ["1", "2", "3", "4"]);
}
