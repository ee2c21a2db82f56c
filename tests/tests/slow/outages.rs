// SPDX-License-Identifier: PostgreSQL
//! What is away comes back: endpoints, servers, relays. What is there meanwhile goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio::net::{TcpListener, TcpStream};

use crate::numbered::{DEADLINE, arrived, number, publish, subscribe, times, wait_for_all};

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

/// Seconds.
const DEFAULT_LEASE: f64 = 3.0;
/// By how many seconds a relay's own beat may be late on a loaded machine.
const LOADED: f64 = 2.0;

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
    let configured =
        |name: &str| format!("name = \"{name}\"\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
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
    // By the database's clock: how long this test had to wait for a processor does not count.
    let sql = "SELECT extract(epoch FROM max(l.taken_at) - max(h.expires_at))::float8 \
               FROM dtm.lease_log l, dtm.heartbeat_log h WHERE h.name = 'first'";
    let after_expiry: f64 = client.query_one(sql, &[]).await.expect("times").get(0);
    let silent = after_expiry + DEFAULT_LEASE;
    assert!(after_expiry > 0.0, "it was taken while it was held");
    assert!(silent < 5.0 + LOADED, "it was taken {silent} s after the owner's last sign of life");
    first.go_on();
    publish(&client, "t", 31, 60).await;
    wait_for_all(&receiver, 60).await;
    assert!(second.terminate().await.success(), "and it gives its lease up at once");
    publish(&client, "t", 61, 70).await;
    wait_for_all(&receiver, 70).await;
    assert!(first.terminate().await.success());
    assert_eq!(arrived(&receiver.received()).len(), 70);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_locked_for_longer_than_the_relay_waits_holds_up_the_cursors_alone() {
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    let receiver = Receiver::start().await;
    subscribe(&client, "s", "t", &receiver).await;
    let mut relay = Relay::start(&cluster.url("shop"));
    publish(&client, "t", 1, 10).await;
    wait_for_all(&receiver, 10).await;
    let locker = cluster.connect("shop").await;
    locker
        .batch_execute("BEGIN; LOCK TABLE dtm.cursor_log_1 IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("a lock");
    publish(&client, "t", 11, 20).await;
    relay.wait_for_log("lock timeout").await;
    publish(&client, "t", 21, 30).await;
    wait_for_all(&receiver, 30).await;
    locker.batch_execute("COMMIT").await.expect("commit");
    publish(&client, "t", 31, 40).await;
    wait_for_all(&receiver, 40).await;
    assert!(relay.terminate().await.success());
    assert!(!relay.log().contains("database away"), "it went on as if nothing had been");
    relay.restart();
    publish(&client, "t", 41, 45).await;
    wait_for_all(&receiver, 45).await;
    assert!(relay.terminate().await.success());
    assert_eq!(times(&receiver, 45), [1; 45]);
}

/// Listens on a port of its own, and leads connections to servers by turns; later to the first of them alone.
async fn by_turns(ports: [u16; 2], first_alone: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    tokio::spawn(async move {
        for turn in 0.. {
            let (mut client, _) = listener.accept().await.expect("a connection");
            let at = if first_alone.load(Ordering::SeqCst) { 0 } else { turn % 2 };
            let mut server = TcpStream::connect(("127.0.0.1", ports[at])).await.expect("a server");
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_reach_different_servers_deliver_nothing_until_they_reach_one() {
    let (first, second) = (Cluster::builder().start().await, Cluster::builder().start().await);
    let receiver = Receiver::start().await;
    for cluster in [&first, &second] {
        cluster.create_database("shop").await;
        let client = cluster.connect("shop").await;
        subscribe(&client, "s", "t", &receiver).await;
        publish(&client, "t", 1, 5).await;
    }
    let first_alone = Arc::new(AtomicBool::new(false));
    let port = by_turns([first.port(), second.port()], first_alone.clone()).await;
    let mut relay = Relay::start(&format!("postgres://postgres@127.0.0.1:{port}/shop"));
    relay.wait_for_log("reached different servers").await;
    assert_eq!(receiver.count(), 0);
    first_alone.store(true, Ordering::SeqCst);
    wait_for_all(&receiver, 5).await;
    assert!(relay.terminate().await.success());
    assert_eq!(times(&receiver, 5), [1; 5]);
}
