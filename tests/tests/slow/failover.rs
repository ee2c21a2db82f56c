// SPDX-License-Identifier: PostgreSQL
//! A standby is promoted, and the relay follows by a URL with both hosts. With a synchronous standby nothing is lost; with one
//! that lagged, what the new primary does not have is gone, and everything that it has is delivered.

use std::time::Duration;

use dtm_tests::cluster::{Cluster, temporary_folder};
use dtm_tests::process;
use dtm_tests::receiver::Receiver;
use dtm_tests::relay::Relay;
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::load::{self, Habits, Load};
use crate::numbered::DEADLINE;

const HABITS: Habits =
    Habits { asynchronous_one_in: 0, prepared_one_in: 10, pause: Duration::from_millis(2) };

struct Pair {
    primary: Cluster,
    standby: Cluster,
    receiver: Receiver,
    relay: Relay,
    _folder: TempDir,
}

impl Pair {
    async fn start() -> Pair {
        let builder = || Cluster::builder().preload().config("max_prepared_transactions", "10");
        let primary = builder().start().await;
        primary.create_database("shop").await;
        let client = primary.connect("shop").await;
        load::prepare(&client).await;
        let receiver = Receiver::start().await;
        let sql = "SELECT dtm.subscribe('load', 'load.*', $1, '{\"retry_base\": \"50ms\"}')";
        client.execute(sql, &[&receiver.url()]).await.expect("subscribe");
        let folder = temporary_folder();
        let standby = builder().start_standby(&primary, folder.path()).await;
        let (first, second) = (primary.port(), standby.port());
        let relay = Relay::start(&format!("postgres://postgres@127.0.0.1:{first},127.0.0.1:{second}/shop"));
        Pair { primary, standby, receiver, relay, _folder: folder }
    }

    /// The standby answers what the primary has, or had.
    async fn promote(&self) -> Client {
        let client = self.standby.connect("shop").await;
        client.execute("SELECT pg_promote()", &[]).await.expect("pg_promote");
        client
    }
}

/// Ends what the old primary had prepared, by COMMIT or ROLLBACK.
async fn end_prepared(client: &Client, how: &str) {
    for row in client.query("SELECT gid FROM pg_prepared_xacts", &[]).await.expect("prepared") {
        let gid: String = row.get(0);
        client.batch_execute(&format!("{how} PREPARED '{gid}'")).await.expect("the end of a prepared one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_a_synchronous_standby_takes_over() {
    let mut pair = Pair::start().await;
    let admin = pair.primary.connect("shop").await;
    admin.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.expect("a setting");
    admin.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    let is_synchronous = process::eventually(DEADLINE, || async {
        let sql = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'";
        (!admin.query(sql, &[]).await.ok()?.is_empty()).then_some(())
    });
    is_synchronous.await.expect("a synchronous standby");
    let load = Load::start(&pair.primary, "shop", 4, HABITS);
    pair.receiver.wait_for(1_000).await;
    pair.primary.kill9().await;
    let client = pair.promote().await;
    // The setting came along, and there is no standby any more.
    client.batch_execute("ALTER SYSTEM RESET synchronous_standby_names").await.expect("a setting");
    client.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    end_prepared(&client, "COMMIT").await;
    let first = load.abandon().await;
    let load = Load::start(&pair.standby, "shop", 4, HABITS);
    let more = pair.receiver.count() + 500;
    pair.receiver.wait_for(more).await;
    let mut ledger = load.stop().await;
    ledger.merge(first);
    load::wait_for_all(&client, &pair.receiver, DEADLINE).await;
    assert!(pair.relay.terminate().await.success());
    let (events, duplicates) = load::assert_all_arrived(&client, &ledger, &pair.receiver.received()).await;
    println!("{events} events, {duplicates} duplicates");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_a_standby_has_which_lagged_is_delivered_after_it_took_over() {
    let mut pair = Pair::start().await;
    let load = Load::start(&pair.primary, "shop", 4, HABITS);
    pair.receiver.wait_for(500).await;
    // From now on the standby gets nothing.
    pair.standby.stop().await;
    let more = pair.receiver.count() + 500;
    pair.receiver.wait_for(more).await;
    pair.primary.kill9().await;
    let lost = load.abandon().await;
    pair.standby.start().await;
    let client = pair.promote().await;
    end_prepared(&client, "ROLLBACK").await;
    let load = Load::start(&pair.standby, "shop", 4, HABITS);
    let more = pair.receiver.count() + 500;
    pair.receiver.wait_for(more).await;
    load.stop().await;
    load::wait_for_all(&client, &pair.receiver, DEADLINE).await;
    assert!(pair.relay.terminate().await.success());
    assert!(lost.committed_count() > 0, "the first primary did nothing");
}
