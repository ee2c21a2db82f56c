// SPDX-License-Identifier: PostgreSQL
//! Exactly once into Kafka: what is refused, redriven, taken over or begun anew.

use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{Isolation, Log, Record};
use dtm_tests::kafka_topics::unique_topic;
use dtm_tests::relay::Relay;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use tokio_postgres::Client;

use crate::asking::wait;
use crate::kafka::{assert_in_order, configured, publish, shop, subscribe, values};
use crate::numbered::DEADLINE;

const ONCE: &str = r#"{"delivery": "exactly-once"}"#;

async fn publish_large(client: &Client, key: &str, bytes: i32) {
    // Random, so that it is as large when it is compressed.
    let sql = "SELECT dtm.publish_bytes('t', (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, $1::int / 32))::bytea, \
               content_type => 'text/plain', key => $2)";
    client.execute(sql, &[&bytes, &key]).await.expect("publish");
}

/// The last record of each key is kept, however long ago it was written.
async fn assert_compacted(bootstrap: &str, topic: &str) {
    let mut config = ClientConfig::new();
    let admin: AdminClient<_> = config.set("bootstrap.servers", bootstrap).create().expect("a client");
    let described = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &AdminOptions::new()).await;
    let topic = described.expect("an answer").pop().expect("one topic").expect("its settings");
    let policy = topic.get("cleanup.policy").expect("a policy").value.clone();
    assert_eq!(policy.as_deref(), Some("compact"));
}

/// Those whose value is a number.
fn numbered(records: &[Record]) -> Vec<Record> {
    records.iter().filter(|record| record.key_text() != "large").cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_dies_its_neighbours_are_there_once_and_once_redriven_so_is_it() {
    let broker = Broker::start().await;
    let (cluster, client) = shop().await;
    broker.create_topic("small", 3, &[("max.message.bytes", "20000")]).await;
    subscribe(&client, "s", "t", "kafka://main/small", ONCE).await;
    publish(&client, "t", 1, 300, 5).await;
    publish_large(&client, "large", 60_000).await;
    publish(&client, "t", 301, 600, 5).await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    let log = Log::of(&broker.bootstrap(), &["small"], Isolation::Committed);
    let records = log.wait_for(600).await;
    assert_in_order(&records, 600, 5);
    wait(&client, "SELECT count(*) FROM dtm.dead_letters WHERE key = 'large'", |count| count == 1).await;
    broker.alter_topic("small", &[("max.message.bytes", "200000")]).await;
    client.execute("SELECT dtm.redrive('s', everything => true)", &[]).await.expect("redrive");
    log.wait_for(601).await;
    publish(&client, "t", 601, 700, 5).await;
    wait(&client, "SELECT count(*) FROM dtm.retries", |count| count == 0).await;
    let records = log.wait_for(701).await;
    assert!(relay.terminate().await.success());
    relay.restart();
    publish(&client, "t", 701, 800, 5).await;
    log.wait_for(801).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    let all = log.read().await;
    assert_eq!((records.len(), all.len()), (701, 801), "nothing is there twice");
    assert_in_order(&numbered(&all), 800, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_relay_takes_over_in_the_middle_of_a_window_and_repeats_nothing() {
    let broker = Broker::start().await;
    let (cluster, client) = shop().await;
    broker.create_topic("orders", 3, &[]).await;
    subscribe(&client, "s", "t", "kafka://main/orders", ONCE).await;
    for first in 0..20 {
        publish(&client, "t", first * 5_000 + 1, first * 5_000 + 5_000, 500).await;
    }
    let toml = configured(&cluster, "shop", &broker.bootstrap(), "");
    let mut first = Relay::start_configured(&toml);
    let log = Log::of(&broker.bootstrap(), &["orders"], Isolation::Committed);
    log.wait_until("some", DEADLINE, |records| !records.is_empty()).await;
    first.pause();
    let mut second = Relay::start_configured(&toml);
    log.wait_for(100_000).await;
    first.go_on();
    publish(&client, "t", 100_001, 100_500, 500).await;
    log.wait_for(100_500).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    let records = log.read().await;
    assert_eq!(records.len(), 100_500, "nothing is there twice");
    let mut sorted = values(&records);
    sorted.sort_unstable();
    assert!(sorted.iter().copied().eq(1..=100_500), "everything is there");
    assert!(second.terminate().await.success());
    first.kill9();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewind_repeats_what_it_says_and_a_lost_position_falls_back_to_the_cursor_with_an_alarm() {
    let broker = Broker::start().await;
    let (cluster, client) = shop().await;
    let topic = unique_topic("orders");
    broker.create_topic(&topic, 1, &[]).await;
    subscribe(&client, "s", "t", &format!("kafka://main/{topic}"), ONCE).await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    let log = Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed);
    // Windows one after the other.
    for last in [100, 200, 300] {
        publish(&client, "t", last - 99, last, 5).await;
        log.wait_for(last as usize).await;
    }
    assert_compacted(&broker.bootstrap(), "dtm_positions").await;
    client.execute("SELECT dtm.rewind('s', 'earliest')", &[]).await.expect("rewind");
    let records = log.wait_for(600).await;
    assert_in_order(&records, 300, 5);
    for last in [400, 500] {
        publish(&client, "t", last - 99, last, 5).await;
        log.wait_for(last as usize + 300).await;
    }
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    assert!(relay.terminate().await.success());
    assert_eq!(log.read().await.len(), 800, "a rewind repeats once");
    broker.delete_topic("dtm_positions").await;
    relay.restart();
    relay.wait_for_log("it falls back to PostgreSQL's cursor").await;
    publish(&client, "t", 501, 600, 5).await;
    log.wait_for(900).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    assert_in_order(&log.read().await, 600, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_to_kafka_before_a_synchronous_standby_knows_its_window() {
    let broker = Broker::for_topics().await;
    let (cluster, client) = shop().await;
    let topics = [unique_topic("once"), unique_topic("atleast")];
    for (topic, options) in std::iter::zip(&topics, [ONCE, "{}"]) {
        broker.create_topic(topic, 1, &[]).await;
        subscribe(&client, topic, "t", &format!("kafka://main/{topic}"), options).await;
    }
    let admin = cluster.connect("postgres").await;
    let reload = "SELECT pg_reload_conf()";
    // There is none: whoever waits for it waits.
    let standby = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'";
    for sql in ["SET synchronous_commit = local", standby, reload] {
        admin.batch_execute(sql).await.expect(sql);
    }
    client.batch_execute("SET synchronous_commit = local").await.expect("SET");
    wait(&client, "SELECT count(*) FROM pg_settings WHERE setting = 'nobody'", |settings| settings == 1)
        .await;
    let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    publish(&client, "t", 1, 10, 5).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    wait(&admin, waiting, |sessions| sessions > 0).await;
    Log::of(&broker.bootstrap(), &[&topics[1]], Isolation::Committed).wait_for(10).await;
    let log = Log::of(&broker.bootstrap(), &[&topics[0]], Isolation::Committed);
    assert!(log.read().await.is_empty(), "PostgreSQL may forget the window");
    for sql in ["ALTER SYSTEM RESET synchronous_standby_names", reload] {
        admin.batch_execute(sql).await.expect(sql);
    }
    assert_in_order(&log.wait_for(10).await, 10, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_parked_before_a_subscription_became_exactly_once_is_there_once_and_in_order() {
    let broker = Broker::for_topics().await;
    let (cluster, client) = shop().await;
    let topic = unique_topic("switched");
    broker.create_topic(&topic, 1, &[("max.message.bytes", "20000")]).await;
    let destination = format!("kafka://main/{topic}");
    subscribe(&client, "s", "t", &destination, r#"{"on_dead": "block"}"#).await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    // Behind it its key waits.
    publish_large(&client, "k1", 60_000).await;
    publish(&client, "t", 1, 100, 5).await;
    let log = Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed);
    log.wait_for(80).await;
    wait(&client, "SELECT count(*) FROM dtm.retries", |parked| parked == 20).await;
    subscribe(&client, "s", "t", &destination, ONCE).await;
    publish(&client, "t", 101, 200, 5).await;
    log.wait_for(200).await;
    wait(&client, "SELECT count(*) FROM dtm.retries", |parked| parked == 0).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    assert!(relay.terminate().await.success());
    let records = log.read().await;
    assert_eq!(records.len(), 200, "nothing is there twice");
    assert_in_order(&records, 200, 5);
}
