// SPDX-License-Identifier: PostgreSQL
//! A sender against librdkafka's mock of a cluster, which answers with the errors that it is told.

use std::collections::BTreeMap;

use bytes::Bytes;
use figment::value::Dict;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use uuid::Uuid;

use super::*;
use crate::kafka::settings::ClusterSettings;

const TOPIC: &str = "orders";

struct Item(Event);

impl AsRef<Event> for Item {
    fn as_ref(&self) -> &Event {
        &self.0
    }
}

fn event(seq: i64) -> Item {
    Item(Event {
        seq,
        published_at_us: seq,
        id: Uuid::from_u128(seq as u128),
        topic: "t".into(),
        key: Some(format!("k{}", seq % 3).into()),
        content_type: "application/json".into(),
        headers: None,
        payload: Some(Bytes::from(seq.to_string())),
    })
}

struct Mock {
    cluster: MockCluster<'static, DefaultProducerContext>,
    sender: KafkaSender<Item>,
}

impl Mock {
    fn new() -> Self {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, 2, 1).unwrap();
        let table = Dict::from([("bootstrap.servers".to_owned(), cluster.bootstrap_servers().into())]);
        let settings = ClusterSettings::read(&table, &Secrets::new()).unwrap();
        let known = Arc::new(Cluster::new("main", settings));
        let topic = TopicTemplate::parse(TOPIC).unwrap();
        let sink = KafkaSink::new(known, topic, &Options::default(), &Secrets::new(), "/s").unwrap();
        Mock { cluster, sender: KafkaSender::new(Arc::new(sink)) }
    }

    fn fail(&self, errors: &[RDKafkaRespErr]) {
        self.cluster.request_errors(RDKafkaApiKey::Produce, errors);
    }

    /// Sends events as a pipeline does: what is withdrawn goes again, in order, when all is back. Answers how each ended, and how
    /// many were withdrawn.
    async fn deliver(&mut self, events: impl Iterator<Item = i64>) -> (BTreeMap<i64, Class>, usize) {
        let mut waiting: BTreeMap<i64, Item> = events.map(|seq| (seq, event(seq))).collect();
        let (mut ended, mut withdrawn, mut back) = (BTreeMap::new(), 0, BTreeMap::new());
        while !(waiting.is_empty() && back.is_empty() && self.sender.is_empty()) {
            if self.sender.is_empty() {
                waiting.append(&mut back);
            }
            while back.is_empty() && self.sender.has_room() {
                let Some((_, item)) = waiting.pop_first() else { break };
                self.sender.send(item);
            }
            for (item, outcome) in self.sender.answers().await {
                let seq = item.0.seq;
                if outcome.class == Class::Withdrawn {
                    withdrawn += 1;
                    back.insert(seq, item);
                } else {
                    assert!(ended.insert(seq, outcome.class).is_none(), "{seq} ended twice");
                }
            }
        }
        (ended, withdrawn)
    }
}

fn assert_accepted(ended: &BTreeMap<i64, Class>, events: i64) {
    assert!(ended.keys().copied().eq(1..=events));
    assert!(ended.values().all(|class| *class == Class::Accepted), "{ended:?}");
}

#[tokio::test]
async fn errors_that_pass_are_nobodys_fault_and_nothing_comes_back() {
    let mut mock = Mock::new();
    mock.fail(&[
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS,
    ]);
    let (ended, withdrawn) = mock.deliver(1..=500).await;
    assert_accepted(&ended, 500);
    assert_eq!(withdrawn, 0);
}

#[tokio::test]
async fn a_producer_that_fails_for_good_gives_all_back_and_another_one_delivers_it() {
    let mut mock = Mock::new();
    assert_accepted(&mock.deliver(1..=10).await.0, 10);
    // Said of a batch: with it the producer has a gap, and stops.
    mock.fail(&[RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_RECORD]);
    let (ended, withdrawn) = mock.deliver(1..=500).await;
    assert_accepted(&ended, 500);
    assert!(withdrawn > 0, "nothing has failed");
}

#[tokio::test]
async fn what_is_refused_with_its_batch_is_judged_alone() {
    let mut mock = Mock::new();
    let too_large = RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    // The batch, and then one of the records that go alone.
    mock.fail(&[too_large, too_large]);
    let (ended, withdrawn) = mock.deliver(1..=200).await;
    let refused: Vec<i64> =
        ended.iter().filter(|(_, class)| **class == Class::Unsendable).map(|(seq, _)| *seq).collect();
    assert_eq!((ended.len(), refused.len()), (200, 1), "{refused:?}");
    assert!(withdrawn > 0);
    let (ended, _) = mock.deliver(1..=200).await;
    assert_accepted(&ended, 200);
    let batches = mock.sender.route.as_ref().map(|route| route.batches);
    assert!(matches!(batches, Some(Batches::Bytes(_))), "it goes by the shared producer again");
}

#[tokio::test]
async fn a_topic_that_may_not_be_written_to_is_the_topics_fault() {
    let mut mock = Mock::new();
    mock.fail(&[RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED]);
    let (ended, _) = mock.deliver(1..=20).await;
    assert!(ended.values().any(|class| *class == Class::Unsent), "{ended:?}");
    assert!(ended.values().all(|class| matches!(class, Class::Unsent | Class::Accepted)), "{ended:?}");
}

#[tokio::test]
async fn a_sender_that_is_dropped_takes_back_what_is_not_on_its_way() {
    let mut mock = Mock::new();
    assert_accepted(&mock.deliver(1..=10).await.0, 10);
    let generation = mock.sender.route.as_ref().unwrap().generation.clone();
    mock.cluster.broker_down(1).unwrap();
    (1..=100).for_each(|seq| mock.sender.send(event(seq)));
    assert_eq!(mock.sender.len(), 100);
    drop(mock.sender);
    assert!(generation.has_failed(), "nobody sends by it any more");
}

#[tokio::test]
async fn what_waits_to_be_handed_over_does_not_go_before_what_came_back() {
    let mut mock = Mock::new();
    assert_accepted(&mock.deliver(1..=10).await.0, 10);
    let route = mock.sender.route.as_ref().unwrap();
    let (line, generation) = (route.line.clone(), route.generation.clone());
    mock.cluster.broker_down(1).unwrap();
    (1..=100).for_each(|seq| mock.sender.send(event(seq)));
    // Another one that shares the producer was in trouble.
    line.retire(&generation, Instant::now());
    mock.sender.send(event(101));
    assert!(!mock.sender.has_room(), "it waits for those before it");
    mock.cluster.broker_up(1).unwrap();
    let mut ended = BTreeMap::new();
    while !mock.sender.is_empty() {
        ended.extend(
            mock.sender.answers().await.into_iter().map(|(item, outcome)| (item.0.seq, outcome.class)),
        );
    }
    assert_eq!(ended.len(), 101);
    assert_eq!(ended.get(&101), Some(&Class::Withdrawn));
}
