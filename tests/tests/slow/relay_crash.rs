// SPDX-License-Identifier: PostgreSQL
//! The relay is killed again and again under load.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use dtm_core::page::Page;
use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

use crate::load::{self, Habits, Load};

const KILLS: usize = 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// The ids of the log's events that lie beyond a subscription's stored cursor.
async fn beyond_the_cursor(client: &Client, subscription: &str) -> HashSet<String> {
    let sql = "SELECT c.\"position\", c.target, c.acked, dtm.relay_poll(NULL) \
               FROM dtm.subscription s, dtm.relay_cursor(s.id, 0, s.epoch) c WHERE s.name = $1";
    let row = client.query_one(sql, &[&subscription]).await.expect("a cursor");
    let (position, target, acked, head): (String, Option<String>, i64, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    match target {
        Some(target) => {
            let mut ids = window(client, &position, &target, acked).await;
            ids.extend(window(client, &target, &head, 0).await);
            ids
        }
        None => window(client, &position, &head, 0).await,
    }
}

async fn window(client: &Client, from: &str, to: &str, mut after: i64) -> HashSet<String> {
    let sql = "SELECT dtm.relay_page($1, $2, $3, ARRAY['>'], NULL, 1000, 10000000)";
    let mut ids = HashSet::new();
    loop {
        let row = client.query_one(sql, &[&from, &to, &after]).await.expect("a page");
        let page = Page::decode(Bytes::from(row.get::<_, Vec<u8>>(0))).expect("a page");
        ids.extend(page.events.iter().map(|event| event.id.to_string()));
        after = page.scanned;
        if page.done {
            return ids;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_twenty_times_loses_nothing_and_repeats_only_what_it_sent_beyond_its_cursor() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    load::prepare(&client).await;
    // Some answers take their time, so that a kill finds requests on their way.
    let mut endpoint = StdRng::seed_from_u64(1);
    let receiver = Receiver::start_with(move |_| {
        Reply::slow(200, Duration::from_millis(if endpoint.random_range(0..10) == 0 { 20 } else { 0 }))
    })
    .await;
    let subscribe = "SELECT dtm.subscribe('load', '>', $1, '{\"timeout\": 2, \"retry_base\": \"50ms\"}')";
    client.execute(subscribe, &[&receiver.url()]).await.expect("subscribe");
    let toml = format!("lease = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    let load = Load::start(
        &cluster,
        "shop",
        4,
        Habits { asynchronous_one_in: 4, prepared_one_in: 0, pause: Duration::from_millis(2) },
    );

    let mut random = StdRng::seed_from_u64(2);
    let mut may_repeat: HashMap<String, usize> = HashMap::new();
    for kill in 0..KILLS {
        let more = receiver.count() + random.random_range(20..400);
        receiver.wait_until(&format!("kill {kill}"), DEADLINE, |received| received.len() >= more).await;
        relay.kill9();
        for id in beyond_the_cursor(&client, "load").await {
            *may_repeat.entry(id).or_default() += 1;
        }
        relay.restart();
    }
    let ledger = load.stop().await;
    let complete = process::eventually(DEADLINE, || async {
        (load::missing(&client, &receiver.received()).await == 0).then_some(())
    });
    assert!(complete.await.is_some(), "{} are missing", load::missing(&client, &receiver.received()).await);
    assert!(relay.terminate().await.success());

    let received = receiver.received();
    let (events, duplicates) = load::assert_all_arrived(&client, &ledger, &received).await;
    println!(
        "{events} events, {} rolled back, {KILLS} kills, {duplicates} duplicates",
        ledger.rolled_back.len()
    );
    for (id, times) in load::arrivals(&received) {
        let allowed = 1 + may_repeat.get(id).copied().unwrap_or(0);
        assert!(
            times <= allowed,
            "{id} came {times} times, and was beyond the cursor at {} kills",
            allowed - 1
        );
    }
    assert!(duplicates > 0, "no kill found anything on its way: the test shows nothing");
}
