// SPDX-License-Identifier: PostgreSQL
//! The relay and PostgreSQL are killed between every two steps of a message's life. In the end each message is delivered as a
//! whole, or never was.

use std::collections::BTreeSet;
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::Client;

use crate::asking;

const DEADLINE: Duration = Duration::from_secs(60);
/// What a service takes for its answer.
const ANSWER: Duration = Duration::from_millis(40);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Relay,
    Server,
}

struct Site {
    cluster: Cluster,
    relay: Relay,
    services: Receiver,
    /// What services are asked, as it comes.
    asked: UnboundedReceiver<String>,
}

impl Site {
    async fn start() -> Site {
        let cluster = Cluster::builder().config("max_prepared_transactions", "10").start().await;
        cluster.create_database("shop").await;
        let (tell, asked) = unbounded_channel();
        let services = Receiver::start_with(move |request| {
            let _ = tell.send(request.target.clone());
            let is_lost = request.target.contains("branch_id=00") && request.target.contains("gid=lost");
            Reply::slow(if is_lost { 409 } else { 200 }, ANSWER)
        })
        .await;
        let toml = format!("lease = 1\n[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
        let relay = Relay::start_configured(&toml);
        Site { cluster, relay, services, asked }
    }

    async fn kill(&mut self, victim: Victim) {
        match victim {
            Victim::Relay => {
                self.relay.kill9();
                self.relay.restart();
            }
            Victim::Server => {
                self.cluster.kill9().await;
                self.cluster.start().await;
            }
        }
    }

    async fn client(&self) -> Client {
        self.cluster.connect("shop").await
    }

    fn steps(&self) -> String {
        let step = format!(r#"{{"action": "{}", "payload": 1}}"#, self.services.url());
        format!("'[{step}, {step}]'")
    }

    /// Waits until a service is asked something.
    async fn asked(&mut self, gid: &str, what: &str) {
        let (gid, what) = (format!("gid={gid}&"), format!("branch_id={what}&"));
        let asked = async {
            loop {
                let target = self.asked.recv().await.expect("services");
                if target.contains(&gid) && target.contains(&what) {
                    return;
                }
            }
        };
        tokio::time::timeout(DEADLINE, asked).await.expect("nobody is asked");
    }

    fn calls(&self, gid: &str, branch: &str) -> usize {
        let (gid, branch) = (format!("gid={gid}&"), format!("branch_id={branch}&"));
        let counts = |request: &&Received| {
            request.accepted && request.target.contains(&gid) && request.target.contains(&branch)
        };
        self.services.received().iter().filter(counts).count()
    }

    /// All that is kept is delivered as a whole, and nothing that is lost ever was.
    async fn assert_whole(&self, kept: &[String], lost: &[String]) {
        let client = self.client().await;
        let open = "SELECT count(*) FROM dtm.transactions WHERE status NOT IN ('succeed', 'failed')";
        asking::wait(&client, open, |open| open == 0).await;
        for gid in kept {
            let sql =
                format!("SELECT count(*) FROM dtm.transactions WHERE gid = '{gid}' AND status = 'succeed'");
            assert_eq!(asking::number(&client, &sql).await, 1, "{gid}");
            assert!(self.calls(gid, "01") >= 1 && self.calls(gid, "02") >= 1, "{gid} is not whole");
        }
        for gid in lost {
            let sql =
                format!("SELECT count(*) FROM dtm.transactions WHERE gid = '{gid}' AND status = 'succeed'");
            assert_eq!(asking::number(&client, &sql).await, 0, "{gid}");
            assert_eq!((self.calls(gid, "01"), self.calls(gid, "02")), (0, 0), "{gid} was rolled back");
        }
        assert_eq!(asking::number(&client, "SELECT count(*) FROM dtm.due").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_of_it_a_message_is_delivered_as_a_whole_or_never_was() {
    let mut site = Site::start().await;
    let (mut kept, mut lost) = (Vec::new(), Vec::new());
    for victim in [Victim::Relay, Victim::Server] {
        for call in ["00", "01", "02"] {
            for wait in [Duration::ZERO, ANSWER, ANSWER + Duration::from_millis(4)] {
                let n = kept.len();
                let client = site.client().await;
                for gid in [format!("kept-{n}"), format!("lost-{n}")] {
                    let sql = format!(
                        "SELECT dtm.msg_prepare('{gid}', {}, '{}', '{{\"timeout_to_fail\": 0.05, \"retry_interval\": 0.05}}')",
                        site.steps(),
                        site.services.url()
                    );
                    client.batch_execute(&sql).await.expect("msg_prepare");
                }
                site.asked(&format!("kept-{n}"), call).await;
                tokio::time::sleep(wait).await;
                site.kill(victim).await;
                kept.push(format!("kept-{n}"));
                lost.push(format!("lost-{n}"));
            }
        }
    }
    site.assert_whole(&kept, &lost).await;
}

/// Makes a write last, with its transaction open: time to kill somebody.
const PAUSE: &str = "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$";

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_write_of_it_a_message_is_delivered_as_a_whole() {
    let mut site = Site::start().await;
    site.client().await.batch_execute(PAUSE).await.expect("a function");
    // The second step fails once, so that there is something to store of branches.
    let mut seen = BTreeSet::new();
    site.services.behave(move |request| {
        let is_first = request.target.contains("branch_id=02") && seen.insert(request.target.clone());
        Reply::status(if is_first { 500 } else { 200 })
    });
    let writes = [
        ("dtm.transaction", "UPDATE", "WHEN (OLD.status = 'prepared' AND NEW.status = 'submitted')"),
        ("dtm.branch", "INSERT OR UPDATE", ""),
        ("dtm.transaction", "UPDATE", "WHEN (NEW.status = 'succeed')"),
        ("dtm.cursor_log_1", "INSERT", ""),
    ];
    let mut kept = Vec::new();
    for victim in [Victim::Relay, Victim::Server] {
        for (table, event, condition) in writes {
            let client = site.client().await;
            let trigger = format!(
                "CREATE TRIGGER pause AFTER {event} ON {table} FOR EACH ROW {condition} EXECUTE FUNCTION pause()"
            );
            client.batch_execute(&trigger).await.expect("a trigger");
            let (n, steps, url) = (kept.len(), site.steps(), site.services.url());
            let options = "'{\"timeout_to_fail\": 0.05, \"retry_interval\": 0.05}'";
            let messages = format!(
                "SELECT dtm.msg_prepare('asked-{n}', {steps}, '{url}', {options}); SELECT dtm.msg_send({steps}, 'sent-{n}', {options})"
            );
            client.batch_execute(&messages).await.expect("messages");
            let writing = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            asking::wait(&client, writing, |sleeping| sleeping > 0).await;
            site.kill(victim).await;
            let client = site.client().await;
            client.batch_execute(&format!("DROP TRIGGER pause ON {table}")).await.expect("DROP TRIGGER");
            kept.extend([format!("asked-{n}"), format!("sent-{n}")]);
        }
    }
    site.assert_whole(&kept, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_before_commit_sends_nothing_and_after_it_all() {
    let mut site = Site::start().await;
    let client = site.client().await;
    let send = |gid: &str| format!("SELECT dtm.msg_send({}, '{gid}')", site.steps());
    let (open, prepared) = (site.client().await, site.client().await);
    open.batch_execute(&format!("BEGIN; {}", send("lost-open"))).await.expect("msg_send");
    prepared
        .batch_execute(&format!("BEGIN; {}; PREPARE TRANSACTION 'p'", send("kept-prepared")))
        .await
        .expect("PREPARE TRANSACTION");
    prepared
        .batch_execute(&format!("BEGIN; {}; PREPARE TRANSACTION 'q'", send("lost-prepared")))
        .await
        .expect("PREPARE TRANSACTION");
    client.batch_execute(&send("kept-committed")).await.expect("msg_send");
    site.kill(Victim::Server).await;
    let client = site.client().await;
    client.batch_execute("COMMIT PREPARED 'p'").await.expect("COMMIT PREPARED");
    client.batch_execute("ROLLBACK PREPARED 'q'").await.expect("ROLLBACK PREPARED");
    let kept = ["kept-prepared", "kept-committed"].map(str::to_owned);
    let sql = "SELECT count(*) FROM dtm.transactions WHERE status = 'succeed'";
    asking::wait(&client, sql, |ended| ended == 2).await;
    site.assert_whole(&kept, &["lost-open", "lost-prepared"].map(str::to_owned)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_under_load_nothing_is_lost_and_nothing_is_called_that_was_rolled_back() {
    let mut site = Site::start().await;
    site.services.behave({
        let mut random = StdRng::seed_from_u64(5);
        move |_| Reply::status(if random.random_bool(0.2) { 500 } else { 200 })
    });
    let (mut kept, mut lost) = (Vec::new(), Vec::new());
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..12 {
        let mut client = site.client().await;
        for n in 0..150 {
            let gid = format!("{round}-{n}");
            let options = r#"'{"retry_interval": 0.02, "concurrent": true}'"#;
            let sql = format!("SELECT dtm.msg_send({}, '{gid}', {options})", site.steps());
            let transaction = client.transaction().await.expect("BEGIN");
            transaction.batch_execute(&sql).await.expect("msg_send");
            if random.random_bool(0.8) {
                transaction.commit().await.expect("COMMIT");
                kept.push(gid);
            } else {
                transaction.rollback().await.expect("ROLLBACK");
                lost.push(gid);
            }
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..200))).await;
        site.kill(if round % 3 == 2 { Victim::Server } else { Victim::Relay }).await;
    }
    site.assert_whole(&kept, &lost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_relay_takes_over_the_transactions_of_another_that_is_stopped() {
    let site = Site::start().await;
    let toml = format!("lease = 1\n[database.shop]\nurl = \"{}\"\n", site.cluster.url("shop"));
    let client = site.client().await;
    client.batch_execute(&format!("SELECT dtm.msg_send({}, 'first')", site.steps())).await.expect("msg_send");
    let ended = |count| move |ended| ended == count;
    let sql = "SELECT count(*) FROM dtm.transactions WHERE status = 'succeed'";
    asking::wait(&client, sql, ended(1)).await;
    let _other = Relay::start_configured(&toml);
    let shared = "SELECT count(DISTINCT relay) FROM dtm.owners WHERE alive";
    asking::wait(&client, shared, ended(2)).await;
    site.relay.pause();
    for n in 0..40 {
        let sql = format!("SELECT dtm.msg_send({}, 'paused-{n}')", site.steps());
        client.batch_execute(&sql).await.expect("msg_send");
    }
    asking::wait(&client, sql, ended(41)).await;
    site.relay.go_on();
    let gids: Vec<String> = (0..40).map(|n| format!("paused-{n}")).collect();
    site.assert_whole(&gids, &[]).await;
    assert!(process::holds_within(DEADLINE, || site.calls("paused-0", "02") >= 1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_joins_takes_transactions_over_between_calls_and_repeats_none() {
    let site = Site::start().await;
    site.services.behave(|_| Reply::slow(200, Duration::from_millis(1_500)));
    let client = site.client().await;
    for n in 0..40 {
        let options = r#"'{"delay": 0.1, "request_timeout": 20}'"#;
        let sql = format!("SELECT dtm.msg_send({}, 'slow-{n}', {options})", site.steps());
        client.batch_execute(&sql).await.expect("msg_send");
    }
    site.services.wait_for(20).await;
    let toml = format!("lease = 1\n[database.shop]\nurl = \"{}\"\n", site.cluster.url("shop"));
    let _other = Relay::start_configured(&toml);
    let gids: Vec<String> = (0..40).map(|n| format!("slow-{n}")).collect();
    site.assert_whole(&gids, &[]).await;
    let shared = "SELECT count(DISTINCT relay) FROM dtm.owners WHERE alive";
    assert_eq!(asking::number(&client, shared).await, 2);
    assert_eq!(site.services.count(), 80, "a call was repeated");
}
