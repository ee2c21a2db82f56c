// SPDX-License-Identifier: PostgreSQL
//! SIGTERM: what is in flight is waited for, what was delivered is stored, and the exit code says whether it was.

use std::time::{Duration, Instant};

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::asking;
use crate::numbered::{DEADLINE, arrived, number, publish, subscribe, times, wait_for_all};

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
async fn sigterm_while_one_event_is_refused_exits_with_0_and_repeats_only_what_lies_past_it() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let refused = 8;
    let receiver =
        Receiver::start_with(move |r| Reply::status(if number(r) == refused { 500 } else { 200 })).await;
    subscribe(&client, "s", "t", &receiver).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    publish(&client, "t", 1, 20).await;
    // All but the refused one and those behind it in its key.
    let passes = |n: i32| n < refused || n % 5 != refused % 5;
    let expected = (1..=20).filter(|&n| passes(n)).count();
    receiver.wait_until("what can pass", DEADLINE, |received| arrived(received).len() == expected).await;
    assert!(relay.terminate().await.success());
    receiver.behave(|_| Reply::status(200));
    relay.restart();
    receiver.wait_until("all", DEADLINE, |received| arrived(received).len() == 20).await;
    assert!(relay.terminate().await.success());
    for (n, times) in (1..).zip(times(&receiver, 20)) {
        let allowed = if n > refused && passes(n) { 2 } else { 1 };
        assert!((1..=allowed).contains(&times), "{n} came {times} times");
    }
}

async fn locked(cluster: &Cluster) -> Client {
    let locker = cluster.connect("shop").await;
    locker
        .batch_execute("BEGIN; LOCK TABLE dtm.cursor_log_1 IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("a lock");
    locker
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_while_the_database_is_away_ends_at_once_and_with_1_if_something_is_not_stored() {
    let mut cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let receiver = Receiver::start().await;
    let mut relay = Relay::start(&cluster.url("shop"));
    {
        let client = cluster.connect("shop").await;
        subscribe(&client, "s", "t", &receiver).await;
        publish(&client, "t", 1, 5).await;
        wait_for_all(&receiver, 5).await;
        asking::wait(&client, "SELECT lag_events FROM dtm.subscriptions", |lag| lag == 0).await;
    }
    cluster.stop().await;
    relay.wait_for_log("database away").await;
    assert_eq!(relay.terminate().await.code(), Some(0), "everything is stored");

    cluster.start().await;
    relay.restart();
    let client = cluster.connect("shop").await;
    publish(&client, "t", 6, 6).await;
    wait_for_all(&receiver, 6).await;
    let _locker = locked(&cluster).await;
    publish(&client, "t", 7, 10).await;
    wait_for_all(&receiver, 10).await;
    let told = relay.log().matches("database away").count();
    cluster.stop().await;
    let away = || relay.log().matches("database away").count() > told;
    assert!(process::holds_within(DEADLINE, away).await, "{}", relay.log());
    assert_eq!(relay.terminate().await.code(), Some(1), "7 to 10 are not");

    cluster.start().await;
    relay.restart();
    receiver
        .wait_until("them again", DEADLINE, |received| {
            received.iter().filter(|request| number(request) > 6).count() == 8
        })
        .await;
    assert!(relay.terminate().await.success());
    assert_eq!(times(&receiver, 10)[6..], [2; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_does_not_wait_for_a_database_that_stores_nothing_and_exits_with_1() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    subscribe(&client, "s", "t", &receiver).await;
    let toml = format!("shutdown = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    publish(&client, "t", 1, 1).await;
    wait_for_all(&receiver, 1).await;
    let _locker = locked(&cluster).await;
    publish(&client, "t", 2, 5).await;
    wait_for_all(&receiver, 5).await;
    let asked_at = Instant::now();
    assert_eq!(relay.terminate().await.code(), Some(1));
    assert!(asked_at.elapsed() < Duration::from_secs(15), "it took {:?}", asked_at.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_at_work_on_one_subscription_holds_up_no_other_and_no_other_relay() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let is_refused = |r: &Received| r.target.ends_with("bad") && number(r) == 7;
    let receiver = Receiver::start_with(move |r| Reply::status(if is_refused(r) { 413 } else { 200 })).await;
    for name in ["good", "bad"] {
        let sql = "SELECT dtm.subscribe($1, 't', $2)";
        let url = format!("{}/{name}", receiver.url());
        client.execute(sql, &[&name, &url]).await.expect("subscribe");
    }
    let toml = format!("shutdown = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    let user = cluster.connect("shop").await;
    let work = "BEGIN; SELECT dtm.discard('bad', everything => true)";
    user.batch_execute(work).await.expect("a user at work");
    publish(&client, "t", 1, 20).await;
    let stored = async || {
        asking::wait(&client, "SELECT lag_events FROM dtm.subscriptions WHERE name = 'good'", |lag| lag == 0)
            .await;
    };
    stored().await;
    let stopping = Instant::now();
    let code = relay.terminate().await.code();
    assert!(stopping.elapsed() < DEADLINE, "it waited for the user");
    let owned = "SELECT count(*) FROM dtm.owners WHERE alive";
    assert_eq!(asking::number(&client, owned).await, 0, "leases are given up");
    assert_eq!(code, Some(1), "what the user holds up is not stored");
    relay.restart();
    publish(&client, "t", 21, 30).await;
    stored().await;
    user.batch_execute("COMMIT").await.expect("COMMIT");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_transaction_that_is_left_open_holds_up_is_bounded_and_told_of() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let delay = Duration::from_millis(50);
    let receiver =
        Receiver::start_with(move |r| Reply::slow(if number(r) % 50 == 10 { 422 } else { 200 }, delay)).await;
    subscribe(&client, "s", "t", &receiver).await;
    let toml = format!("subscription_events = 100\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
    let mut relay = Relay::start_configured(&toml);
    let user = cluster.connect("shop").await;
    let work = "BEGIN; SELECT dtm.discard('s', everything => true)";
    user.batch_execute(work).await.expect("a user at work");
    let many = "SELECT dtm.publish('t', to_jsonb(n)) FROM generate_series(1, 4000) n";
    client.execute(many, &[]).await.expect("publish");
    relay.wait_for_log("its cursor waits for a transaction").await;
    // What was sent in the first second, 32 at once, and what it may hold.
    let sent = receiver.count();
    assert!(sent <= 1_500, "{sent} events are delivered that a crash would repeat");
    user.batch_execute("COMMIT").await.expect("COMMIT");
    let expected = 4_000 - 4_000 / 50;
    receiver.wait_until("all", DEADLINE, |received| arrived(received).len() == expected).await;
    assert!(relay.terminate().await.success());
}
