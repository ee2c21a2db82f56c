// SPDX-License-Identifier: PostgreSQL
//! Failures stay where they belong: what is the endpoint's fault costs no event an attempt, what is an event's own holds up its
//! key alone and ends in the dead letters, with its reason.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

use crate::asking;
use crate::numbered::{DEADLINE, arrived, number, publish, times, wait_for_all};

/// A subscription of an endpoint that misbehaves.
struct Site {
    client: Client,
    receiver: Receiver,
    relay: Relay,
    _cluster: Cluster,
}

impl Site {
    async fn open(options: &str, behaviour: impl FnMut(&Received) -> Reply + Send + 'static) -> Site {
        let cluster = Cluster::builder().preload().start().await;
        cluster.create_database("shop").await;
        let client = cluster.connect("shop").await;
        let receiver = Receiver::start_with(behaviour).await;
        let sql = format!("SELECT dtm.subscribe('s', 't', $1, '{options}')");
        client.execute(&sql, &[&receiver.url()]).await.expect("subscribe");
        let relay = Relay::start(&cluster.url("shop"));
        Site { client, receiver, relay, _cluster: cluster }
    }

    async fn number(&self, sql: &str) -> i64 {
        asking::number(&self.client, sql).await
    }

    /// Waits until a query answers a number.
    async fn wait(&self, sql: &str, expected: i64) {
        asking::wait(&self.client, sql, |found| found == expected).await;
    }

    /// Nothing is parked and nothing is dead.
    async fn assert_clean(&self) {
        self.wait(PARKED, 0).await;
        assert_eq!(self.number(DEAD).await, 0, "a dead letter");
    }
}

const PARKED: &str = "SELECT count(*) FROM dtm.retries";
const DEAD: &str = "SELECT count(*) FROM dtm.dead_letters";
const THREE_ATTEMPTS: &str =
    r#"{"timeout": 1, "retry_base": "20ms", "retry_cap": "200ms", "retry_attempts": 3}"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_everything_until_it_is_mended_costs_no_event_an_attempt() {
    for status in [401, 400, 500] {
        let site = Site::open(THREE_ATTEMPTS, move |_| Reply::status(status)).await;
        publish(&site.client, "t", 1, 60).await;
        // Far more often than three attempts of each of the events that are tried.
        site.receiver.wait_until("many refusals", DEADLINE, |received| received.len() >= 60).await;
        assert_eq!((site.number(PARKED).await, site.number(DEAD).await), (0, 0), "while it says {status}");
        site.relay.wait_for_log("the endpoint is down").await;
        site.receiver.behave(|_| Reply::status(200));
        wait_for_all(&site.receiver, 60).await;
        site.assert_clean().await;
        assert_eq!(times(&site.receiver, 60), vec![1; 60]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_event_holds_up_its_key_alone_and_becomes_a_dead_letter_with_its_history() {
    let poisoned = |request: &Received| number(request) == 7;
    let site =
        Site::open(
            THREE_ATTEMPTS,
            move |request| {
                if poisoned(request) { Reply::status(500) } else { Reply::status(200) }
            },
        )
        .await;
    let mut last = 0;
    let dead = process::eventually(DEADLINE, || {
        last += 5;
        let (site, from, to) = (&site, last - 4, last);
        async move {
            // Whose fault it is, the others tell: they go on all the time.
            publish(&site.client, "t", from, to).await;
            (site.number(DEAD).await == 1).then_some(())
        }
    });
    assert!(dead.await.is_some(), "no dead letter:\n{}", site.relay.log());
    publish(&site.client, "t", last + 1, last + 5).await;
    last += 5;
    let all = |received: &[Received]| arrived(received).len() >= last as usize - 1;
    site.receiver.wait_until("all but the poisoned one", DEADLINE, all).await;
    site.wait(PARKED, 0).await;
    let of_its_key: Vec<i32> =
        arrived(&site.receiver.received()).into_iter().filter(|n| n % 5 == 2).collect();
    let expected: Vec<i32> = (1..=last).filter(|n| n % 5 == 2 && *n != 7).collect();
    assert_eq!(of_its_key, expected, "later events of its key, in order");
    let tries = site.receiver.received().iter().filter(|request| number(request) == 7).count();
    let sql = "SELECT attempts, last_status, last_error, jsonb_array_length(history), payload::text, key \
               FROM dtm.dead_letters";
    let row = site.client.query_one(sql, &[]).await.expect("a dead letter");
    let (attempts, status, error): (i32, i32, String) = (row.get(0), row.get(1), row.get(2));
    assert_eq!((attempts, status, error.as_str()), (3, 500, "Internal Server Error"));
    assert_eq!(row.get::<_, i32>(3) as usize, tries, "every attempt is in its history");
    assert_eq!((row.get::<_, &str>(4), row.get::<_, &str>(5)), ("7", "k2"));
    site.wait("SELECT lag_events FROM dtm.subscriptions", 0).await;
    assert!(times(&site.receiver, last).iter().all(|&times| times <= 1), "something came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_refused_as_malformed_while_others_are_taken_dies_at_its_first_attempt() {
    let site = Site::open(r#"{"retry_base": "20ms"}"#, |request| {
        if number(request) == 3 { Reply::status(422) } else { Reply::status(200) }
    })
    .await;
    publish(&site.client, "t", 1, 2).await;
    site.receiver.wait_for(2).await;
    publish(&site.client, "t", 3, 10).await;
    site.wait(DEAD, 1).await;
    let all = |received: &[Received]| arrived(received).len() == 9;
    site.receiver.wait_until("all the others", DEADLINE, all).await;
    let tries = site.receiver.received().iter().filter(|request| number(request) == 3).count();
    assert_eq!(tries, 1);
    assert_eq!(site.number("SELECT last_status::bigint FROM dtm.dead_letters").await, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_an_endpoint_answers_at_first_everything_arrives_once_and_in_order() {
    let mut tries: HashMap<i32, u32> = HashMap::new();
    let site = Site::open(r#"{"timeout": 1, "retry_base": "20ms", "retry_cap": "100ms"}"#, move |request| {
        let n = number(request);
        let tried = tries.entry(n).or_default();
        *tried += 1;
        if *tried > 1 {
            return Reply::status(200);
        }
        let location = vec![("location", "http://127.0.0.1:9/".to_owned())];
        match n % 9 {
            0 => Reply::Hang,
            1 => Reply::Reset,
            2 => Reply::Garbage,
            3 => Reply::Dribble(200, Duration::from_millis(100)),
            4 => Reply::Endless(500),
            5 => Reply::Status(307, location, Duration::ZERO),
            6 => Reply::status(502),
            7 => Reply::Endless(200),
            _ => Reply::Dribble(200, Duration::from_millis(3)),
        }
    })
    .await;
    publish(&site.client, "t", 1, 45).await;
    wait_for_all(&site.receiver, 45).await;
    site.assert_clean().await;
    let answered_late = |n: i32| n % 9 == 3;
    for (n, times) in (1..).zip(times(&site.receiver, 45)) {
        // An answer that came too late counted at the endpoint, and not at the relay.
        assert_eq!(times, if answered_late(n) { 2 } else { 1 }, "number {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_asks_for_patience_in_seconds_or_by_a_date_gets_it_at_no_event_s_cost() {
    for by_date in [false, true] {
        let retry_after = move || match by_date {
            false => "2".to_owned(),
            true => {
                let at =
                    jiff::Timestamp::try_from(SystemTime::now() + Duration::from_secs(3)).expect("a time");
                at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
            }
        };
        let status = if by_date { 503 } else { 429 };
        let mut first = true;
        let site =
            Site::open(r#"{"max_in_flight": 1, "retry_attempts": 1}"#, move |_| {
                match std::mem::take(&mut first) {
                    true => Reply::Status(status, vec![("retry-after", retry_after())], Duration::ZERO),
                    false => Reply::status(200),
                }
            })
            .await;
        publish(&site.client, "t", 1, 5).await;
        wait_for_all(&site.receiver, 5).await;
        site.assert_clean().await;
        let received = site.receiver.received();
        let waited = received[1].at - received[0].at;
        assert!(waited >= Duration::from_secs(2), "asked for two seconds, waited {waited:?}");
        assert_eq!(received.len(), 6);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_gone_disables_its_subscription_until_somebody_resumes_it() {
    let site = Site::open("{}", |_| Reply::status(410)).await;
    publish(&site.client, "t", 1, 10).await;
    site.wait("SELECT count(*) FROM dtm.subscriptions WHERE state = 'disabled' AND reason ~ '410'", 1).await;
    site.relay.wait_for_log("no longer delivered here").await;
    let before = site.receiver.count();
    publish(&site.client, "t", 11, 20).await;
    site.receiver.behave(|_| Reply::status(200));
    assert_eq!(site.receiver.count(), before, "nothing more is sent");
    site.client.execute("SELECT dtm.resume('s')", &[]).await.expect("resume");
    wait_for_all(&site.receiver, 20).await;
    site.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_resumed_as_soon_as_it_is_disabled_is_delivered() {
    let site = Site::open("{}", |_| Reply::status(410)).await;
    let resume = "WITH gone AS (SELECT dtm.resume(name) FROM dtm.subscriptions WHERE state = 'disabled') SELECT count(*) FROM gone";
    publish(&site.client, "t", 1, 10).await;
    for _ in 0..3 {
        site.wait(resume, 1).await;
    }
    site.receiver.behave(|_| Reply::status(200));
    let found = process::eventually(DEADLINE, || async {
        site.number(resume).await;
        (arrived(&site.receiver.accepted()).len() == 10).then_some(())
    });
    assert!(found.await.is_some(), "{}", site.relay.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_dies_also_where_others_come_by_rarely() {
    let options = r#"{"retry_base": "10ms", "retry_cap": "20ms", "retry_attempts": 3}"#;
    let site = Site::open(options, |r| Reply::status(if number(r) == 1 { 500 } else { 200 })).await;
    publish(&site.client, "t", 1, 1).await;
    let attempts = || site.receiver.received().iter().filter(|r| number(r) == 1).count();
    for n in 2..40 {
        // It fails often enough in between to look like an endpoint that is down.
        let seen = attempts();
        let failed = || async { (attempts() > seen + 5).then_some(()) };
        let is_dead = || async { (site.number(DEAD).await == 1).then_some(()) };
        tokio::select! {
            failed = process::eventually(DEADLINE, failed) => failed.expect("it is tried again"),
            dead = process::eventually(DEADLINE, is_dead) => dead.expect("it died"),
        }
        if site.number(DEAD).await == 1 {
            break;
        }
        publish(&site.client, "t", n, n).await;
    }
    site.wait(DEAD, 1).await;
    site.wait("SELECT lag_events FROM dtm.subscriptions", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_blocked_by_a_dead_letter_waits_for_somebody_and_the_others_do_not() {
    let options = r#"{"retry_base": "20ms", "retry_cap": "100ms", "retry_attempts": 1, "on_dead": "block"}"#;
    let site =
        Site::open(
            options,
            |request| {
                if number(request) == 5 { Reply::status(500) } else { Reply::status(200) }
            },
        )
        .await;
    publish(&site.client, "t", 1, 24).await;
    site.wait(DEAD, 1).await;
    site.wait("SELECT count(*) FROM dtm.retries WHERE key = 'k0' AND waits_behind", 3).await;
    let others = |received: &[Received]| arrived(received).len() == 20;
    site.receiver.wait_until("the other keys", DEADLINE, others).await;
    site.wait("SELECT lag_events FROM dtm.subscriptions", 0).await;
    site.receiver.behave(|_| Reply::status(200));
    let sql = "SELECT dtm.redrive('s', topic => 't')";
    assert_eq!(site.number(sql).await, 1);
    wait_for_all(&site.receiver, 24).await;
    site.assert_clean().await;
    assert_eq!(times(&site.receiver, 24), vec![1; 24]);
}
