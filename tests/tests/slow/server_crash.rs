// SPDX-License-Identifier: PostgreSQL
//! PostgreSQL is killed again and again, with transactions of all kinds under way, and the relay survives. `DTM_KILLS` sets how
//! often.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::load::{self, Habits, Load};

const KILLS_IN_CI: usize = 6;
const DEADLINE: Duration = Duration::from_secs(60);

async fn survives(preload: bool, habits: Habits, refused_one_in: usize, seed: u64) {
    let mut builder = Cluster::builder()
        // Nobody but those who need it writes the WAL out: what is asynchronous is really lost in a crash.
        .config("wal_writer_delay", "10s")
        .config("max_prepared_transactions", "10")
        .config("checkpoint_timeout", "30s");
    if preload {
        builder = builder.preload();
    }
    let mut cluster = builder.start().await;
    cluster.create_database("shop").await;
    let mut requests = 0;
    let behaviour = move |_: &Received| {
        requests += 1;
        Reply::status(if refused_one_in > 0 && requests % refused_one_in == 0 { 500 } else { 200 })
    };
    let receiver = Receiver::start_with(behaviour).await;
    {
        let client = cluster.connect("shop").await;
        load::prepare(&client).await;
        let subscribe = "SELECT dtm.subscribe('load', '>', $1, '{\"timeout\": 2, \"retry_base\": \"50ms\"}')";
        client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    }
    let mut relay = Relay::start(&cluster.url("shop"));
    let load = Load::start(&cluster, "shop", 6, habits);
    let mut random = StdRng::seed_from_u64(seed);
    let kills = std::env::var("DTM_KILLS").map_or(KILLS_IN_CI, |kills| kills.parse().expect("a number"));
    for kill in 0..kills {
        let more = receiver.count() + random.random_range(20..600);
        receiver.wait_until(&format!("kill {kill}"), DEADLINE, |received| received.len() >= more).await;
        cluster.kill9().await;
        cluster.start().await;
    }
    let more = receiver.count() + 50;
    receiver.wait_until("after the last kill", DEADLINE, |received| received.len() >= more).await;
    let survivors = load.survivors();
    let ledger = load.stop().await;
    assert!(survivors > 0, "no crash met a prepared transaction");
    let client = cluster.connect("shop").await;
    load::wait_for_all(&client, &receiver, DEADLINE).await;
    assert!(relay.terminate().await.success());
    let (events, duplicates) = load::assert_all_arrived(&client, &ledger, &receiver.received()).await;
    let unknown = ledger.unknown.iter().flatten().count();
    println!(
        "{events} events, {} rolled back, {unknown} asynchronous or in doubt, {kills} kills, \
         {survivors} prepared before one and committed after it, {duplicates} duplicates",
        ledger.rolled_back.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_with_rolled_back_prepared_and_asynchronous_publishes_loses_nothing_and_invents_nothing()
 {
    survives(
        true,
        Habits { asynchronous_one_in: 2, prepared_one_in: 4, pause: Duration::from_millis(2) },
        20,
        1,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_where_every_commit_is_asynchronous_or_prepared_delivers_nothing_that_it_lost() {
    survives(
        false,
        Habits { asynchronous_one_in: 1, prepared_one_in: 4, pause: Duration::from_millis(5) },
        0,
        2,
    )
    .await;
}
