// SPDX-License-Identifier: PostgreSQL
//! What an operator does about events that failed, by the relay's commands: people read a table or one line, programs JSON.

use std::process::Command;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::{self, Relay};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::asking;
use crate::numbered::{DEADLINE, arrived, number, publish, times};

/// What a command answered.
struct Answer {
    code: Option<i32>,
    output: String,
    errors: String,
}

/// A shop whose endpoint refuses one event, number 7 of key k2.
struct Site {
    cluster: Cluster,
    client: Client,
    receiver: Receiver,
    relay: Relay,
    /// Published so far.
    last: i32,
}

const REFUSED: i32 = 7;

fn refuses_one(request: &Received) -> Reply {
    match number(request) {
        REFUSED => Reply::Body(500, "no such customer\nstack trace".to_owned()),
        _ => Reply::status(200),
    }
}

impl Site {
    async fn open(more_options: &str) -> Site {
        let cluster = Cluster::builder().preload().start().await;
        cluster.create_database("shop").await;
        let client = cluster.connect("shop").await;
        let receiver = Receiver::start_with(refuses_one).await;
        let options = r#"{"retry_base": "20ms", "retry_cap": "100ms", "retry_attempts": 2MORE}"#;
        let sql = format!("SELECT dtm.subscribe('s', 't', $1, '{}')", options.replace("MORE", more_options));
        client.execute(&sql, &[&receiver.url()]).await.expect("subscribe");
        let relay = Relay::start(&cluster.url("shop"));
        Site { cluster, client, receiver, relay, last: 0 }
    }

    /// Runs a command on the shop.
    fn run(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(relay::program());
        // Logs are for standard error, however many there are.
        command.args(arguments).args(["--log-level", "trace", "--database-url", &self.cluster.url("shop")]);
        let output = command.output().expect("dtm-relay");
        Answer {
            code: output.status.code(),
            output: String::from_utf8(output.stdout).expect("UTF-8"),
            errors: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }

    /// Runs a command that has to succeed; answers its lines.
    fn text(&self, arguments: &[&str]) -> String {
        let answer = self.run(arguments);
        assert_eq!(answer.code, Some(0), "{arguments:?}: {}{}", answer.output, answer.errors);
        answer.output
    }

    /// Runs a command that has to succeed, with --json; answers what it says.
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.text(&[arguments, &["--json"]].concat());
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output}"))
    }

    /// The subscription as `status` shows it.
    fn status(&self) -> Value {
        let all = self.json(&["status"]);
        assert_eq!(all.as_array().map(Vec::len), Some(1), "{all}");
        all[0].clone()
    }

    async fn publish(&mut self, count: i32) {
        publish(&self.client, "t", self.last + 1, self.last + count).await;
        self.last += count;
    }

    async fn number(&self, sql: &str) -> i64 {
        asking::number(&self.client, sql).await
    }

    async fn wait(&self, sql: &str, expected: i64) {
        asking::wait(&self.client, sql, |found| found == expected).await;
    }

    /// Publishes until the refused event is a dead letter: whose fault it is, the others tell.
    async fn until_dead(&mut self) {
        let until = std::time::Instant::now() + DEADLINE;
        while self.number(DEAD).await == 0 {
            assert!(std::time::Instant::now() < until, "no dead letter:\n{}", self.relay.log());
            self.publish(5).await;
        }
    }

    /// Waits until all that was published has arrived, but for those that `holds_back` names.
    async fn wait_for_all_but(&self, holds_back: impl Fn(i32) -> bool) {
        let expected: Vec<i32> = (1..=self.last).filter(|n| !holds_back(*n)).collect();
        let complete = |received: &[Received]| {
            let mut numbers = arrived(received);
            numbers.sort_unstable();
            numbers == expected
        };
        self.receiver.wait_until(&format!("{} events", expected.len()), DEADLINE, complete).await;
    }

    async fn end(mut self) {
        assert!(self.relay.terminate().await.success());
    }
}

const DEAD: &str = "SELECT count(*) FROM dtm.dead_letters";

fn is_refused(n: i32) -> bool {
    n == REFUSED
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_listed_with_its_reason_and_delivered_when_it_is_redriven() {
    let mut site = Site::open("").await;
    assert_eq!(site.json(&["dead-letters", "list"]), json!([]));
    assert_eq!(site.text(&["dead-letters", "list"]), "there are no dead letters\n");
    site.until_dead().await;
    site.publish(10).await;
    // Later events of its key too.
    site.wait_for_all_but(is_refused).await;
    site.wait("SELECT count(*) FROM dtm.retries", 0).await;

    for arguments in [&["dead-letters", "list"][..], &["dead-letters", "list", "s", "--limit", "5"]] {
        let listed = site.json(arguments);
        assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
        let letter = &listed[0];
        let expected = json!({"name": "s", "topic": "t", "key": "k2", "attempts": 2, "last_status": 500,
                              "last_error": "Internal Server Error", "payload": REFUSED});
        for (field, value) in expected.as_object().expect("an object") {
            assert_eq!(&letter[field], value, "{field} of {letter}");
        }
        let history = letter["history"].as_array().expect("a history");
        let tries = site.receiver.received().iter().filter(|request| is_refused(number(request))).count();
        assert_eq!(history.len(), tries, "every attempt is in its history");
        for attempt in history {
            assert_eq!(attempt["body"], "no such customer stack trace");
            assert_eq!(
                (&attempt["status"], &attempt["error"]),
                (&json!(500), &json!("Internal Server Error"))
            );
            assert!(attempt["at"].is_string());
        }
    }
    let id = site.json(&["dead-letters", "list"])[0]["id"].as_str().expect("an id").to_owned();
    let filters =
        [("--id", &*id, 1), ("--topic", "t", 1), ("--topic", "other.*", 0), ("--since", "2100-01-01", 0)];
    for (filter, value, expected) in filters {
        let listed = site.json(&["dead-letters", "list", filter, value]);
        assert_eq!(listed.as_array().map(Vec::len), Some(expected), "{filter} {value}: {listed}");
    }
    let table = site.text(&["dead-letters", "list", "s"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!([&id, "500", "Internal Server Error"].iter().all(|part| table.contains(*part)), "{table}");
    let status = site.status();
    assert_eq!(
        (&status["name"], &status["state"], &status["dead"]),
        (&json!("s"), &json!("active"), &json!(1))
    );
    assert_eq!(status["retrying"], 0);
    assert!(status["owner"].is_string() && status["lag_events"].is_number(), "{status}");
    let table = site.text(&["status"]);
    assert!(table.starts_with("name") && table.contains("dead") && table.contains("active"), "{table}");

    // What it is not.
    let other = "00000000-0000-7000-8000-000000000000";
    for filter in
        [&["--id", other][..], &["--topic", "u.>"], &["--since", "tomorrow"], &["--max", "0", "--everything"]]
    {
        assert_eq!(
            site.json(&[&["dead-letters", "redrive", "s"][..], filter].concat()),
            json!({"redriven": 0})
        );
    }
    // Redriven before it is mended it dies again, and its history goes on.
    let before = site.json(&["dead-letters", "list"])[0]["history"].as_array().map(Vec::len);
    assert_eq!(site.text(&["dead-letters", "redrive", "s", "--topic", "t"]), "1 redriven\n");
    let longer = process::eventually(DEADLINE, || async {
        let listed = site.json(&["dead-letters", "list"]);
        publish(&site.client, "t", 1, 1).await;
        (listed[0]["history"].as_array().map(Vec::len) > before).then_some(())
    });
    longer.await.expect("it dies again, with a longer history");

    site.receiver.behave(|_| Reply::status(200));
    assert_eq!(site.json(&["dead-letters", "redrive", "s", "--id", &id]), json!({"redriven": 1}));
    site.wait_for_all_but(|_| false).await;
    site.publish(10).await;
    site.wait_for_all_but(|_| false).await;
    site.wait("SELECT dead + retrying FROM dtm.subscriptions", 0).await;
    assert_eq!(times(&site.receiver, site.last)[REFUSED as usize - 1], 1);
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_waits_behind_a_dead_letter_goes_on_when_that_is_discarded() {
    let mut site = Site::open(r#", "on_dead": "block""#).await;
    site.until_dead().await;
    site.publish(10).await;
    let waits = |n: i32| n >= REFUSED && n % 5 == REFUSED % 5;
    site.wait_for_all_but(waits).await;
    let waiting = i64::from((1..=site.last).filter(|n| waits(*n)).count() as u32) - 1;
    site.wait("SELECT count(*) FROM dtm.retries WHERE waits_behind", waiting).await;
    assert_eq!((&site.status()["dead"], &site.status()["retrying"]), (&json!(1), &json!(waiting)));
    assert_eq!(site.json(&["dead-letters", "discard", "s", "--since", "yesterday"]), json!({"discarded": 1}));
    site.wait_for_all_but(is_refused).await;
    let of_its_key: Vec<i32> =
        arrived(&site.receiver.received()).into_iter().filter(|n| n % 5 == REFUSED % 5).collect();
    assert!(of_its_key.is_sorted(), "{of_its_key:?}");
    site.wait("SELECT dead + retrying FROM dtm.subscriptions", 0).await;
    assert!(times(&site.receiver, site.last).iter().all(|times| *times <= 1), "something came twice");
    assert_eq!(site.text(&["dead-letters", "discard", "s", "--everything"]), "0 discarded\n");
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_of_a_subscription_that_is_paused_until_it_is_resumed() {
    let mut site = Site::open("").await;
    site.receiver.behave(|_| Reply::status(200));
    site.publish(5).await;
    site.wait_for_all_but(|_| false).await;
    assert_eq!(site.json(&["pause", "s"]), json!({"subscription": "s", "state": "paused"}));
    site.relay.wait_for_log("no longer delivered here").await;
    site.publish(5).await;
    assert_eq!((&site.status()["state"], site.receiver.count()), (&json!("paused"), 5));
    assert!(site.status()["lag_events"].as_i64() >= Some(5), "{}", site.status());
    assert_eq!(site.text(&["resume", "s"]), "s: active\n");
    site.wait_for_all_but(|_| false).await;
    assert_eq!(site.text(&["pause", "s"]), "s: paused\n");
    assert_eq!(site.json(&["resume", "s"]), json!({"subscription": "s", "state": "active"}));
    site.publish(5).await;
    site.wait_for_all_but(|_| false).await;
    assert_eq!(site.receiver.count(), 15);
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewind_delivers_again_and_drops_what_is_parked_or_dead() {
    let mut site = Site::open(r#", "on_dead": "block""#).await;
    site.until_dead().await;
    site.publish(10).await;
    site.wait_for_all_but(|n| n >= REFUSED && n % 5 == REFUSED % 5).await;
    site.wait("SELECT (retrying > 1)::int::bigint FROM dtm.subscriptions", 1).await;
    // Nothing is delivered meanwhile: what it drops is seen.
    site.text(&["pause", "s"]);
    site.relay.wait_for_log("no longer delivered here").await;
    site.receiver.behave(|_| Reply::status(200));
    let before = site.receiver.accepted().len();
    assert_eq!(
        site.json(&["rewind", "s", "--to", "earliest"]),
        json!({"subscription": "s", "state": "rewound"})
    );
    assert_eq!(site.number("SELECT dead + retrying FROM dtm.subscriptions").await, 0);
    assert_eq!(site.status()["state"], "paused", "it is not resumed by that");
    site.text(&["resume", "s"]);
    site.wait_for_all_but(|_| false).await;
    let last = site.last as usize;
    let again = |received: &[Received]| received.iter().filter(|r| r.accepted).count() == before + last;
    site.receiver.wait_until("everything again", DEADLINE, again).await;
    assert!(times(&site.receiver, site.last).iter().all(|times| (1..=2).contains(times)));
    assert_eq!(site.text(&["rewind", "s", "--to", "now"]), "s: rewound\n");
    site.publish(5).await;
    site.wait_for_all_but(|_| false).await;
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_great_number_of_dead_letters_is_worked_off_in_pieces_and_progress_is_told() {
    let site = Site::open("").await;
    site.relay.wait_for_log("delivering").await;
    site.text(&["pause", "s"]);
    site.relay.wait_for_log("no longer delivered here").await;
    let many = "INSERT INTO dtm.dead_letter (subscription, seq, era, published_at, id, topic, key, payload, attempts) \
                SELECT s.id, -n, i.era, now(), gen_random_uuid(), 't', 'k' || n % 10, n::text::bytea, 1 \
                FROM generate_series(1001, 3500) n, dtm.subscription s, dtm.installation i";
    site.client.execute(many, &[]).await.expect("dead letters");
    let answer = site.run(&["dead-letters", "discard", "s", "--everything", "--json", "--max", "1500"]);
    assert_eq!(
        (answer.code, answer.output.as_str()),
        (Some(0), "{\"discarded\":1500}\n"),
        "{}",
        answer.errors
    );
    assert!(answer.errors.contains("1000 discarded so far"), "{}", answer.errors);
    assert_eq!(
        site.json(&["dead-letters", "redrive", "s", "--everything", "--max", "400"]),
        json!({"redriven": 400})
    );
    assert_eq!(site.json(&["dead-letters", "redrive", "s", "--everything"]), json!({"redriven": 600}));
    site.wait("SELECT retrying FROM dtm.subscriptions", 1000).await;
    site.text(&["resume", "s"]);
    site.wait("SELECT retrying FROM dtm.subscriptions", 0).await;
    let all = |received: &[Received]| arrived(received).len() == 1000;
    site.receiver.wait_until("all that was redriven", DEADLINE, all).await;
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_arguments_are_refused_in_one_line_that_says_how_to_mend_them() {
    let site = Site::open("").await;
    let names = "SELECT name FROM dtm.subscriptions";
    let wrong: [(&[&str], &str, &str); 17] = [
        (&["pause", "nosuch"], "no such subscription", names),
        (&["resume", "nosuch"], "no such subscription", names),
        (&["rewind", "nosuch", "--to", "now"], "no such subscription", names),
        (&["dead-letters", "list", "nosuch"], "no such subscription", names),
        (&["dead-letters", "redrive", "nosuch", "--everything"], "no such subscription", names),
        (&["dead-letters", "discard", "nosuch", "--topic", "t"], "no such subscription", names),
        (&["rewind", "s", "--to", "someday"], "'someday'", "earliest"),
        (&["rewind", "s", "--to", "infinity"], "'infinity'", "earliest"),
        (&["dead-letters", "redrive", "s"], "which dead letters?", "--everything"),
        (&["dead-letters", "discard", "s"], "which dead letters?", "--everything"),
        (&["dead-letters", "redrive", "s", "--since", "someday"], "\"someday\"", "2026-01-31 12:00+00"),
        (&["dead-letters", "redrive", "s", "--since", "2026-13-13"], "2026-13-13", "2026-01-31 12:00+00"),
        (&["dead-letters", "discard", "s", "--topic", "a..b"], "a..b", "orders."),
        (&["dead-letters", "discard", "s", "--topic", ""], "topic", "orders."),
        (&["dead-letters", "redrive", "s", "--id", "7"], "\"7\"", "dead-letters list"),
        (&["status", "--database", "nosuch"], "\"nosuch\"", "default"),
        (&["pause", "s", "--environment", ""], "environment", "empty"),
    ];
    for (arguments, problem, hint) in wrong {
        for more in [&[][..], &["--json"]] {
            let arguments = [arguments, more].concat();
            let answer = site.run(&arguments);
            assert_eq!(answer.code, Some(1), "{arguments:?}: {}{}", answer.output, answer.errors);
            assert_eq!(answer.output, "", "{arguments:?}");
            // What is logged on the way does not count.
            let said: Vec<&str> =
                answer.errors.lines().filter(|line| line.starts_with("dtm-relay: ")).collect();
            let [line] = said[..] else { panic!("{arguments:?}: not one line: {}", answer.errors) };
            assert!(line.contains(problem) && line.contains(hint), "{arguments:?}: {line}");
            assert!(answer.errors.trim_end().ends_with(line), "more than one line: {}", answer.errors);
        }
    }
    site.end().await;
}
