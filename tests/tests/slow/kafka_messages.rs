// SPDX-License-Identifier: PostgreSQL
//! Steps of messages that are records of a real Apache Kafka.

use std::collections::{BTreeMap, BTreeSet};

use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{Isolation, Log, Record};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::asking::{number, wait};
use crate::kafka::{configured, shop};

const TOPIC: &str = "transfers";

/// Two steps: one with a key and headers, one with neither.
fn steps(n: i32) -> String {
    format!(
        r#"[{{"action": "kafka://main/{TOPIC}", "payload": {{"n": {n}}}, "key": "k{n}", "headers": {{"x-tenant": "7"}}}},
            {{"action": "kafka://main/{TOPIC}", "payload": {n}}}]"#
    )
}

async fn send(client: &Client, n: i32) {
    let sql = format!("SELECT dtm.msg_send('{}', 'g{n}', '{{\"retry_interval\": 0.1}}')", steps(n));
    client.batch_execute(&sql).await.expect("msg_send");
}

async fn wait_for_all(client: &Client) {
    wait(client, "SELECT count(*) FROM dtm.transactions WHERE status <> 'succeed'", |open| open == 0).await;
}

fn of_branch<'a>(records: &'a [Record], gid: &str, branch_id: &str) -> Vec<&'a Record> {
    let is_it = |record: &&Record| {
        record.header("dtm-gid") == Some(gid) && record.header("dtm-branch_id") == Some(branch_id)
    };
    records.iter().filter(is_it).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_a_record_with_its_key_its_headers_and_the_names_of_the_call() {
    let broker = Broker::start().await;
    broker.create_topic(TOPIC, 3, &[]).await;
    let (cluster, client) = shop().await;
    let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    send(&client, 1).await;
    client
        .batch_execute(&format!("BEGIN; SELECT dtm.msg_send('{}', 'back'); ROLLBACK", steps(2)))
        .await
        .expect("SQL");
    wait_for_all(&client).await;
    let records = Log::of(&broker.bootstrap(), &[TOPIC], Isolation::Committed).read().await;
    assert_eq!(records.len(), 2, "what was rolled back is not sent");
    let (first, second) = (of_branch(&records, "g1", "01")[0], of_branch(&records, "g1", "02")[0]);
    assert_eq!((first.key_text(), first.value.as_deref()), ("k1", Some(&br#"{"n": 1}"#[..])));
    assert_eq!((first.header("x-tenant"), first.header("dtm-op")), (Some("7"), Some("action")));
    assert_eq!((second.key_text(), second.value.as_deref()), ("g1", Some(&b"1"[..])));
    assert_eq!((second.header("x-tenant"), second.header("dtm-trans_type")), (None, Some("msg")));
    assert_ne!(first.id(), second.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_step_is_in_kafka_in_order_and_repeated_under_the_same_id_only_whoever_is_killed() {
    let mut broker = Broker::start().await;
    broker.create_topic(TOPIC, 1, &[]).await;
    let (cluster, client) = shop().await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    for round in 0..4 {
        for n in 0..50 {
            send(&client, round * 50 + n).await;
        }
        if round % 2 == 0 {
            relay.kill9();
            relay.restart();
        } else {
            broker.kill9().await;
            broker.start_again().await;
        }
    }
    wait_for_all(&client).await;
    assert_eq!(number(&client, "SELECT count(*) FROM dtm.transactions").await, 200);
    let records = Log::of(&broker.bootstrap(), &[TOPIC], Isolation::Committed).read().await;
    let mut ids: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
    for record in &records {
        let name = |header| record.header(header).expect("a name");
        ids.entry(record.id()).or_default().insert((name("dtm-gid"), name("dtm-branch_id")));
    }
    assert_eq!(ids.len(), 400);
    assert!(ids.values().all(|of_id| of_id.len() == 1), "one id for two steps");
    for n in 0..200 {
        let gid = format!("g{n}");
        let (first, second) = (of_branch(&records, &gid, "01"), of_branch(&records, &gid, "02"));
        assert!(first[0].offset < second[0].offset, "the second step of {gid} came before the first");
    }
    println!("{} records of 400 are repeated", records.len() - 400);
}
