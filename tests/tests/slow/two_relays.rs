// SPDX-License-Identifier: PostgreSQL
//! Any number of relays share what there is to deliver, and each of them may go, with warning or without: what it had goes on
//! with another, nothing is lost, and nobody but the newest owner moves a cursor.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::ledger::Ledger;
use dtm_tests::process;
use dtm_tests::proxy::Proxy;
use dtm_tests::receiver::{Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::load::{self, Habits, Load};
use crate::numbered::DEADLINE;

/// A delivery or two each millisecond: there is always something on its way.
const STEADY: Habits =
    Habits { asynchronous_one_in: 0, prepared_one_in: 0, pause: Duration::from_millis(10) };
const WRITERS: u64 = 2;
const OPTIONS: &str = r#"{"timeout": 2, "retry_base": "50ms", "retry_cap": "500ms", "shards": SHARDS}"#;

/// A database that writers publish in.
struct Site {
    cluster: Cluster,
    client: Client,
}

impl Site {
    async fn open() -> Site {
        let cluster = Cluster::builder().preload().start().await;
        cluster.create_database("shop").await;
        let client = cluster.connect("shop").await;
        load::prepare(&client).await;
        Site { cluster, client }
    }

    /// Subscribes a new receiver, some of whose answers take their time: requests are on their way whenever a relay goes.
    async fn receiver(&self, name: &str, shards: u32) -> Receiver {
        let mut turn = 0;
        let receiver = Receiver::start_with(move |_| {
            turn += 1;
            Reply::slow(200, Duration::from_millis(if turn % 10 == 0 { 20 } else { 0 }))
        })
        .await;
        self.subscribe(name, &receiver, shards).await;
        receiver
    }

    async fn subscribe(&self, name: &str, receiver: &Receiver, shards: u32) {
        let options = OPTIONS.replace("SHARDS", &shards.to_string());
        let sql = format!("SELECT dtm.subscribe($1, 'load.event', $2, '{options}')");
        self.client.execute(&sql, &[&name, &receiver.url()]).await.expect("subscribe");
    }

    fn relay(&self, name: &str) -> Relay {
        self.relay_at(name, self.cluster.port())
    }

    /// A relay that reaches the database by this port.
    fn relay_at(&self, name: &str, port: u16) -> Relay {
        let url = format!("postgres://postgres@127.0.0.1:{port}/shop");
        Relay::start_configured(&format!("name = \"{name}\"\n[database.shop]\nurl = \"{url}\"\n"))
    }

    fn load(&self) -> Load {
        Load::start(&self.cluster, "shop", WRITERS, STEADY)
    }

    /// How many subscriptions, or shards of them, each relay has, by its name.
    async fn owners(&self) -> Vec<(String, i64)> {
        let sql = "SELECT coalesce(owner, 'nobody'), count(*) FROM dtm.progress GROUP BY 1 ORDER BY 1";
        let rows = self.client.query(sql, &[]).await.expect("dtm.progress");
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    async fn wait_for_owners(&self, expected: &[(&str, i64)]) {
        let expected: Vec<(String, i64)> =
            expected.iter().map(|(n, count)| ((*n).to_owned(), *count)).collect();
        let found =
            process::eventually(DEADLINE, || async { (self.owners().await == expected).then_some(()) });
        if found.await.is_none() {
            panic!("owners are {:?}, not {expected:?}", self.owners().await);
        }
    }

    /// Waits until everything that the writers have committed has arrived. Answers how many events came again.
    async fn settle(&self, ledger: &Ledger, receiver: &Receiver) -> usize {
        load::wait_for_all(&self.client, receiver, DEADLINE).await;
        let (events, duplicates) = load::assert_all_arrived(&self.client, ledger, &receiver.received()).await;
        println!("{events} events, {duplicates} came again");
        duplicates
    }
}

/// Waits until so many more requests have come to each.
async fn more(receivers: &[Receiver], count: usize) {
    for receiver in receivers {
        let until = receiver.count() + count;
        receiver.wait_until("more events", DEADLINE, |received| received.len() >= until).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_share_subscriptions_evenly_and_one_that_comes_or_ends_costs_no_event_and_no_repetition() {
    let site = Site::open().await;
    let mut receivers = Vec::new();
    for n in 0..6 {
        receivers.push(site.receiver(&format!("s{n}"), 1).await);
    }
    let mut first = site.relay("first");
    site.wait_for_owners(&[("first", 6)]).await;
    let load = site.load();
    more(&receivers, 20).await;
    let mut second = site.relay("second");
    site.wait_for_owners(&[("first", 3), ("second", 3)]).await;
    more(&receivers, 20).await;
    let mut third = site.relay("third");
    site.wait_for_owners(&[("first", 2), ("second", 2), ("third", 2)]).await;
    more(&receivers, 20).await;
    assert!(first.terminate().await.success());
    site.wait_for_owners(&[("second", 3), ("third", 3)]).await;
    more(&receivers, 20).await;
    first.restart();
    site.wait_for_owners(&[("first", 2), ("second", 2), ("third", 2)]).await;
    more(&receivers, 20).await;
    assert!(second.terminate().await.success());
    assert!(third.terminate().await.success());
    site.wait_for_owners(&[("first", 6)]).await;
    let ledger = load.stop().await;
    for receiver in &receivers {
        assert_eq!(site.settle(&ledger, receiver).await, 0, "no relay has crashed");
    }
    assert!(first.terminate().await.success());
    for relay in [&first, &second, &third] {
        assert!(!relay.log().contains("its cursor is moved by another relay"), "{}", relay.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_share_the_shards_of_a_subscription_and_it_goes_on_when_their_number_changes() {
    let site = Site::open().await;
    let receivers = [site.receiver("s", 4).await];
    let [receiver] = &receivers;
    let (mut first, mut second) = (site.relay("first"), site.relay("second"));
    site.wait_for_owners(&[("first", 2), ("second", 2)]).await;
    let load = site.load();
    more(&receivers, 200).await;
    let mut ledger = load.stop().await;
    assert_eq!(site.settle(&ledger, receiver).await, 0, "every event belongs to one shard");
    let behind = "SELECT max(lag_events) FROM dtm.progress";
    let stored = process::eventually(DEADLINE, || async {
        let lag: i64 = site.client.query_one(behind, &[]).await.expect("dtm.progress").get(0);
        (lag == 0).then_some(())
    });
    stored.await.expect("all shards stand at the end of the log");
    let passed = receiver.received();

    let load = site.load();
    more(&receivers, 50).await;
    site.subscribe("s", receiver, 2).await;
    site.wait_for_owners(&[("first", 1), ("second", 1)]).await;
    more(&receivers, 100).await;
    site.subscribe("s", receiver, 3).await;
    more(&receivers, 100).await;
    site.subscribe("s", receiver, 1).await;
    more(&receivers, 100).await;
    ledger.merge(load.stop().await);
    site.settle(&ledger, receiver).await;
    let received = receiver.received();
    let times = load::arrivals(&received);
    for event in &passed {
        assert_eq!(times[event.id()], 1, "what all shards had passed came again");
    }
    let sql = "SELECT retrying + dead FROM dtm.subscriptions";
    let failed: i64 = site.client.query_one(sql, &[]).await.expect("dtm.subscriptions").get(0);
    assert_eq!(failed, 0);
    assert!(first.terminate().await.success());
    assert!(second.terminate().await.success());
}

/// What happens to a relay that owns a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Killed,
    Stopped,
    CutOff,
}

/// Seconds.
const DEFAULT_LEASE: f64 = 3.0;
/// How often a relay sends a heartbeat, in seconds.
const BEAT: f64 = 1.0;
const TAKEOVER_WITHIN: f64 = 5.0;

/// By the database's clock, in seconds: from the first relay's last sign of life to the second's lease; and the longest time
/// between two beats of the second, which is more than its due only if the machine was too busy to run it.
async fn takeover(client: &Client) -> (f64, f64) {
    let sql = "WITH beat AS ( \
                   SELECT name, expires_at, expires_at - lag(expires_at) OVER (PARTITION BY name ORDER BY id) AS gap \
                   FROM dtm.heartbeat_log) \
               SELECT extract(epoch FROM (SELECT max(taken_at) FROM dtm.lease_log) \
                                         - (SELECT max(expires_at) FROM beat WHERE name = 'first'))::float8, \
                      extract(epoch FROM (SELECT max(gap) FROM beat WHERE name = 'second'))::float8";
    let row = client.query_one(sql, &[]).await.expect("times");
    let after_expiry: f64 = row.get(0);
    assert!(after_expiry > 0.0, "it was taken while it was held");
    (after_expiry + DEFAULT_LEASE, row.get(1))
}

async fn taken_over(fate: Fate) {
    let site = Site::open().await;
    let receivers = [site.receiver("s", 1).await];
    let [receiver] = &receivers;
    let proxy = Proxy::start(site.cluster.port()).await;
    let mut first = site.relay_at("first", proxy.port());
    site.wait_for_owners(&[("first", 1)]).await;
    let load = site.load();
    let mut second = site.relay("second");
    second.wait_for_log("connected to").await;
    more(&receivers, 100).await;
    let newest = "SELECT max(token) FROM dtm.lease_log";
    let old: i64 = site.client.query_one(newest, &[]).await.expect("a lease").get(0);
    match fate {
        Fate::Killed => first.kill9(),
        Fate::Stopped => first.pause(),
        Fate::CutOff => proxy.cut(),
    }
    site.wait_for_owners(&[("second", 1)]).await;
    let (silent, beat) = takeover(&site.client).await;
    println!("{fate:?}: taken over {silent:.1} s after the last sign of life");
    let busy = (beat - BEAT).max(0.0);
    assert!(silent < TAKEOVER_WITHIN + busy, "{fate:?}: taken over after {silent} s, {busy} s of them busy");
    more(&receivers, 100).await;
    match fate {
        Fate::Killed => first.restart(),
        Fate::Stopped => first.go_on(),
        Fate::CutOff => proxy.mend(),
    }
    // It is back, finds that it owns nothing, and has had the time to move what it still thinks its own.
    let back = "SELECT count(*) FROM dtm.live_relays WHERE name = 'first'";
    let is_back = process::eventually(DEADLINE, || async {
        let lives: i64 = site.client.query_one(back, &[]).await.expect("dtm.live_relays").get(0);
        (lives == 1).then_some(())
    });
    is_back.await.expect("the first relay comes back");
    match fate {
        Fate::Killed => {}
        Fate::Stopped | Fate::CutOff => first.wait_for_log("no longer delivered here").await,
    }
    more(&receivers, 100).await;
    site.wait_for_owners(&[("second", 1)]).await;
    let ledger = load.stop().await;
    site.settle(&ledger, receiver).await;
    let moved = "SELECT count(*) FILTER (WHERE token = $1 AND moved_at > taken_at), count(*) FILTER (WHERE token > $1) \
                 FROM dtm.cursor_log, (SELECT max(taken_at) AS taken_at FROM dtm.lease_log) AS newest";
    let row = site.client.query_one(moved, &[&old]).await.expect("dtm.cursor_log");
    let (by_the_old, by_the_new): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(by_the_old, 0, "{fate:?}: the old owner has moved its cursor");
    assert!(by_the_new > 0);
    for (id, times) in load::arrivals(&receiver.received()) {
        assert!(times <= 2, "{fate:?}: {id} came {times} times for one takeover");
    }
    assert!(first.terminate().await.success());
    assert!(second.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_takes_over_within_five_seconds_from_one_that_is_killed() {
    taken_over(Fate::Killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_takes_over_within_five_seconds_from_one_that_is_stopped_and_the_old_one_moves_nothing()
{
    taken_over(Fate::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_takes_over_within_five_seconds_from_one_that_is_cut_off_and_the_old_one_moves_nothing()
{
    taken_over(Fate::CutOff).await;
}
