// SPDX-License-Identifier: PostgreSQL
//! What is away comes back: endpoints, servers, relays. What is there meanwhile goes on.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(40);
const EAGER: &str = r#"{"timeout": 2, "retry_base": "50ms", "retry_cap": "500ms"}"#;

async fn subscribe(client: &Client, name: &str, topic: &str, receiver: &Receiver) {
    let sql = format!("SELECT dtm.subscribe($1, $2, $3, '{EAGER}')");
    client.execute(&sql, &[&name, &topic, &receiver.url()]).await.expect("subscribe");
}

/// Publishes payloads `first` to `last`, each in a transaction of its own, under keys by the remainder of 5.
async fn publish(client: &Client, topic: &str, first: i32, last: i32) {
    for n in first..=last {
        let key = format!("k{}", n % 5);
        let sql = "SELECT dtm.publish($1, to_jsonb($2::int), key => $3)";
        client.execute(sql, &[&topic, &n, &key]).await.expect("publish");
    }
}

fn number(received: &Received) -> i32 {
    str::from_utf8(&received.body).expect("UTF-8").parse().expect("a number")
}

/// Numbers that were accepted, each at its first arrival.
fn arrived(received: &[Received]) -> Vec<i32> {
    let mut numbers = Vec::new();
    for n in received.iter().filter(|request| request.accepted).map(number) {
        if !numbers.contains(&n) {
            numbers.push(n);
        }
    }
    numbers
}

async fn wait_for_all(receiver: &Receiver, last: i32) {
    let what = format!("1 to {last}");
    receiver.wait_until(&what, DEADLINE, |received| arrived(received).len() >= last as usize).await;
    let numbers = arrived(&receiver.received());
    for key in 0..5 {
        let of_key: Vec<i32> = numbers.iter().copied().filter(|n| n % 5 == key).collect();
        assert!(of_key.is_sorted(), "order of key k{key}: {of_key:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_waits_for_what_is_in_flight_exits_with_0_and_nothing_is_sent_twice() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start_with(|_| Reply::slow(200, Duration::from_millis(300))).await;
    subscribe(&client, "s", "t", &receiver).await;
    let many = "SELECT dtm.publish('t', to_jsonb(n)) FROM generate_series(1, 200) n";
    client.execute(many, &[]).await.expect("publish");
    let mut relay = Relay::start(&cluster.url("shop"));
    receiver.wait_for(40).await;
    assert!(relay.terminate().await.success());
    let sent = receiver.count();
    assert!(sent < 200, "it was not stopped in the middle");
    relay.restart();
    receiver.wait_until("all", DEADLINE, |received| arrived(received).len() == 200).await;
    assert!(relay.terminate().await.success());
    assert_eq!(receiver.count(), 200, "something was sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_gives_up_an_endpoint_that_never_answers_and_exits_with_0() {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start_with(|_| Reply::Hang).await;
    let sql = "SELECT dtm.subscribe('s', 't', $1, '{\"timeout\": \"10min\"}')";
    client.execute(sql, &[&receiver.url()]).await.expect("subscribe");
    let toml = format!("shutdown = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    publish(&client, "t", 1, 1).await;
    receiver.wait_for(1).await;
    assert!(relay.terminate().await.success());
    receiver.behave(|_| Reply::status(200));
    relay.restart();
    wait_for_all(&receiver, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_away_or_misbehaves_gets_everything_in_order_and_holds_up_no_other() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let (mut bad, good) = (Receiver::start().await, Receiver::start().await);
    subscribe(&client, "bad", "t", &bad).await;
    subscribe(&client, "good", "t", &good).await;
    let _relay = Relay::start(&cluster.url("shop"));
    publish(&client, "t", 1, 20).await;
    wait_for_all(&bad, 20).await;
    bad.stop();
    publish(&client, "t", 21, 40).await;
    wait_for_all(&good, 40).await;
    bad.restart().await;
    wait_for_all(&bad, 40).await;
    let mut turn = 0;
    bad.behave(move |_| {
        turn += 1;
        match turn % 6 {
            0 => Reply::status(200),
            1 => Reply::status(500),
            2 => Reply::Reset,
            3 => Reply::Garbage,
            4 => Reply::Status(302, vec![("location", "http://127.0.0.1:9/".to_owned())], Duration::ZERO),
            _ => Reply::status(429),
        }
    });
    publish(&client, "t", 41, 60).await;
    wait_for_all(&good, 60).await;
    wait_for_all(&bad, 60).await;
    bad.behave(|_| Reply::Hang);
    publish(&client, "t", 61, 62).await;
    bad.wait_until("a request that hangs", DEADLINE, |received| received.iter().any(|r| number(r) == 62))
        .await;
    bad.behave(|_| Reply::status(200));
    wait_for_all(&bad, 62).await;
}

/// Ticks of processor time that a process has used.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_waits_for_its_database_without_a_busy_loop_however_long_it_is_away() {
    let mut cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let receiver = Receiver::start().await;
    {
        let client = cluster.connect("shop").await;
        subscribe(&client, "s", "t", &receiver).await;
        publish(&client, "t", 1, 5).await;
    }
    cluster.stop().await;
    // It also starts before its database does.
    let mut relay = Relay::start(&cluster.url("shop"));
    relay.wait_for_log("database away").await;
    cluster.start().await;
    wait_for_all(&receiver, 5).await;
    cluster.stop().await;
    let before = ticks(relay.pid());
    tokio::time::sleep(Duration::from_secs(4)).await;
    let used = ticks(relay.pid()) - before;
    assert!(used < 100, "{used} of 400 ticks were used waiting");
    cluster.start().await;
    publish(&cluster.connect("shop").await, "t", 6, 20).await;
    wait_for_all(&receiver, 20).await;
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_database_being_away_does_not_touch_another() {
    let (mut first, second) = (Cluster::builder().start().await, Cluster::builder().preload().start().await);
    let (at_first, at_second) = (Receiver::start().await, Receiver::start().await);
    for (cluster, receiver) in [(&first, &at_first), (&second, &at_second)] {
        cluster.create_database("shop").await;
        subscribe(&cluster.connect("shop").await, "s", "t", receiver).await;
    }
    let toml = format!(
        "[database.first]\nurl = \"{}\"\n[database.second]\nurl = \"{}\"\n",
        first.url("shop"),
        second.url("shop")
    );
    let mut relay = Relay::start_configured(&toml);
    publish(&first.connect("shop").await, "t", 1, 5).await;
    wait_for_all(&at_first, 5).await;
    first.stop().await;
    relay.wait_for_log("database away").await;
    publish(&second.connect("shop").await, "t", 1, 50).await;
    wait_for_all(&at_second, 50).await;
    first.start().await;
    publish(&first.connect("shop").await, "t", 6, 10).await;
    wait_for_all(&at_first, 10).await;
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_takes_over_from_one_that_stands_still_and_is_not_disturbed_when_that_wakes_up() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    subscribe(&client, "s", "t", &receiver).await;
    let configured = |name: &str| {
        format!("name = \"{name}\"\nlease = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"))
    };
    let mut first = Relay::start_configured(&configured("first"));
    publish(&client, "t", 1, 10).await;
    wait_for_all(&receiver, 10).await;
    let mut second = Relay::start_configured(&configured("second"));
    second.wait_for_log("connected to").await;
    first.pause();
    publish(&client, "t", 11, 30).await;
    wait_for_all(&receiver, 30).await;
    let owner: String =
        client.query_one("SELECT owner FROM dtm.subscriptions", &[]).await.expect("owner").get(0);
    assert_eq!(owner, "second");
    first.go_on();
    publish(&client, "t", 31, 60).await;
    wait_for_all(&receiver, 60).await;
    assert!(second.terminate().await.success(), "and it gives its lease up at once");
    publish(&client, "t", 61, 70).await;
    wait_for_all(&receiver, 70).await;
    assert!(first.terminate().await.success());
    assert_eq!(arrived(&receiver.received()).len(), 70);
}
