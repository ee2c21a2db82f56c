// SPDX-License-Identifier: PostgreSQL
//! Broker, relay and PostgreSQL are killed under load, or stand still for longer than anybody waits: every event is in Kafka, each
//! key in order, and once where that was asked for. `DTM_KILLS` sets how often.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{self, Isolation, Log};
use dtm_tests::process;
use dtm_tests::relay::Relay;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::kafka::configured;
use crate::load::{self, Habits, Load};

const DEADLINE: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
const AT_LEAST_ONCE: &str = "{}";
const EXACTLY_ONCE: &str = r#"{"delivery": "exactly-once"}"#;
const SHARDS_EXACTLY_ONCE: &str = r#"{"delivery": "exactly-once", "shards": 3}"#;
/// Longer than requests and transactions may last.
const STANDSTILL: Duration = Duration::from_secs(45);

#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Broker,
    /// It is not killed: its connections stay open, and it answers late.
    HangingBroker,
    Relay,
    Server,
}

async fn killed(victim: Victim, kills_in_ci: usize, options: &str) {
    let mut broker = Broker::start().await;
    broker.create_topic(TOPIC, 3, &[]).await;
    let mut cluster = Cluster::builder().preload().config("max_prepared_transactions", "10").start().await;
    cluster.create_database("shop").await;
    {
        let client = cluster.connect("shop").await;
        load::prepare(&client).await;
        let sql = format!("SELECT dtm.subscribe('load', '>', 'kafka://main/{TOPIC}', '{options}')");
        client.execute(&sql, &[]).await.expect("subscribe");
    }
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    let habits = Habits { asynchronous_one_in: 4, prepared_one_in: 8, pause: Duration::from_millis(4) };
    let load = Load::start(&cluster, "shop", 4, habits);
    let log = Log::of(&broker.bootstrap(), &[TOPIC], Isolation::Committed);
    let mut random = StdRng::seed_from_u64(victim as u64);
    let kills = std::env::var("DTM_KILLS").map_or(kills_in_ci, |kills| kills.parse().expect("a number"));
    let mut arrived = 0;
    for kill in 0..kills {
        let more = arrived + random.random_range(20..400);
        let enough = |records: &[kafka_log::Record]| records.len() >= more;
        arrived = log.wait_until(&format!("kill {kill}"), DEADLINE, enough).await.len();
        match victim {
            Victim::Broker => {
                broker.kill9().await;
                broker.start_again().await;
            }
            Victim::HangingBroker => {
                broker.stop_reading();
                tokio::time::sleep(STANDSTILL).await;
                broker.go_on();
            }
            Victim::Relay => {
                relay.kill9();
                relay.restart();
            }
            Victim::Server => {
                cluster.kill9().await;
                cluster.start().await;
            }
        }
    }
    let more = arrived + 50;
    log.wait_until("after the last kill", DEADLINE, |records| records.len() >= more).await;
    let ledger = load.stop().await;
    let client = cluster.connect("shop").await;
    let all = process::eventually(DEADLINE, || async {
        let received = kafka_log::received(&log.read().await);
        (load::missing(&client, &received).await == 0).then_some(received)
    });
    let received = all.await.expect("everything in Kafka");
    assert!(relay.terminate().await.success());
    let (events, duplicates) = load::assert_all_arrived(&client, &ledger, &received).await;
    println!(
        "{events} events, {} rolled back, {kills} kills, {duplicates} duplicates",
        ledger.rolled_back.len()
    );
    if options != AT_LEAST_ONCE {
        assert_eq!(duplicates, 0, "a record is there twice");
        let alarms = relay.log().contains("falls back");
        assert!(!alarms, "the position in Kafka was not used");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_five_times_has_every_event_and_each_key_in_order() {
    killed(Victim::Broker, 5, AT_LEAST_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_ten_times_sends_every_event_to_kafka_and_each_key_in_order() {
    killed(Victim::Relay, 10, AT_LEAST_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_five_times_has_every_event_in_kafka_and_each_key_in_order() {
    killed(Victim::Server, 5, AT_LEAST_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_five_times_has_every_event_once_where_that_was_asked_for() {
    killed(Victim::Broker, 5, EXACTLY_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_ten_times_sends_every_event_to_kafka_once_where_that_was_asked_for() {
    killed(Victim::Relay, 10, EXACTLY_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_five_times_has_every_event_in_kafka_once_where_that_was_asked_for() {
    killed(Victim::Server, 5, EXACTLY_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_five_times_sends_every_event_once_from_each_of_several_shards() {
    killed(Victim::Relay, 5, SHARDS_EXACTLY_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_hangs_has_every_event_and_each_key_in_order() {
    killed(Victim::HangingBroker, 1, AT_LEAST_ONCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_hangs_has_every_event_once_where_that_was_asked_for() {
    killed(Victim::HangingBroker, 1, EXACTLY_ONCE).await;
}
