// SPDX-License-Identifier: PostgreSQL
//! A PostgreSQL and a Kafka for benchmarks, with a relay from one to the other.

use tokio_postgres::Client;
use uuid::Uuid;

use super::kafka_topic::PARTITIONS;
use super::load;
use crate::cluster::Cluster;
use crate::kafka::Broker;
use crate::relay::Relay;

/// A backlog is published in so many transactions.
const BATCHES: usize = 10;

/// What a subscription asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The default.
    AtLeastOnce,
    /// By transactions.
    ExactlyOnce,
}

/// Both servers.
pub struct Site {
    /// PostgreSQL.
    pub cluster: Cluster,
    /// Kafka.
    pub broker: Broker,
}

impl Site {
    /// Starts them.
    pub async fn open() -> Site {
        let cluster = load::cluster(true).await;
        // There is room on the disk for the topics of a few runs, and not for those of all.
        let broker = Broker::builder().at_full_speed().config("log.segment.delete.delay.ms", "1000");
        Site { cluster, broker: broker.start().await }
    }

    /// Makes a topic.
    pub async fn make_topic(&self, topic: &str) {
        self.broker.create_topic(topic, PARTITIONS, &[]).await;
    }

    /// Starts a relay for a database.
    pub fn relay(&self, database: &str) -> Relay {
        let (url, broker) = (self.cluster.url(database), self.broker.bootstrap());
        Relay::start_configured(&format!(
            "[database.{database}]\nurl = \"{url}\"\n[kafka.main]\nbootstrap.servers = \"{broker}\"\n"
        ))
    }
}

/// Subscribes a topic of Kafka to everything, by the topic's name.
pub async fn subscribe(client: &Client, topic: &str, delivery: Delivery, from: &str) {
    let options = match delivery {
        Delivery::AtLeastOnce => "{}",
        Delivery::ExactlyOnce => r#"{"delivery": "exactly-once"}"#,
    };
    let sql = format!("SELECT dtm.subscribe($1, '>', $2, '{options}', $3)");
    client.execute(&sql, &[&topic, &format!("kafka://main/{topic}"), &from]).await.expect("subscribe");
}

/// Ends the subscription again.
pub async fn unsubscribe(client: &Client, topic: &str) {
    client.execute("SELECT dtm.unsubscribe($1)", &[&topic]).await.expect("unsubscribe");
}

/// Publishes a backlog of orders of about 200 bytes, which are as different from each other as orders are. Answers its ids,
/// sorted.
pub async fn publish_backlog(client: &Client, events: usize) -> Vec<Uuid> {
    let sql = "SELECT count(dtm.publish('orders.created', jsonb_build_object(
                   'order', n, 'customer', 'customer-' || n % 10000, 'reference', md5(n::text),
                   'items', '[{\"sku\": \"4711-0815\", \"quantity\": 2}]'::jsonb, 'note', 'leave it at the door'),
                   key => 'customer-' || n % 10000))
               FROM generate_series($1::int, $2::int) n";
    for batch in 0..BATCHES {
        let (first, last) = (batch * events / BATCHES + 1, (batch + 1) * events / BATCHES);
        client.execute(sql, &[&(first as i32), &(last as i32)]).await.expect("publish");
    }
    // What remains to be done when a row is first read is not to be done by whoever is measured first.
    client.batch_execute("VACUUM ANALYZE").await.expect("VACUUM");
    let rows = client.query("SELECT id FROM dtm.log ORDER BY id", &[]).await.expect("the log");
    assert_eq!(rows.len(), events);
    rows.iter().map(|row| row.get(0)).collect()
}
