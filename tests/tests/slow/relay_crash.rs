// SPDX-License-Identifier: PostgreSQL
//! The relay is killed again and again under load.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use dtm_core::page::Page;
use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
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

/// The ids of what is parked: it may have been delivered without that being stored.
async fn parked(client: &Client) -> HashSet<String> {
    let rows = client.query("SELECT id::text FROM dtm.retries", &[]).await.expect("dtm.retries");
    rows.iter().map(|row| row.get(0)).collect()
}

/// A relay is killed again and again while writers publish and an endpoint does what it is told.
async fn killed_under(
    behaviour: impl FnMut(&Received) -> Reply + Send + 'static,
    pause: Duration,
    poison: bool,
) {
    let cluster = Cluster::builder().preload().config("max_prepared_transactions", "10").start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    load::prepare(&client).await;
    let receiver = Receiver::start_with(behaviour).await;
    let options = r#"{"timeout": "500ms", "retry_base": "50ms", "retry_cap": "1s", "retry_attempts": 100}"#;
    let subscribe = format!("SELECT dtm.subscribe('load', '>', $1, '{options}')");
    client.execute(&subscribe, &[&receiver.url()]).await.expect("subscribe");
    let toml = format!("lease = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    let habits = Habits { asynchronous_one_in: 4, prepared_one_in: 0, pause };
    let load = Load::start(&cluster, "shop", 4, habits);

    let mut random = StdRng::seed_from_u64(2);
    let mut may_repeat: HashMap<String, usize> = HashMap::new();
    for kill in 0..KILLS {
        let more = receiver.count() + random.random_range(20..if poison { 150 } else { 400 });
        if poison {
            let sql = "SELECT dtm.publish('poison', '0', key => 'poison-' || $1 % 3)";
            client.execute(sql, &[&(kill as i32)]).await.expect("publish");
        }
        receiver.wait_until(&format!("kill {kill}"), DEADLINE, |received| received.len() >= more).await;
        relay.kill9();
        let beyond = beyond_the_cursor(&client, "load").await;
        for id in beyond.union(&parked(&client).await) {
            *may_repeat.entry(id.clone()).or_default() += 1;
        }
        relay.restart();
    }
    let ledger = load.stop().await;
    load::wait_for_all(&client, &receiver, DEADLINE).await;
    if poison {
        assert_poison_is_parked(&client).await;
    }
    assert!(relay.terminate().await.success());

    let received = receiver.received();
    let (events, duplicates) = load::assert_all_arrived(&client, &ledger, &of_the_load(&received)).await;
    println!(
        "{events} events, {} rolled back, {KILLS} kills, {duplicates} duplicates",
        ledger.rolled_back.len()
    );
    for (id, times) in load::arrivals(&received) {
        let allowed = 1 + may_repeat.get(id).copied().unwrap_or(0);
        assert!(
            times <= allowed,
            "{id} came {times} times, and was beyond the cursor or parked at {} kills",
            allowed - 1
        );
    }
    assert!(duplicates > 0, "no kill found anything on its way: the test shows nothing");
}

fn of_the_load(received: &[Received]) -> Vec<Received> {
    received.iter().filter(|request| request.header("ce-type") == "load.event").cloned().collect()
}

/// Each poisoned event waits in dtm.retries: with its reason, or behind another of its key. The endpoint works, so that in the
/// end nothing else does.
async fn assert_poison_is_parked(client: &Client) {
    let settled = process::eventually(DEADLINE, || async {
        let sql = "SELECT count(*) FILTER (WHERE topic = 'poison'), count(*) FILTER (WHERE topic <> 'poison'), \
                   count(*) FILTER (WHERE NOT waits_behind AND last_status = 500 AND attempts > 0) FROM dtm.retries";
        let row = client.query_one(sql, &[]).await.expect("dtm.retries");
        let found: (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        (found == (KILLS as i64, 0, 3)).then_some(())
    });
    if settled.await.is_none() {
        let sql = "SELECT string_agg(format('%s %s %s %s', topic, key, attempts, last_error), E'\n') FROM dtm.retries";
        let found: Option<String> = client.query_one(sql, &[]).await.expect("dtm.retries").get(0);
        panic!("not {KILLS} poisoned events of 3 keys are parked:\n{}", found.unwrap_or_default());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_twenty_times_loses_nothing_and_repeats_only_what_it_sent_beyond_its_cursor() {
    // Some answers take their time, so that a kill finds requests on their way.
    let mut random = StdRng::seed_from_u64(1);
    let slow = move |_: &Received| {
        Reply::slow(200, Duration::from_millis(if random.random_range(0..10) == 0 { 20 } else { 0 }))
    };
    killed_under(slow, Duration::from_millis(2), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_twenty_times_with_an_endpoint_that_misbehaves_in_every_way_it_loses_nothing_and_parks_what_is_poisoned()
 {
    let mut random = StdRng::seed_from_u64(3);
    let misbehaves = move |request: &Received| {
        if request.header("ce-type") == "poison" {
            return Reply::status(500);
        }
        match random.random_range(0..1_000) {
            0..30 => Reply::status(500),
            30..33 => Reply::Hang,
            33..45 => Reply::Reset,
            45..50 => Reply::Garbage,
            50..55 => Reply::Dribble(200, Duration::from_millis(5)),
            55..60 => Reply::Endless(200),
            60..65 => {
                Reply::Status(302, vec![("location", "http://127.0.0.1:9/".to_owned())], Duration::ZERO)
            }
            65..67 => Reply::Status(429, vec![("retry-after", "0".to_owned())], Duration::ZERO),
            67..69 => Reply::status(503),
            100..200 => Reply::slow(200, Duration::from_millis(20)),
            _ => Reply::status(200),
        }
    };
    // What fails takes its time, and its key with it: the writers do not run away.
    killed_under(misbehaves, Duration::from_millis(25), true).await;
}
