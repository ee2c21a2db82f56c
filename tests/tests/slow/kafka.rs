// SPDX-License-Identifier: PostgreSQL
//! Events become records of a real Apache Kafka: their form, and what is done about a broker, a topic or a record that is
//! not as it should be.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use dtm_tests::cluster::Cluster;
use dtm_tests::kafka::Broker;
use dtm_tests::kafka_log::{Isolation, Log, Record};
use dtm_tests::kafka_tls::{PASSWORD, USER};
use dtm_tests::kafka_topics::{Operation, unique_topic};
use dtm_tests::process;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::{self, Relay};
use tokio_postgres::Client;

use crate::asking::{number, wait};
use crate::numbered::DEADLINE;

/// A configuration with a database and a cluster.
pub fn configured(cluster: &Cluster, database: &str, broker: &str, more: &str) -> String {
    let url = cluster.url(database);
    format!(
        "lease = 1\n[database.{database}]\nurl = \"{url}\"\n[kafka.main]\nbootstrap.servers = \"{broker}\"\n{more}\n"
    )
}

/// A database with the extension.
pub async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

/// Subscribes a destination.
pub async fn subscribe(client: &Client, name: &str, topics: &str, destination: &str, options: &str) {
    let sql = format!("SELECT dtm.subscribe('{name}', '{topics}', $1, '{options}')");
    client.execute(&sql, &[&destination]).await.expect("subscribe");
}

/// Numbers 1, 2, 3 … under so many keys, all in one transaction.
pub async fn publish(client: &Client, topic: &str, first: i32, last: i32, keys: i32) {
    let sql = "SELECT count(dtm.publish($1, to_jsonb(n), key => 'k' || n % $4)) FROM generate_series($2::int, $3) n";
    client.execute(sql, &[&topic, &first, &last, &keys]).await.expect("publish");
}

/// The numbers that records carry.
pub fn values(records: &[Record]) -> Vec<i32> {
    let text = |record: &Record| String::from_utf8(record.value.clone().unwrap_or_default()).expect("text");
    records.iter().map(|record| text(record).parse().expect("a number")).collect()
}

/// Each key's numbers, at their first arrival, are in order and all there.
pub fn assert_in_order(records: &[Record], last: i32, keys: i32) {
    let all = values(records);
    for key in 0..keys {
        let mut of_key: Vec<i32> = Vec::new();
        for n in all.iter().copied().filter(|n| n % keys == key) {
            if !of_key.contains(&n) {
                of_key.push(n);
            }
        }
        let expected: Vec<i32> = (1..=last).filter(|n| n % keys == key).collect();
        assert_eq!(of_key, expected, "key k{key}");
    }
}

/// The partition that Kafka's Java client gives a key: murmur2 without its sign.
fn partition_by_java(hash: i32, partitions: i32) -> i32 {
    (hash & 0x7fff_ffff) % partitions
}

#[tokio::test(flavor = "multi_thread")]
async fn events_become_records_in_each_format_with_key_headers_time_and_the_java_clients_partition() {
    let broker = Broker::for_topics().await;
    let (cluster, client) = shop().await;
    let [plain, cloud] = ["plain", "cloud"].map(unique_topic);
    for topic in [&plain, &cloud] {
        broker.create_topic(topic, 7, &[]).await;
    }
    let routed = format!("outbox.event.{}", unique_topic("order"));
    broker.create_topic(&routed, 1, &[]).await;
    let event_topic = routed.strip_prefix("outbox.event.").expect("a prefix");
    let headers = r#"{"headers": {"x-tenant": "7"}}"#;
    subscribe(&client, "plain", event_topic, &format!("kafka://main/{plain}"), headers).await;
    subscribe(&client, "cloud", event_topic, &format!("kafka://main/{cloud}"), r#"{"format": "structured"}"#)
        .await;
    let router = "kafka://main/outbox.event.{topic}";
    subscribe(&client, "router", event_topic, router, r#"{"format": "debezium"}"#).await;
    let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    // Keys and hashes of Kafka's own test of its partitioner.
    let hashes = [("21", -973_932_308), ("foobar", -790_332_482), ("abc", 479_470_107)];
    for (key, _) in hashes {
        let sql = "SELECT dtm.publish($1, '{\"n\": 1.50}', key => $2, headers => '{\"ce-subject\": \"Zürich\", \"x-own\": \"1\"}')";
        client.execute(sql, &[&event_topic, &key]).await.expect("publish");
    }
    let sql = "SELECT dtm.publish($1, NULL::jsonb, key => 'gone')";
    client.execute(sql, &[&event_topic]).await.expect("publish a tombstone");
    let sql =
        "SELECT id::text, (extract(epoch FROM published_at) * 1000)::bigint FROM dtm.events ORDER BY seq";
    let stored = client.query(sql, &[]).await.expect("the log");

    let records = Log::of(&broker.bootstrap(), &[&plain], Isolation::Committed).wait_for(4).await;
    for (n, (key, hash)) in hashes.iter().enumerate() {
        let record = records.iter().find(|record| record.key_text() == *key).expect("a record");
        assert_eq!(record.partition, partition_by_java(*hash, 7), "{key}");
        assert_eq!(record.value.as_deref(), Some(&b"{\"n\": 1.50}"[..]));
        let milliseconds: i64 = stored[n].get(1);
        assert!((record.timestamp_ms.expect("a time") - milliseconds).abs() <= 1);
        for (name, value) in [
            ("ce_id", stored[n].get::<_, &str>(0)),
            ("ce_type", event_topic),
            ("ce_specversion", "1.0"),
            ("ce_subject", "Zürich"),
            ("ce_partitionkey", key),
            ("content-type", "application/json"),
            ("x-tenant", "7"),
            ("x-own", "1"),
        ] {
            assert_eq!(record.header(name), Some(value), "{name} of {key}");
        }
    }
    let tombstone = records.iter().find(|record| record.key_text() == "gone").expect("a tombstone");
    assert_eq!(tombstone.value, None);

    let records = Log::of(&broker.bootstrap(), &[&cloud], Isolation::Committed).wait_for(4).await;
    let record = records.iter().find(|record| record.key_text() == "21").expect("a record");
    assert_eq!(record.header("content-type"), Some("application/cloudevents+json"));
    let envelope: serde_json::Value =
        serde_json::from_slice(record.value.as_deref().expect("a value")).expect("JSON");
    assert_eq!(envelope["id"], stored[0].get::<_, &str>(0));
    assert_eq!((&envelope["data"]["n"], &envelope["subject"]), (&1.5.into(), &"Zürich".into()));

    let records = Log::of(&broker.bootstrap(), &[&routed], Isolation::Committed).wait_for(4).await;
    assert_eq!(records.iter().map(Record::key_text).collect::<Vec<_>>(), ["21", "foobar", "abc", "gone"]);
    let names: Vec<&str> = records[3].headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["id"]);
    assert_eq!((records[3].header("id"), &records[3].value), (Some(stored[3].get(0)), &None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_too_large_dies_and_its_innocent_neighbours_arrive_in_order() {
    let broker = Broker::for_topics().await;
    for (compression, size) in [("none", 30_000), ("lz4", 60_000)] {
        let (cluster, client) = shop().await;
        let topic = unique_topic("small");
        broker.create_topic(&topic, 1, &[("max.message.bytes", "20000")]).await;
        subscribe(&client, "s", "t", &format!("kafka://main/{topic}"), "{}").await;
        publish(&client, "t", 1, 300, 5).await;
        // Random, so that it is as large when it is compressed.
        let large = "SELECT dtm.publish_bytes('t', (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, $1::int / 32))::bytea, \
                     content_type => 'text/plain', key => 'k1')";
        client.execute(large, &[&size]).await.expect("publish");
        publish(&client, "t", 301, 600, 5).await;
        let more = format!("compression.type = \"{compression}\"");
        let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), &more));
        let records = Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed).wait_for(600).await;
        assert_in_order(&records, 600, 5);
        wait(&client, "SELECT count(*) FROM dtm.dead_letters WHERE key = 'k1'", |count| count == 1).await;
        let sql = "SELECT last_error FROM dtm.dead_letters";
        let error: String = client.query_one(sql, &[]).await.expect("a dead letter").get(0);
        assert!(error.contains(&topic), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_no_queue_has_room_for_is_told_of_and_blocks_its_key_alone_where_that_was_asked_for() {
    let broker = Broker::for_topics().await;
    for once in [false, true] {
        let (cluster, client) = shop().await;
        let topic = unique_topic("queue");
        broker.create_topic(&topic, 1, &[]).await;
        let options = if once { r#"{"delivery": "exactly-once"}"# } else { r#"{"on_dead": "block"}"# };
        subscribe(&client, "s", "t", &format!("kafka://main/{topic}"), options).await;
        publish(&client, "t", 1, 100, 5).await;
        let large = "SELECT dtm.publish('t', to_jsonb(repeat('x', 300000)), key => 'k1')";
        client.execute(large, &[]).await.expect("publish");
        publish(&client, "t", 101, 200, 5).await;
        let more = "queue.buffering.max.kbytes = 200";
        let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), more));
        let log = Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed);
        wait(&client, "SELECT count(*) FROM dtm.dead_letters", |count| count == 1).await;
        let sql = "SELECT last_error FROM dtm.dead_letters";
        let error: String = client.query_one(sql, &[]).await.expect("a dead letter").get(0);
        assert!(error.contains("queue.buffering.max.kbytes"), "{error}");
        let is_blocked = |n: &i32| !once && n % 5 == 1 && *n > 100;
        let expected: Vec<i32> = (1..=200).filter(|n| !is_blocked(n)).collect();
        let mut found = values(&log.wait_for(expected.len()).await);
        found.sort_unstable();
        assert_eq!(found, expected, "exactly once: {once}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_the_broker_refuses_dies_and_those_of_its_batch_and_of_other_subscriptions_arrive_in_order()
 {
    let broker = Broker::for_topics().await;
    let (cluster, client) = shop().await;
    let [compacted, other] = ["compacted", "other"].map(unique_topic);
    // Of a compacted topic the broker takes only records with a key.
    broker.create_topic(&compacted, 1, &[("cleanup.policy", "compact")]).await;
    broker.create_topic(&other, 3, &[]).await;
    subscribe(&client, "compacted", ">", &format!("kafka://main/{compacted}"), "{}").await;
    subscribe(&client, "other", "t", &format!("kafka://main/{other}"), "{}").await;
    for (first, last) in [(1, 200), (201, 400)] {
        publish(&client, "t", first, last, 5).await;
        client.execute("SELECT dtm.publish('bad', '0')", &[]).await.expect("publish");
    }
    publish(&client, "t", 401, 600, 5).await;
    let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    for topic in [&compacted, &other] {
        let log = Log::of(&broker.bootstrap(), &[topic], Isolation::Committed);
        let all = |records: &[Record]| (1..=600).all(|n| values(records).contains(&n));
        let records = log.wait_until("600 numbers", DEADLINE, all).await;
        assert_in_order(&records, 600, 5);
        assert!(records.iter().all(|record| record.header("ce_type") == Some("t")));
    }
    wait(&client, "SELECT count(*) FROM dtm.dead_letters WHERE name = 'compacted'", |count| count == 2).await;
    assert_eq!(number(&client, "SELECT count(*) FROM dtm.dead_letters").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_records_that_the_broker_refuses_die_and_all_others_arrive_in_order() {
    let broker = Broker::for_topics().await;
    for options in ["{}", r#"{"delivery": "exactly-once"}"#] {
        let (cluster, client) = shop().await;
        let topic = unique_topic("compacted");
        broker.create_topic(&topic, 1, &[("cleanup.policy", "compact")]).await;
        subscribe(&client, "s", ">", &format!("kafka://main/{topic}"), options).await;
        for first in 0..20 {
            publish(&client, "t", first * 100 + 1, first * 100 + 100, 5).await;
            client.execute("SELECT dtm.publish('bad', '0')", &[]).await.expect("publish");
        }
        let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
        let log = Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed);
        wait(&client, "SELECT lag_events + retrying FROM dtm.subscriptions", |lag| lag == 0).await;
        assert_eq!(number(&client, "SELECT count(*) FROM dtm.dead_letters").await, 20, "{options}");
        let records = log.read().await;
        assert!(records.iter().all(|record| record.header("ce_type") == Some("t")));
        assert_in_order(&records, 2_000, 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_of_one_subscription_may_take_batches_of_different_sizes() {
    let broker = Broker::for_topics().await;
    for options in ["{}", r#"{"delivery": "exactly-once"}"#] {
        let (cluster, client) = shop().await;
        let [large, small] = ["large", "small"].map(unique_topic);
        broker.create_topic(&large, 1, &[("max.message.bytes", "600000")]).await;
        broker.create_topic(&small, 1, &[("max.message.bytes", "20000")]).await;
        subscribe(&client, "s", ">", "kafka://main/{topic}", options).await;
        let sql = "SELECT count(dtm.publish(CASE n % 2 WHEN 0 THEN $1 ELSE $2 END, to_jsonb(n), key => 'k' || n % 10))
                   FROM generate_series(1, 20000) n";
        client.execute(sql, &[&large, &small]).await.expect("publish");
        let _relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
        let log = Log::of(&broker.bootstrap(), &[&large, &small], Isolation::Committed);
        assert_in_order(&log.wait_for(20_000).await, 20_000, 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_forbidden_topic_holds_up_its_subscription_alone_says_why_and_goes_on_when_it_is_there()
{
    let broker = Broker::builder().config("auto.create.topics.enable", "false").authorizer().start().await;
    let (cluster, client) = shop().await;
    for topic in ["forbidden", "fine"] {
        broker.create_topic(topic, 1, &[]).await;
    }
    broker.deny("forbidden", Operation::Write).await;
    let options = r#"{"retry_base": "50ms", "retry_cap": "500ms"}"#;
    for name in ["missing", "forbidden", "fine"] {
        subscribe(&client, name, "t", &format!("kafka://main/{name}"), options).await;
    }
    let relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    publish(&client, "t", 1, 100, 5).await;
    let log = |topic: &str| Log::of(&broker.bootstrap(), &[topic], Isolation::Committed);
    assert_in_order(&log("fine").wait_for(100).await, 100, 5);
    relay.wait_for_log("there is no topic missing").await;
    relay.wait_for_log("topic forbidden: TopicAuthorizationFailed").await;
    assert_eq!(number(&client, "SELECT count(*) FROM dtm.retries").await, 0, "nothing is parked");
    assert_eq!(number(&client, "SELECT count(*) FROM dtm.dead_letters").await, 0);
    broker.create_topic("missing", 1, &[]).await;
    broker.allow("forbidden", Operation::Write).await;
    for topic in ["missing", "forbidden"] {
        let records = log(topic).wait_for(100).await;
        assert_in_order(&records, 100, 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_broker_is_away_the_subscription_stands_still_and_goes_on_by_itself() {
    let mut broker = Broker::start().await;
    let (cluster, client) = shop().await;
    broker.create_topic("orders", 3, &[]).await;
    subscribe(&client, "s", "t", "kafka://main/orders", "{}").await;
    let mut relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    publish(&client, "t", 1, 100, 5).await;
    Log::of(&broker.bootstrap(), &["orders"], Isolation::Committed).wait_for(100).await;
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    subscribe(&client, "large", "large", "kafka://main/large", "{}").await;
    broker.create_topic("large", 1, &[]).await;
    client.execute("SELECT dtm.publish('large', '0')", &[]).await.expect("publish");
    wait(&client, "SELECT sum(lag_events)::bigint FROM dtm.subscriptions", |lag| lag == 0).await;
    broker.stop().await;
    // More than the relay may hold.
    let large = "SELECT count(dtm.publish('large', to_jsonb(repeat(md5(n::text), 64)))) FROM generate_series(1, 200000) n";
    client.execute(large, &[]).await.expect("publish");
    publish(&client, "t", 101, 20_000, 5).await;
    relay.wait_for_log("no broker can be reached").await;
    client.execute("SELECT dtm.unsubscribe('large')", &[]).await.expect("unsubscribe");
    relay.wait_for_log("no longer delivered here").await;
    let memory = process::peak_mb(relay.pid());
    assert!(memory < 300.0, "{memory} MB of 400");
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag >= 19_900).await;
    broker.start_again().await;
    let records = Log::of(&broker.bootstrap(), &["orders"], Isolation::Committed).wait_for(20_000).await;
    assert_in_order(&records, 20_000, 5);
    assert_eq!(records.len(), 20_000, "nothing is repeated");
    wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    broker.stop().await;
    publish(&client, "t", 20_001, 20_100, 5).await;
    relay.wait_for_log("no broker can be reached").await;
    assert!(relay.terminate().await.success(), "it does not wait for a broker for ever");
    broker.start_again().await;
    relay.restart();
    let records = Log::of(&broker.bootstrap(), &["orders"], Isolation::Committed).wait_for(20_100).await;
    assert_in_order(&records, 20_100, 5);
}

/// A token that the broker takes for the user's.
fn unsigned_token() -> String {
    let now = jiff::Timestamp::now().as_second();
    let part = |json: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
    let claims = serde_json::json!({"sub": USER, "iat": now, "exp": now + 3600});
    format!("{}.{}.", part(serde_json::json!({"alg": "none"})), part(claims))
}

#[tokio::test(flavor = "multi_thread")]
async fn records_go_over_tls_with_a_password_a_token_or_a_certificate_and_check_names_what_is_wrong() {
    const TOPICS: [&str; 4] = ["scram", "token", "oidc", "mutual"];
    let broker = Broker::builder().tls().start().await;
    let (cluster, client) = shop().await;
    // An identity provider.
    let provider = Receiver::start_with(|request| match request.header("authorization") {
        "Basic ZHRtOndoaXRlLXJhYmJpdA==" => {
            Reply::Body(200, format!(r#"{{"access_token": "{}"}}"#, unsigned_token()))
        }
        _ => Reply::status(401),
    })
    .await;
    for topic in TOPICS {
        broker.create_topic(topic, 1, &[]).await;
        subscribe(&client, topic, "t", &format!("kafka://{topic}/{topic}"), "{}").await;
    }
    let (certificate, key) = broker.client_certificate();
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("password");
    let toml = |password: &str| {
        std::fs::write(&secret, password).expect("a secret");
        format!(
            "[database.shop]\nurl = \"{}\"\n[secret.kafka]\nfile = \"{}\"\n\
             [kafka.scram]\nbootstrap.servers = \"{}\"\nsecurity.protocol = \"SASL_SSL\"\nsasl.mechanism = \"SCRAM-SHA-256\"\n\
             sasl.username = \"{USER}\"\nsasl.password = \"secret:kafka\"\nssl.ca.location = \"{}\"\n\
             [kafka.token]\nbootstrap.servers = \"{}\"\nsecurity.protocol = \"SASL_SSL\"\nsasl.mechanism = \"OAUTHBEARER\"\n\
             sasl.oauthbearer.config = \"principal={USER}\"\nenable.sasl.oauthbearer.unsecure.jwt = true\n\
             ssl.ca.location = \"{}\"\n\
             [kafka.oidc]\nbootstrap.servers = \"{}\"\nsecurity.protocol = \"SASL_SSL\"\nsasl.mechanism = \"OAUTHBEARER\"\n\
             sasl.oauthbearer.method = \"oidc\"\nsasl.oauthbearer.token.endpoint.url = \"{}\"\n\
             sasl.oauthbearer.client.id = \"dtm\"\nsasl.oauthbearer.client.secret = \"secret:kafka\"\n\
             ssl.ca.location = \"{}\"\n\
             [kafka.mutual]\nbootstrap.servers = \"{}\"\nsecurity.protocol = \"SSL\"\nssl.ca.location = \"{}\"\n\
             ssl.certificate.location = \"{}\"\nssl.key.location = \"{}\"\n",
            cluster.url("shop"),
            secret.display(),
            broker.sasl_bootstrap(),
            broker.ca_file().display(),
            broker.sasl_bootstrap(),
            broker.ca_file().display(),
            broker.sasl_bootstrap(),
            provider.url(),
            broker.ca_file().display(),
            broker.ssl_bootstrap(),
            broker.ca_file().display(),
            certificate.display(),
            key.display(),
        )
    };
    let file = folder.path().join("relay.toml");
    let check = |password: &str| {
        std::fs::write(&file, toml(password)).expect("a configuration");
        relay::run(&["check", "--config", &file.display().to_string()])
    };
    let (ok, printed) = check("wrong-password");
    assert!(!ok && printed.contains("kafka.scram") && !printed.contains("wrong-password"), "{printed}");
    assert!(printed.contains("SASL authentication error"), "{printed}");
    let (ok, printed) = check(PASSWORD);
    assert!(ok, "{printed}");
    let relay = Relay::start_configured(&toml(PASSWORD));
    publish(&client, "t", 1, 100, 5).await;
    for topic in TOPICS {
        let records = Log::of(&broker.bootstrap(), &[topic], Isolation::Committed).wait_for(100).await;
        assert_in_order(&records, 100, 5);
    }
    assert!(!relay.log().contains(PASSWORD), "the password is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_the_configuration_lacks_is_named_and_other_subscriptions_are_delivered() {
    let broker = Broker::for_topics().await;
    let (cluster, client) = shop().await;
    let topic = unique_topic("there");
    broker.create_topic(&topic, 1, &[]).await;
    subscribe(&client, "lost", "t", "kafka://elsewhere/orders", "{}").await;
    subscribe(&client, "found", "t", &format!("kafka://main/{topic}"), "{}").await;
    let relay = Relay::start_configured(&configured(&cluster, "shop", &broker.bootstrap(), ""));
    publish(&client, "t", 1, 10, 5).await;
    Log::of(&broker.bootstrap(), &[&topic], Isolation::Committed).wait_for(10).await;
    relay.wait_for_log("has no [kafka.elsewhere]").await;
}
