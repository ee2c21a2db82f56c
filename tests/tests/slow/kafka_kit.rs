// SPDX-License-Identifier: PostgreSQL
//! The kit's own Kafka: what the tests of delivery rest on when they read topics, kill brokers and come with passwords.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{Isolation, Log, Record, received};
use dtm_tests::kafka_tls::{PASSWORD, USER};
use dtm_tests::kafka_topics::{Operation, unique_topic};
use dtm_tests::ledger::Ledger;
use dtm_tests::process;
use rdkafka::client::ClientContext;
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Message};

const DEADLINE: Duration = Duration::from_secs(60);

/// Partition, offset and body.
type Place = (i32, i64, Vec<u8>);

/// Takes note of what the broker has acknowledged, and of what it has refused.
#[derive(Clone, Default)]
struct Answers {
    acknowledged: Arc<Mutex<Vec<Place>>>,
    refused: Arc<Mutex<Vec<KafkaError>>>,
}

impl ClientContext for Answers {
    fn error(&self, error: KafkaError, _reason: &str) {
        self.refused.lock().expect("errors").push(error);
    }
}

impl ProducerContext for Answers {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        match result {
            Ok(message) => {
                let body = message.payload().expect("a body").to_vec();
                let place = (message.partition(), message.offset(), body);
                self.acknowledged.lock().expect("acknowledged").push(place);
            }
            Err((error, _)) => self.refused.lock().expect("errors").push(error.clone()),
        }
    }
}

fn producer(bootstrap: &str, more: &[(&str, &str)]) -> (BaseProducer<Answers>, Answers) {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap).set("enable.idempotence", "true");
    config.set("message.timeout.ms", "0").set("reconnect.backoff.max.ms", "200");
    for (name, value) in more {
        config.set(*name, *value);
    }
    let answers = Answers::default();
    (config.create_with_context(answers.clone()).expect("a producer"), answers)
}

fn send(producer: &BaseProducer<Answers>, topic: &str, number: usize) {
    let (key, body, id) = (format!("key-{}", number % 7), number.to_string(), format!("id-{number}"));
    let headers = OwnedHeaders::new()
        .insert(Header { key: "ce_id", value: Some(&id) })
        .insert(Header { key: "again", value: Some("1") })
        .insert(Header { key: "again", value: Some("2") })
        .insert(Header::<&str> { key: "none", value: None });
    let record = BaseRecord::to(topic).key(&key).payload(&body).headers(headers);
    producer.send(record).map_err(|(error, _)| error).expect("a place in the queue");
}

fn numbers(records: &[Record], partition: i32) -> Vec<usize> {
    let number = |record: &Record| {
        let value = record.value.as_deref().expect("a body");
        std::str::from_utf8(value).expect("text").parse().expect("a number")
    };
    records.iter().filter(|record| record.partition == partition).map(number).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_read_back_whole_with_keys_and_headers_in_the_order_of_their_partition() {
    let broker = Broker::for_topics().await;
    let (topic, empty) = (unique_topic("orders"), unique_topic("empty"));
    broker.create_topic(&topic, 3, &[("retention.ms", "-1")]).await;
    broker.create_topic(&empty, 2, &[]).await;
    let (producer, answers) = producer(&broker.bootstrap(), &[]);
    (0..1_000).for_each(|number| send(&producer, &topic, number));
    producer.flush(DEADLINE).expect("all acknowledged");
    assert_eq!(answers.acknowledged.lock().expect("acknowledged").len(), 1_000);

    let log = Log::of(&broker.bootstrap(), &[&topic, &empty, &unique_topic("missing")], Isolation::Committed);
    let records = log.wait_for(1_000).await;
    assert_eq!(records.len(), 1_000);
    let mut all: Vec<usize> = Vec::new();
    for partition in 0..3 {
        let found = numbers(&records, partition);
        assert!(found.is_sorted());
        all.extend(found);
    }
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 1_000);
    let header =
        |name: &str, value: Option<&str>| (name.to_owned(), value.map(|value| value.as_bytes().to_vec()));
    let mut ledger = Ledger::default();
    for (record, number) in records.iter().zip(all) {
        assert_eq!(record.key_text(), format!("key-{}", number % 7));
        let id = format!("id-{number}");
        let expected = [
            header("ce_id", Some(&id)),
            header("again", Some("1")),
            header("again", Some("2")),
            header("none", None),
        ];
        assert_eq!(record.headers, expected);
        assert!(record.timestamp_ms.is_some());
        ledger.commit(record.key_text(), [id]);
    }
    let verdict = ledger.assert_kept(&received(&records));
    assert_eq!((verdict.delivered, verdict.duplicates), (1_000, 0));
    ledger.commit("key-0", ["never sent".to_owned()]);
    assert_eq!(ledger.verdict(&received(&records)).lost, ["never sent"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_acknowledged_records_are_there_after_a_broker_was_killed_and_started_again() {
    let mut broker = Broker::start().await;
    broker.create_topic("orders", 2, &[]).await;
    let (producer, answers) = producer(&broker.bootstrap(), &[("linger.ms", "0")]);
    let acknowledged = || answers.acknowledged.lock().expect("acknowledged").len();
    (0..5_000).for_each(|number| send(&producer, "orders", number));
    let some = || {
        producer.poll(Duration::ZERO);
        acknowledged() > 100
    };
    assert!(process::holds_within(DEADLINE, some).await);
    broker.kill9().await;
    (5_000..6_000).for_each(|number| send(&producer, "orders", number));
    broker.start_again().await;
    producer.flush(DEADLINE).expect("all acknowledged");
    assert_eq!(acknowledged(), 6_000);

    let log = Log::of(&broker.bootstrap(), &["orders"], Isolation::Committed);
    let records = log.read().await;
    let place = |r: &Record| (r.partition, r.offset, r.value.clone().expect("a body"));
    let found: HashSet<_> = records.iter().map(place).collect();
    assert!(answers.acknowledged.lock().expect("acknowledged").iter().all(|place| found.contains(place)));
    (0..2).for_each(|partition| assert!(numbers(&records, partition).is_sorted()));
    assert_eq!(records.len(), 6_000, "an idempotent producer's records are there once");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_a_password_or_a_certificate_opens_and_a_wrong_password_does_not() {
    let broker = Broker::builder().tls().start().await;
    broker.create_topic("orders", 1, &[]).await;
    let (sasl, ssl) = (broker.sasl_bootstrap(), broker.ssl_bootstrap());
    let ca = broker.ca_file().display().to_string();
    let (certificate, key) = broker.client_certificate();
    let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
    let with_password = |mechanism, password| {
        let login = [("sasl.mechanism", mechanism), ("sasl.username", USER), ("sasl.password", password)];
        [&[("security.protocol", "SASL_SSL"), ("ssl.ca.location", &ca)], &login[..]].concat()
    };
    let with_certificate = [
        ("security.protocol", "SSL"),
        ("ssl.ca.location", &ca),
        ("ssl.certificate.location", &certificate),
        ("ssl.key.location", &key),
    ];
    let opens = [
        (&sasl, with_password("SCRAM-SHA-256", PASSWORD)),
        (&sasl, with_password("SCRAM-SHA-512", PASSWORD)),
        (&sasl, with_password("PLAIN", PASSWORD)),
        (&ssl, with_certificate.to_vec()),
    ];
    for (number, (bootstrap, login)) in opens.into_iter().enumerate() {
        let (producer, answers) = producer(bootstrap, &login);
        send(&producer, "orders", number);
        producer.flush(DEADLINE).expect("acknowledged");
        assert_eq!(answers.acknowledged.lock().expect("acknowledged").len(), 1);
    }
    for (bootstrap, login, expected) in [
        (&sasl, with_password("SCRAM-SHA-256", "black-rabbit"), RDKafkaErrorCode::Authentication),
        (&sasl, with_password("PLAIN", "black-rabbit"), RDKafkaErrorCode::Authentication),
        // Without a certificate: the broker closes the connection and does not say why.
        (&ssl, with_certificate[..2].to_vec(), RDKafkaErrorCode::AllBrokersDown),
    ] {
        let (producer, answers) = producer(bootstrap, &login);
        send(&producer, "orders", 99);
        let refused = || {
            producer.poll(Duration::ZERO);
            answers.refused.lock().expect("errors").contains(&KafkaError::Global(expected))
        };
        assert!(process::holds_within(DEADLINE, refused).await, "{:?}", answers.refused);
    }
    let records = Log::of(&broker.bootstrap(), &["orders"], Isolation::Everything).read().await;
    assert_eq!(numbers(&records, 0), [0, 1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_topic_takes_no_records_until_it_is_allowed_again_and_others_do() {
    let broker = Broker::builder().authorizer().start().await;
    broker.create_topic("orders", 1, &[]).await;
    broker.create_topic("users", 1, &[]).await;
    broker.deny("orders", Operation::Write).await;
    // Without idempotence, since a refused record would be the end of such a producer.
    let (denied, answers) = producer(&broker.bootstrap(), &[("enable.idempotence", "false")]);
    send(&denied, "orders", 1);
    send(&denied, "users", 2);
    denied.flush(DEADLINE).expect("all answered");
    let refused = KafkaError::MessageProduction(RDKafkaErrorCode::TopicAuthorizationFailed);
    assert_eq!(*answers.refused.lock().expect("errors"), [refused]);
    broker.allow("orders", Operation::Write).await;
    // Another one: the first remembers that it was denied.
    let (allowed, _) = producer(&broker.bootstrap(), &[]);
    send(&allowed, "orders", 3);
    allowed.flush(DEADLINE).expect("all answered");
    let records = Log::of(&broker.bootstrap(), &["orders", "users"], Isolation::Committed).read().await;
    assert_eq!(numbers(&records, 0), [3, 2]);
}
