// SPDX-License-Identifier: PostgreSQL
//! 2-phase messages: called if and only if the business transaction commits, in order, until all is done; asked about where that is
//! not known; and whatever is wrong with one is said before anything is done.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use tokio_postgres::Client;

const PATIENCE: Duration = Duration::from_secs(30);

async fn shop() -> (Cluster, Client) {
    let cluster = Cluster::builder().start().await;
    cluster.create_database("shop").await;
    let client = cluster.connect("shop").await;
    (cluster, client)
}

/// Waits until the answer to a query is the expected one.
async fn wait_for(client: &Client, sql: &str, expected: &str) {
    let answer = async || client.query_one(sql, &[]).await.expect("an answer").get::<_, Option<String>>(0);
    let holds =
        process::eventually(PATIENCE, async || (answer().await.as_deref() == Some(expected)).then_some(()));
    assert!(holds.await.is_some(), "{sql} is {:?}, not {expected}", answer().await);
}

async fn status_is(client: &Client, gid: &str, expected: &str) {
    let sql = format!("SELECT max(status) FROM dtm.transactions WHERE gid = '{gid}'");
    wait_for(client, &sql, expected).await;
}

fn targets(received: &[Received]) -> Vec<&str> {
    received.iter().map(|request| request.target.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_called_as_dtm_calls_it_if_and_only_if_its_transaction_commits() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    let _relay = Relay::start(&cluster.url("shop"));
    let steps =
        format!(r#"[{{"action": "{0}?x=1", "payload": {{"id": 7}}}}, {{"action": "{0}"}}]"#, receiver.url());
    let send =
        format!("SELECT dtm.msg_send('{steps}', $1, '{{\"branch_headers\": {{\"x-tenant\": \"9\"}}}}')");
    client.batch_execute("BEGIN").await.expect("BEGIN");
    client.query(&send, &[&"rolled-back"]).await.expect("msg_send");
    client.batch_execute("ROLLBACK").await.expect("ROLLBACK");
    client.query(&send, &[&"g 1"]).await.expect("msg_send");
    status_is(&client, "g 1", "succeed").await;
    let received = receiver.received();
    assert_eq!(
        targets(&received),
        [
            "/events?x=1&gid=g+1&trans_type=msg&branch_id=01&op=action",
            "/events?gid=g+1&trans_type=msg&branch_id=02&op=action"
        ]
    );
    assert_eq!((received[0].method.as_str(), &received[0].body[..]), ("POST", &br#"{"id": 7}"#[..]));
    assert_eq!((received[1].method.as_str(), received[1].body.len()), ("GET", 0));
    assert_eq!(
        (received[0].header("content-type"), received[0].header("x-tenant")),
        ("application/json", "9")
    );
    let again = client.query(&send, &[&"g 1"]).await.expect_err("a gid that exists");
    assert_eq!(again.code().map(|code| code.code()), Some("23505"));
    let sql =
        "SELECT string_agg(branch_id || op || status || attempts, ' ' ORDER BY branch_id) FROM dtm.branches";
    wait_for(&client, sql, "01actionsucceed1 02actionsucceed1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_is_tried_again_before_the_next_and_what_came_of_it_is_shown() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|request| {
        Reply::Body(if request.target.contains("branch_id=02") { 500 } else { 200 }, "no stock".into())
    })
    .await;
    let _relay = Relay::start(&cluster.url("shop"));
    let step = format!(r#"{{"action": "{}", "payload": 1}}"#, receiver.url());
    let options = r#"{"retry_interval": "20ms"}"#;
    let sql = format!("SELECT dtm.msg_send('[{step}, {step}, {step}]', 'm', '{options}')");
    client.batch_execute(&sql).await.expect("msg_send");
    let shown = "SELECT (SELECT string_agg(branch_id || status, ' ' ORDER BY branch_id) FROM dtm.branches) || ' '
                 || max(last_status) || ' ' || max(last_error) || ' ' || (max(attempts) > 2) FROM dtm.branches WHERE branch_id = '02'";
    wait_for(&client, shown, "01succeed 02prepared 03prepared 500 500 Internal Server Error: no stock true")
        .await;
    let waiting = "SELECT (next_attempt_at IS NOT NULL AND failures > 1 AND last_error LIKE '500%')::text FROM dtm.transactions";
    wait_for(&client, waiting, "true").await;
    receiver.behave(|_| Reply::status(200));
    status_is(&client, "m", "succeed").await;
    let count = |branch: &str| receiver.received().iter().filter(|r| r.target.contains(branch)).count();
    assert_eq!((count("branch_id=01"), count("branch_id=03")), (1, 1), "what was done is not done again");
    let left = "SELECT count(*)::text FROM dtm.due";
    wait_for(&client, left, "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_delayed_waits_and_what_is_concurrent_goes_side_by_side() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|_| Reply::slow(200, Duration::from_millis(300))).await;
    let _relay = Relay::start(&cluster.url("shop"));
    let step = format!(r#"{{"action": "{}", "payload": 1}}"#, receiver.url());
    let sql =
        |gid: &str, options: &str| format!("SELECT dtm.msg_send('[{step}, {step}]', '{gid}', '{options}')");
    client.batch_execute(&sql("d", r#"{"delay": 1.5}"#)).await.expect("msg_send");
    client.batch_execute(&sql("c", r#"{"concurrent": true}"#)).await.expect("msg_send");
    status_is(&client, "c", "succeed").await;
    let received = receiver.received();
    assert!(received[1].at - received[0].at < Duration::from_millis(250), "one after the other");
    status_is(&client, "d", "submitted").await;
    status_is(&client, "d", "succeed").await;
    let sql = "SELECT (finished_at - created_at >= '1.5 s')::text FROM dtm.transactions WHERE gid = 'd'";
    wait_for(&client, sql, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_is_submitted_aborted_or_asked_about() {
    let (cluster, client) = shop().await;
    let services = Receiver::start_with(|request| {
        let is_asked = request.target.contains("branch_id=00");
        Reply::status(match () {
            () if is_asked && request.target.contains("gid=rolled-back") => 409,
            () if is_asked && request.target.contains("gid=open") => 425,
            () => 200,
        })
    })
    .await;
    let _relay = Relay::start(&cluster.url("shop"));
    let prepare = |gid: &str, seconds: f64| {
        format!(
            "SELECT dtm.msg_prepare('{gid}', '[{{\"action\": \"{0}\", \"payload\": 1}}]', '{0}',
             '{{\"timeout_to_fail\": {seconds}, \"retry_interval\": 0.05}}')",
            services.url()
        )
    };
    for (gid, seconds) in
        [("submitted", 60.0), ("aborted", 60.0), ("committed", 0.2), ("rolled-back", 0.2), ("open", 0.2)]
    {
        client.batch_execute(&prepare(gid, seconds)).await.expect("msg_prepare");
    }
    client
        .batch_execute("SELECT dtm.msg_submit('submitted'); SELECT dtm.msg_submit('submitted')")
        .await
        .expect("msg_submit");
    client.batch_execute("SELECT dtm.msg_abort('aborted', 'no money')").await.expect("msg_abort");
    for (gid, status) in [
        ("submitted", "succeed"),
        ("aborted", "failed"),
        ("committed", "succeed"),
        ("rolled-back", "failed"),
        ("open", "prepared"),
    ] {
        status_is(&client, gid, status).await;
    }
    let asked = |gid: &str| {
        let asked = format!("?gid={gid}&trans_type=msg&branch_id=00&op=msg");
        let received = services.received();
        (
            received.iter().filter(|r| r.target.ends_with(&asked) && r.method == "GET").count(),
            received
                .iter()
                .filter(|r| r.target.contains(&format!("gid={gid}&")) && r.target.contains("op=action"))
                .count(),
        )
    };
    assert_eq!(
        (asked("submitted"), asked("aborted"), asked("committed"), asked("rolled-back")),
        ((0, 1), (0, 0), (1, 1), (1, 0))
    );
    services
        .wait_until("asking again", PATIENCE, |received| {
            received.iter().filter(|r| r.target.contains("gid=open&")).count() > 2
        })
        .await;
    let late = client.batch_execute("SELECT dtm.msg_submit('rolled-back')").await.expect_err("it has failed");
    assert_eq!(late.code().map(|code| code.code()), Some("55000"));
    let late = client.batch_execute("SELECT dtm.msg_abort('committed')").await.expect_err("it has succeeded");
    assert_eq!(late.code().map(|code| code.code()), Some("55000"));
    client.batch_execute("SELECT dtm.force_stop('open')").await.expect("force_stop");
    status_is(&client, "open", "failed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_is_called_by_all_that_are_subscribed_to_it() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    let _relay = Relay::start(&cluster.url("shop"));
    let unknown = client
        .batch_execute(r#"SELECT dtm.msg_send('[{"action": "topic://paid"}]')"#)
        .await
        .expect_err("nobody");
    assert_eq!(unknown.code().map(|code| code.code()), Some("42704"));
    let sql = format!(
        "INSERT INTO dtm.msg_topics (topic, url) VALUES ('paid', '{0}?a'), ('paid', '{0}?b'), ('sent', '{0}?c')",
        receiver.url()
    );
    client.batch_execute(&sql).await.expect("topics");
    let sql = r#"SELECT dtm.msg_send('[{"action": "topic://paid", "payload": [1]}, {"action": "topic://sent", "payload": 2}]', 't')"#;
    client.batch_execute(sql).await.expect("msg_send");
    status_is(&client, "t", "succeed").await;
    let query = "gid=t&trans_type=msg&branch_id";
    assert_eq!(
        targets(&receiver.received()),
        [
            format!("/events?a&{query}=01-01&op=action"),
            format!("/events?b&{query}=01-02&op=action"),
            format!("/events?c&{query}=02&op=action"),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_was_first_made_before_barriers_are_forgotten_is_not_repeated_unless_somebody_decides_so()
{
    let (cluster, client) = shop().await;
    let mut receiver = Receiver::start().await;
    let url = receiver.url();
    receiver.stop();
    client.batch_execute("ALTER DATABASE shop SET dtm.barriers_kept = '8s'").await.expect("a setting");
    let relay = Relay::start(&cluster.url("shop"));
    let sql = format!(
        r#"SELECT dtm.msg_send('[{{"action": "{url}", "payload": 1}}]', 'old', '{{"retry_interval": 0.05}}')"#
    );
    client.batch_execute(&sql).await.expect("msg_send");
    wait_for(&client, "SELECT (max(attempts) > 0)::text FROM dtm.branches", "true").await;
    wait_for(&client, "SELECT (stuck_since IS NOT NULL)::text FROM dtm.transactions", "true").await;
    status_is(&client, "old", "submitted").await;
    relay.wait_for_log("stands still").await;
    receiver.restart().await;
    client.batch_execute("SELECT dtm.retry_now('old')").await.expect("retry_now");
    status_is(&client, "old", "succeed").await;
    assert_eq!(receiver.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_may_have_hundreds_of_subscribers_but_not_any_number() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    let _relay = Relay::start(&cluster.url("shop"));
    let sql = format!(
        "INSERT INTO dtm.msg_topics (topic, url) SELECT 'paid', '{}?' || n FROM generate_series(1, 120) n",
        receiver.url()
    );
    client.batch_execute(&sql).await.expect("topics");
    let sql = r#"SELECT dtm.msg_send('[{"action": "topic://paid", "payload": [1]}]', 't')"#;
    client.batch_execute(sql).await.expect("msg_send");
    status_is(&client, "t", "succeed").await;
    let received = receiver.received();
    let called = targets(&received);
    let branches: BTreeSet<&str> = called.iter().filter_map(|url| url.split("branch_id=").nth(1)).collect();
    assert_eq!((called.len(), branches.len()), (120, 120), "each is called once, as a branch of its own");
    let sql = "INSERT INTO dtm.msg_topics (topic, url) SELECT 'paid', 'http://x/' || n FROM generate_series(121, 1001) n";
    client.batch_execute(sql).await.expect("topics");
    let sql = r#"SELECT dtm.msg_send('[{"action": "topic://paid", "payload": [1]}]', 'u')"#;
    let refused = client.batch_execute(sql).await.expect_err("too many");
    assert_eq!(refused.code().map(|code| code.code()), Some("54000"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_nobody_can_decide_any_more_stands_still_until_somebody_does() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start().await;
    client.batch_execute("ALTER DATABASE shop SET dtm.barriers_kept = '1s'").await.expect("a setting");
    let mut relay = Relay::start(&cluster.url("shop"));
    let sql = format!(
        "SELECT dtm.msg_prepare('old', '[{{\"action\": \"{0}\", \"payload\": 1}}]', '{0}', '{{\"timeout_to_fail\": 0.6}}')",
        receiver.url()
    );
    client.batch_execute(&sql).await.expect("msg_prepare");
    wait_for(&client, "SELECT (stuck_since IS NOT NULL)::text FROM dtm.transactions", "true").await;
    status_is(&client, "old", "prepared").await;
    assert_eq!(receiver.count(), 0, "nobody is asked");
    relay.wait_for_log("stands still").await;
    client.batch_execute("SELECT dtm.msg_submit('old')").await.expect("msg_submit");
    status_is(&client, "old", "succeed").await;
    assert!(relay.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_retry_limit_a_message_stands_still_and_begins_anew_when_somebody_says_so() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|_| Reply::status(500)).await;
    let _relay = Relay::start(&cluster.url("shop"));
    let sql = format!(
        r#"SELECT dtm.msg_send('[{{"action": "{}"}}]', 'limited', '{{"retry_limit": 2, "retry_interval": 0.01}}')"#,
        receiver.url()
    );
    client.batch_execute(&sql).await.expect("msg_send");
    let stuck = "SELECT (stuck_since IS NOT NULL)::text FROM dtm.transactions";
    for calls in [2, 4] {
        wait_for(&client, stuck, "true").await;
        wait_for(&client, "SELECT attempts::text FROM dtm.branches", "2").await;
        assert_eq!(receiver.count(), calls);
        client.batch_execute("SELECT dtm.retry_now('limited')").await.expect("retry_now");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn somebodys_open_transaction_holds_up_the_end_of_a_message_and_repeats_no_call() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|_| Reply::slow(200, Duration::from_millis(300))).await;
    let _relay = Relay::start(&cluster.url("shop"));
    let steps = format!(r#"[{{"action": "{}"}}]"#, receiver.url());
    client.batch_execute(&format!("SELECT dtm.msg_send('{steps}', 'm')")).await.expect("msg_send");
    receiver.wait_for(1).await;
    client.batch_execute("BEGIN; SELECT dtm.retry_now('m')").await.expect("retry_now");
    tokio::time::sleep(Duration::from_secs(2)).await;
    client.batch_execute("COMMIT").await.expect("COMMIT");
    status_is(&client, "m", "succeed").await;
    wait_for(&client, "SELECT count(*)::text FROM dtm.due", "0").await;
    assert_eq!(receiver.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_does_not_answer_holds_up_no_message_to_others() {
    let (cluster, client) = shop().await;
    let hangs = Receiver::start_with(|_| Reply::slow(200, Duration::from_secs(60))).await;
    let works = Receiver::start().await;
    let _relay = Relay::start(&cluster.url("shop"));
    let send = |receiver: &Receiver, gids: &str| {
        format!(
            r#"SELECT dtm.msg_send('[{{"action": "{}"}}]', {gids}, '{{"request_timeout": 50}}')"#,
            receiver.url()
        )
    };
    let many = format!("{} FROM generate_series(1, 3000) n", send(&hangs, "'hangs' || n"));
    client.batch_execute(&many).await.expect("msg_send");
    hangs.wait_for(1).await;
    client.batch_execute(&send(&works, "'works'")).await.expect("msg_send");
    status_is(&client, "works", "succeed").await;
    assert!(hangs.count() <= 128, "{} calls at a time", hangs.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_again_and_again_does_not_hold_up_what_the_same_service_takes() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|request| match request.body.starts_with(b"0") {
        true => Reply::status(500),
        false => Reply::status(200),
    })
    .await;
    let relay = Relay::start(&cluster.url("shop"));
    let send = |payload: &str, gid: &str| {
        let steps = format!(r#"[{{"action": "{}", "payload": {payload}}}]"#, receiver.url());
        format!(r#"SELECT dtm.msg_send('{steps}', {gid}, '{{"retry_interval": 0.1}}')"#)
    };
    let many = format!("{} FROM generate_series(1, 100) n", send("0", "'bad' || n"));
    client.batch_execute(&many).await.expect("msg_send");
    let succeed = async |gid: &str| {
        client.batch_execute(&send("1", &format!("'{gid}'"))).await.expect("msg_send");
        status_is(&client, gid, "succeed").await;
    };
    // Alone they look like an outage. Once each has failed where others do not, it is known that the fault is theirs.
    let unknown = "SELECT count(*) FROM dtm.branches WHERE gid LIKE 'bad%' AND attempts = 0";
    let (until, mut sent) = (Instant::now() + PATIENCE, 0);
    while client.query_one(unknown, &[]).await.expect("a count").get::<_, i64>(0) > 0 {
        assert!(Instant::now() < until, "some were never called");
        succeed(&format!("among-them{sent}")).await;
        sent += 1;
    }
    let outages = || relay.log().matches("it is down").count();
    let before = outages();
    for n in 0..40 {
        succeed(&format!("good{n}")).await;
    }
    assert_eq!(outages(), before, "they took it away from the others");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_hurried_before_its_time() {
    let (cluster, client) = shop().await;
    let receiver = Receiver::start_with(|_| Reply::status(409)).await;
    let _relay = Relay::start(&cluster.url("shop"));
    let step = format!(r#"'[{{"action": "{}"}}]'"#, receiver.url());
    let sql = format!(
        "SELECT dtm.msg_send({step}, 'delayed', '{{\"delay\": 2}}');
         SELECT dtm.msg_prepare('prepared', {step}, '{}', '{{\"timeout_to_fail\": 2}}');
         SELECT dtm.retry_now('delayed'); SELECT dtm.retry_now('prepared')",
        receiver.url()
    );
    client.batch_execute(&sql).await.expect("messages");
    receiver.wait_for(2).await;
    let early =
        "SELECT count(*)::text FROM dtm.transactions WHERE created_at > clock_timestamp() - interval '2 s'";
    wait_for(&client, early, "0").await;
    let first = receiver.received().iter().map(|request| request.at).min().expect("a call");
    let since: f64 = client
        .query_one(
            "SELECT extract(epoch FROM clock_timestamp() - min(created_at))::float8 FROM dtm.transactions",
            &[],
        )
        .await
        .expect("an age")
        .get(0);
    assert!(first.elapsed().as_secs_f64() < since - 1.9, "called before its time");
}

#[tokio::test]
async fn what_has_ended_is_purged_whatever_stands_still_before_it() {
    let (_cluster, client) = shop().await;
    let sql = r#"SELECT dtm.msg_send('[{"action": "https://h/x"}]', 'g' || n) FROM generate_series(1, 20) n;
        UPDATE dtm.transaction SET created_at = now() - interval '9 days';
        UPDATE dtm.transaction SET status = 'succeed', finished_at = now() - interval '8 days' WHERE id > 10"#;
    client.batch_execute(sql).await.expect("messages");
    let purged = async || {
        let row =
            client.query_one("SELECT dtm.purge_transactions(6)", &[]).await.expect("purge_transactions");
        row.get::<_, i64>(0)
    };
    assert_eq!((purged().await, purged().await, purged().await), (6, 4, 0));
}

#[tokio::test]
async fn wrong_messages_are_refused_with_a_reason_and_leave_nothing() {
    let (_cluster, client) = shop().await;
    let good = r#"[{"action": "https://h/x"}]"#;
    let long = "x".repeat(129);
    let odd = "INSERT INTO dtm.msg_topics (topic, url) VALUES ('odd', 'ftp://h/')";
    client.batch_execute(odd).await.expect("a subscriber");
    for (call, code) in [
        (r#"dtm.msg_send('{}')"#.to_owned(), "22023"),
        ("dtm.msg_send(NULL)".to_owned(), "22023"),
        (r#"dtm.msg_send('[{"action": "amqp://h/x"}]')"#.to_owned(), "0A000"),
        (r#"dtm.msg_send('[{"action": "https://u:p@h/x"}]')"#.to_owned(), "22023"),
        (r#"dtm.msg_send('[{"action": "https://h/x", "data": 1}]')"#.to_owned(), "22023"),
        (format!("dtm.msg_send('{good}', '{long}')"), "22023"),
        (format!("dtm.msg_send('{good}', '')"), "22023"),
        (format!("dtm.msg_send('{good}', 'a;b')"), "22023"),
        (format!("dtm.msg_send('{good}', 'g', '{{\"delay\": -1}}')"), "22023"),
        (format!("dtm.msg_send('{good}', 'g', '{{\"retries\": 1}}')"), "22023"),
        (format!("dtm.msg_send('{good}', 'g', NULL)"), "22023"),
        (format!("dtm.msg_prepare('g', '{good}', NULL)"), "22023"),
        (format!("dtm.msg_prepare('g', '{good}', 'ask')"), "22023"),
        (format!("dtm.msg_prepare('g', '{good}', 'http://h st/')"), "22023"),
        (format!("dtm.msg_prepare('g', '{good}', 'postgres://stock/app.book')"), "22023"),
        (format!("dtm.msg_send('{good}', 'g', '{{\"retry_interval\": \"0s\"}}')"), "22023"),
        (r#"dtm.msg_send('[{"action": "topic://odd"}]')"#.to_owned(), "22023"),
        (r#"dtm.msg_send('[{"action": "https://h/x", "more": 1e400}]')"#.to_owned(), "22023"),
        (
            format!("dtm.msg_send('[{{\"action\": \"kafka://m/t\", \"key\": \"{}\"}}]')", "k".repeat(2_000)),
            "22023",
        ),
        (
            format!(
                "dtm.msg_send('[{{\"action\": \"https://h/x\", \"payload\": \"{}\"}}]')",
                "p".repeat(1_100_000)
            ),
            "54000",
        ),
        (
            format!("dtm.msg_prepare('g', '{good}', 'https://h/ask', '{{\"timeout_to_fail\": \"20d\"}}')"),
            "22023",
        ),
        (format!("dtm.msg_prepare(NULL, '{good}', 'https://h/ask')"), "22023"),
        ("dtm.msg_submit('nobody')".to_owned(), "42704"),
        ("dtm.msg_abort(NULL)".to_owned(), "42704"),
        ("dtm.force_stop('nobody')".to_owned(), "42704"),
        ("dtm.retry_now('nobody')".to_owned(), "42704"),
        ("dtm.subscribe('dtm.mine', 'a', 'https://h/')".to_owned(), "22023"),
        ("dtm.unsubscribe('dtm.transactions')".to_owned(), "42501"),
        ("dtm.rewind('dtm.transactions', 'now')".to_owned(), "42501"),
    ] {
        let error = client.batch_execute(&format!("SELECT {call}")).await.expect_err(&call);
        let error = error.as_db_error().expect("an error of the database");
        assert_eq!(error.code().code(), code, "{call}: {error}");
        assert!(
            error.detail().is_some() && error.hint().is_some() || code == "22023" && error.hint().is_some(),
            "{call}"
        );
    }
    let count: i64 =
        client.query_one("SELECT count(*) FROM dtm.transactions", &[]).await.expect("a count").get(0);
    assert_eq!(count, 0);
}

#[tokio::test]
async fn who_may_send_needs_no_rights_on_tables() {
    let (cluster, client) = shop().await;
    let sql = "CREATE ROLE app LOGIN; GRANT USAGE ON SCHEMA dtm TO app;
               GRANT EXECUTE ON FUNCTION dtm.msg_send, dtm.msg_prepare, dtm.msg_submit, dtm.msg_abort TO app";
    client.batch_execute(sql).await.expect("a role");
    let app = cluster.connect_as("app", "shop").await;
    let steps = r#"'[{"action": "https://h/x"}]'"#;
    let sql = format!("SELECT dtm.msg_send({steps}); SELECT dtm.msg_prepare('p', {steps}, 'https://h/q');
                       SELECT dtm.msg_submit('p'); SELECT dtm.msg_prepare('q', {steps}, 'https://h/q'); SELECT dtm.msg_abort('q')");
    app.batch_execute(&sql).await.expect("it may");
    for refused in [
        "SELECT * FROM dtm.transactions",
        "SELECT dtm.force_stop('p')",
        "SELECT * FROM dtm.transaction",
        "SELECT dtm.announce('p')",
        "SELECT dtm.insert_message('z', 'submitted', '[]', NULL, NULL, '{}')",
    ] {
        let error = app.batch_execute(refused).await.expect_err(refused);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{refused}");
    }
}
