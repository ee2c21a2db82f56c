// SPDX-License-Identifier: PostgreSQL
//! Events and messages from one PostgreSQL into another, by functions there: each has its effect once, whoever dies or is away.

use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::relay::{self, Relay};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

use crate::asking;

/// What the other database does: each effect is counted, so that a second one is seen.
const STOCK: &str = r"
    CREATE SEQUENCE tries;
    CREATE TABLE taken (id text PRIMARY KEY, key text, n int, times int NOT NULL DEFAULT 1, at bigserial);
    CREATE FUNCTION on_order(event jsonb) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        IF event #>> '{data,poison}' = 'yes' THEN
            RAISE EXCEPTION 'no such order';
        END IF;
        -- A sequence counts what is rolled back too.
        IF event #>> '{data,slow}' = 'yes' AND nextval('tries') < 4 THEN
            PERFORM pg_sleep(0.5);
            RAISE EXCEPTION 'not yet';
        END IF;
        IF event #>> '{data,raise}' <> '' THEN
            RAISE EXCEPTION 'raised' USING ERRCODE = event #>> '{data,raise}';
        END IF;
        INSERT INTO taken (id, key, n) VALUES (event ->> 'id', event ->> 'partitionkey', (event #>> '{data,n}')::int)
        ON CONFLICT (id) DO UPDATE SET times = taken.times + 1;
    END $$;
    CREATE FUNCTION take(gid text, branch_id text, op text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        IF payload ->> 'wait' = 'yes' AND NOT EXISTS (SELECT FROM taken WHERE id = 'open') THEN
            RAISE EXCEPTION 'not yet' USING ERRCODE = 'DTM25';
        END IF;
        INSERT INTO taken (id, key, n) VALUES (gid || '/' || branch_id || '/' || op, gid, (payload ->> 'n')::int)
        ON CONFLICT (id) DO UPDATE SET times = taken.times + 1;
    END $$;
    CREATE TABLE orders (gid text PRIMARY KEY);
    CREATE ROLE relay LOGIN;
    GRANT USAGE ON SCHEMA dtm TO relay;
    GRANT EXECUTE ON FUNCTION dtm.receive, dtm.call_events, dtm.call_branch, dtm.barrier, dtm.query_prepared TO relay;
    GRANT ALL ON taken, taken_at_seq, tries TO relay;";

const STEPS: &str = r#"[{"action": "postgres://stock/public.take", "payload": {"n": 1}},
    {"action": "postgres://stock/public.take", "payload": {"n": 2}}]"#;
const OPTIONS: &str = r#"{"retry_interval": 0.05, "timeout_to_fail": 0.3}"#;

/// A database that events are published in, one that they go to, and a relay between them.
pub struct Site {
    shop: Cluster,
    /// Where the events go.
    pub stock: Cluster,
    pub relay: Relay,
    configuration: String,
}

impl Site {
    pub async fn start() -> Site {
        Site::start_with(Cluster::builder().start().await, |stock| stock.url_as("relay", "stock")).await
    }

    /// With this cluster for the stock, which the relay reaches by the URL.
    pub async fn start_with(stock: Cluster, url: impl FnOnce(&Cluster) -> String) -> Site {
        let shop = Cluster::builder().start().await;
        shop.create_database("shop").await;
        stock.create_database("stock").await;
        stock.connect("stock").await.batch_execute(STOCK).await.expect("the stock");
        let configuration = format!(
            "lease = 1\n[database.shop]\nurl = \"{}\"\n[postgres.stock]\nurl = \"{}\"\n",
            shop.url("shop"),
            url(&stock)
        );
        let relay = Relay::start_configured(&configuration);
        Site { shop, stock, relay, configuration }
    }

    pub async fn client(&self) -> Client {
        self.shop.connect("shop").await
    }

    pub async fn at_stock(&self) -> Client {
        self.stock.connect("stock").await
    }
}

/// An event of a number.
pub async fn publish(client: &Client, n: i32) {
    let key = format!("k{}", n % 7);
    let sql = "SELECT dtm.publish('orders', jsonb_build_object('n', $1::int), key => $2)";
    client.execute(sql, &[&n, &key]).await.expect("publish");
}

/// Sends a message of two steps to the stock.
pub async fn send(client: &Client, gid: &str) {
    let sql = format!("SELECT dtm.msg_send('{STEPS}', '{gid}', '{OPTIONS}')");
    client.batch_execute(&sql).await.expect("msg_send");
}

/// Prepares a message for business at the stock and does the business, but tells nobody what has become of it.
pub async fn do_business(client: &Client, stock: &mut Client, gid: &str, commits: bool) {
    let sql = format!("SELECT dtm.msg_prepare('{gid}', '{STEPS}', 'postgres://stock', '{OPTIONS}')");
    client.batch_execute(&sql).await.expect("msg_prepare");
    let transaction = stock.transaction().await.expect("BEGIN");
    let work = format!("SELECT dtm.msg_barrier('{gid}'); INSERT INTO orders VALUES ('{gid}')");
    transaction.batch_execute(&work).await.expect("business");
    if commits {
        transaction.commit().await.expect("COMMIT");
    } else {
        transaction.rollback().await.expect("ROLLBACK");
    }
}

/// Waits until all messages have ended: the steps of those that were sent, and of those whose business is there, were called once,
/// and no others.
pub async fn assert_messages_are_whole(client: &Client, stock: &Client, sent: i64) {
    let open = "SELECT count(*) FROM dtm.transactions WHERE status NOT IN ('succeed', 'failed')";
    asking::wait(client, open, |open| open == 0).await;
    let called = "SELECT count(*) FROM taken WHERE key LIKE 'sent-%'";
    assert_eq!(asking::number(stock, called).await, 2 * sent);
    let called = "SELECT count(*) FROM taken WHERE key LIKE 'asked-%'";
    let done = asking::number(stock, "SELECT count(*) FROM orders").await;
    assert_eq!(asking::number(stock, called).await, 2 * done);
    let unlike =
        "SELECT count(*) FROM orders o FULL JOIN (SELECT DISTINCT key FROM taken WHERE key LIKE 'asked-%') t
                  ON t.key = o.gid WHERE o.gid IS NULL OR t.key IS NULL";
    assert_eq!(
        asking::number(stock, unlike).await,
        0,
        "called for what was rolled back, or not for what was not"
    );
    assert_eq!(asking::number(stock, "SELECT count(*) FROM taken WHERE times > 1").await, 0, "called twice");
}

/// All of these have come once each, and those of a key in their order.
pub async fn assert_once_and_in_order(stock: &Client, count: i64) {
    let sql = "SELECT count(*) FROM taken WHERE times > 1";
    assert_eq!(asking::number(stock, sql).await, 0, "something has happened twice");
    let sql = "SELECT count(*) FROM (SELECT n, lag(n) OVER (PARTITION BY key ORDER BY at) AS before FROM taken) t WHERE n < before";
    assert_eq!(asking::number(stock, sql).await, 0, "a key's events have come out of order");
    assert_eq!(asking::number(stock, "SELECT count(*) FROM taken").await, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_have_their_effect_once_and_in_order_whoever_is_killed() {
    // What the target has done counts as done: also where its users' commits need not survive a crash.
    let stock = Cluster::builder().config("synchronous_commit", "off").config("wal_writer_delay", "10s");
    let mut site = Site::start_with(stock.start().await, |stock| stock.url_as("relay", "stock")).await;
    let client = site.client().await;
    let subscribe = "SELECT dtm.subscribe('stock', 'orders', 'postgres://stock/public.on_order', '{\"retry_base\": 0.1}')";
    client.execute(subscribe, &[]).await.expect("subscribe");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), &site.configuration).expect("a file");
    let check = ["check", "--config", &file.path().display().to_string()];
    let (succeeded, printed) = relay::run(&check);
    assert!(succeeded, "{printed}");
    let mut random = StdRng::seed_from_u64(3);
    let mut published = 0;
    for round in 0..12 {
        for _ in 0..300 {
            publish(&client, published).await;
            published += 1;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
        if round % 4 == 3 {
            site.stock.kill9().await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            site.stock.start().await;
        } else {
            site.relay.kill9();
            site.relay.restart();
        }
    }
    let stock = site.at_stock().await;
    let published = i64::from(published);
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == published).await;
    assert_once_and_in_order(&stock, published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_whose_function_fails_is_a_dead_letter_with_its_sqlstate_and_holds_up_its_key_only() {
    let site = Site::start().await;
    let client = site.client().await;
    let options = r#"{"retry_base": 0.05, "retry_attempts": 4}"#;
    let subscribe =
        format!("SELECT dtm.subscribe('stock', 'orders', 'postgres://stock/public.on_order', '{options}')");
    client.execute(&subscribe, &[]).await.expect("subscribe");
    publish(&client, 1).await;
    let poison = r#"SELECT dtm.publish('orders', '{"poison": "yes"}', key => 'k1')"#;
    client.execute(poison, &[]).await.expect("publish");
    for n in 2..60 {
        publish(&client, n).await;
    }
    // jsonb has no such character: no retry can help.
    let odd = "SELECT dtm.publish_bytes('orders', '\"\\u0000\"'::bytea, 'application/json', key => 'odd')";
    client.execute(&odd.replace("\\u", "\\\\u"), &[]).await.expect("publish");
    let stock = site.at_stock().await;
    // Others go on: else nobody could tell an event that fails from a function that does.
    let mut published = 60;
    let begun = std::time::Instant::now();
    while asking::number(&client, "SELECT count(*) FROM dtm.dead_letters").await < 2 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no dead letter");
        publish(&client, published).await;
        published += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let count = i64::from(published) - 1;
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == count).await;
    assert_once_and_in_order(&stock, count).await;
    let sql = "SELECT string_agg(left(last_error, 30), ', ' ORDER BY seq) FROM dtm.dead_letters";
    let errors: String = client.query_one(sql, &[]).await.expect("dead letters").get(0);
    assert_eq!(errors, "SQLSTATE P0001: no such order, SQLSTATE 22P05: unsupported Un");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_between_two_databases_is_whole_while_the_other_one_dies_and_comes_back() {
    let mut site = Site::start().await;
    let client = site.client().await;
    let mut sent = 0;
    for round in 0..6 {
        for n in 0..40 {
            send(&client, &format!("sent-{round}-{n}")).await;
            sent += 1;
        }
        let mut business = site.at_stock().await;
        for n in 0..10 {
            do_business(&client, &mut business, &format!("asked-{round}-{n}"), n % 3 > 0).await;
        }
        drop(business);
        if round % 2 == 0 {
            site.stock.kill9().await;
            tokio::time::sleep(Duration::from_millis(400)).await;
            site.stock.start().await;
        } else {
            site.relay.kill9();
            site.relay.restart();
        }
    }
    let stock = site.at_stock().await;
    assert_messages_are_whole(&client, &stock, sent).await;
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM orders").await, 6 * 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_business_transaction_is_not_decided_and_a_function_may_say_not_yet() {
    let site = Site::start().await;
    let (client, business) = (site.client().await, site.at_stock().await);
    let options = r#"{"retry_interval": 0.05, "timeout_to_fail": 0.1, "request_timeout": 0.3}"#;
    let step = r#"[{"action": "postgres://stock/public.take", "payload": {"n": 1, "wait": "yes"}}]"#;
    let sql = format!("SELECT dtm.msg_prepare('open', '{step}', 'postgres://stock', '{options}')");
    client.batch_execute(&sql).await.expect("msg_prepare");
    business.batch_execute("BEGIN; SELECT dtm.msg_barrier('open')").await.expect("business");
    let asked = "SELECT failures::bigint FROM dtm.transactions WHERE gid = 'open' AND status = 'prepared'";
    asking::wait(&client, asked, |failures| failures > 1).await;
    business.batch_execute("COMMIT").await.expect("COMMIT");
    let not_yet = "SELECT coalesce(max(attempts), 0)::bigint FROM dtm.branches WHERE gid = 'open' AND last_status = 425";
    asking::wait(&client, not_yet, |attempts| attempts > 3).await;
    business.batch_execute("INSERT INTO taken (id) VALUES ('open')").await.expect("INSERT");
    asking::wait(&client, "SELECT count(*) FROM dtm.transactions WHERE status = 'succeed'", |ended| {
        ended == 1
    })
    .await;
}
