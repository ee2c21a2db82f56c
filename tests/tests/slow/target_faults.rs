// SPDX-License-Identifier: PostgreSQL
//! A target that is there and does not answer, or answers as one that is away would: nothing but what is to blame waits.

use std::time::{Duration, Instant};

use dtm_tests::cluster::Cluster;
use dtm_tests::process;
use dtm_tests::relay;
use rustix::process::Signal;
use tokio_postgres::Client;

use crate::asking;
use crate::two_databases::{Site, assert_once_and_in_order, publish};

/// Goes on again when it is dropped, so that its server can end.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Stopped {
        process::signal(pid, Signal::STOP);
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        process::signal(self.0, Signal::CONT);
    }
}

async fn subscribe(client: &Client, options: &str) {
    let sql =
        format!("SELECT dtm.subscribe('stock', 'orders', 'postgres://stock/public.on_order', '{options}')");
    client.execute(&sql, &[]).await.expect("subscribe");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_raises_holds_up_its_key_only_also_where_a_server_that_is_away_says_the_same() {
    // A file that is missing, a query that is too large, another server that cannot be reached, and a shutdown.
    let raised = ["08001", "53400", "57P01", "58P01"];
    let site = Site::start().await;
    let client = site.client().await;
    subscribe(&client, r#"{"retry_base": 0.05, "retry_cap": 0.2, "retry_attempts": 4}"#).await;
    for state in raised {
        let sql =
            format!(r#"SELECT dtm.publish('orders', '{{"raise": "{state}"}}', key => 'raises {state}')"#);
        client.execute(&sql, &[]).await.expect("publish");
    }
    let stock = site.at_stock().await;
    let (mut published, begun) = (0, Instant::now());
    while asking::number(&client, "SELECT count(*) FROM dtm.dead_letters").await < raised.len() as i64 {
        let taken = asking::number(&stock, "SELECT count(*) FROM taken").await;
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "no dead letters, and {taken} of {published} others have come"
        );
        publish(&client, published).await;
        published += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let count = i64::from(published);
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == count).await;
    assert_once_and_in_order(&stock, count).await;
    let sql = "SELECT string_agg(last_error, ', ' ORDER BY last_error) FROM dtm.dead_letters";
    let errors: String = client.query_one(sql, &[]).await.expect("dead letters").get(0);
    assert_eq!(errors, raised.map(|state| format!("SQLSTATE {state}: raised")).join(", "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_which_no_answer_comes_is_given_up_and_what_it_does_later_counts_once() {
    let site = Site::start().await;
    let client = site.client().await;
    subscribe(&client, r#"{"timeout": 1, "retry_base": 0.1}"#).await;
    let stock = site.at_stock().await;
    publish(&client, 1).await;
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == 1).await;
    let sql = "SELECT max(pid)::bigint FROM pg_stat_activity WHERE usename = 'relay'";
    let stopped = Stopped::new(asking::number(&stock, sql).await as u32);
    for n in 2..20 {
        publish(&client, n).await;
    }
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == 19).await;
    // Now it does what it was sent.
    drop(stopped);
    asking::wait(&stock, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'relay'", |n| n <= 1).await;
    assert_once_and_in_order(&stock, 19).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_while_an_event_fails_does_not_overtake_it_if_it_is_of_its_key() {
    let site = Site::start().await;
    let client = site.client().await;
    subscribe(&client, r#"{"retry_base": 0.05, "retry_cap": 0.2}"#).await;
    let sql = "SELECT dtm.publish('orders', jsonb_build_object('n', $1::int, 'slow', $2::text), key => $3)";
    client.execute(sql, &[&0, &"yes", &"k0"]).await.expect("publish");
    // It is on its way when these come.
    tokio::time::sleep(Duration::from_millis(200)).await;
    for n in 1..=20 {
        let key = format!("k{}", n % 2);
        client.execute(sql, &[&n, &"no", &key]).await.expect("publish");
    }
    let stock = site.at_stock().await;
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == 21).await;
    assert_once_and_in_order(&stock, 21).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_shut_down_in_the_midst_of_calls_costs_no_event_its_attempts() {
    let mut site = Site::start().await;
    let client = site.client().await;
    subscribe(&client, r#"{"retry_base": 0.05, "retry_cap": 0.2, "retry_attempts": 2}"#).await;
    let mut published = 0;
    for away in [0.1, 0.3, 5.0, 0.1, 1.0] {
        for n in 0..250 {
            publish(&client, published).await;
            published += 1;
            if n == 150 {
                site.stock.stop().await;
            }
        }
        tokio::time::sleep(Duration::from_secs_f64(away)).await;
        site.stock.start().await;
    }
    let (stock, count) = (site.at_stock().await, i64::from(published));
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken == count).await;
    assert_once_and_in_order(&stock, count).await;
    assert_eq!(asking::number(&client, "SELECT count(*) FROM dtm.dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tries_each_target_also_one_that_no_subscription_names() {
    let (shop, stock) = (Cluster::builder().start().await, Cluster::builder().start().await);
    shop.create_database("shop").await;
    stock.create_database("stock").await;
    let owner = stock.connect("stock").await;
    let rights = "CREATE ROLE relay LOGIN; GRANT USAGE ON SCHEMA dtm TO relay;
                  GRANT EXECUTE ON FUNCTION dtm.receive, dtm.call_events TO relay;";
    owner.batch_execute(rights).await.expect("a role");
    let check = |database: &str| {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let (from, to) = (shop.url("shop"), stock.url_as("relay", database));
        let text = format!("[database.shop]\nurl = \"{from}\"\n[postgres.stock]\nurl = \"{to}\"\n");
        std::fs::write(file.path(), text).expect("a file");
        relay::run(&["check", "--config", &file.path().display().to_string()])
    };
    let (succeeded, printed) = check("stock");
    assert!(succeeded && printed.contains("it answers, and has the extension pg_dtm"), "{printed}");
    let missing = "the role may not execute dtm.call_branch, dtm.barrier, dtm.query_prepared";
    assert!(printed.contains(missing), "{printed}");
    for (database, problem) in
        [("postgres", "it does not have the extension pg_dtm"), ("nowhere", "\"nowhere\" does not exist")]
    {
        let (succeeded, printed) = check(database);
        assert!(!succeeded && printed.contains(problem), "{printed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_sets_or_locks_in_its_session_is_not_the_next_ones() {
    let site = Site::start().await;
    let (client, stock) = (site.client().await, site.at_stock().await);
    let functions = "
        CREATE TABLE seen (gid text, tenant text);
        GRANT ALL ON seen TO relay;
        CREATE FUNCTION leave(gid text, branch_id text, op text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO seen VALUES (gid, current_setting('app.tenant', true));
            PERFORM set_config('app.tenant', 'theirs', false), set_config('search_path', 'nowhere', false);
            PERFORM set_config('default_transaction_read_only', 'on', false), pg_advisory_lock(42);
        END $$;";
    stock.batch_execute(functions).await.expect("functions");
    for n in 0..12 {
        let sql = format!(
            r#"SELECT dtm.msg_send('[{{"action": "postgres://stock/public.leave"}}]', 'm{n}', '{{"retry_interval": 0.1}}')"#
        );
        client.batch_execute(&sql).await.expect("msg_send");
    }
    let open = "SELECT count(*) FROM dtm.transactions WHERE status <> 'succeed'";
    asking::wait(&client, open, |open| open == 0).await;
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM seen").await, 12);
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM seen WHERE tenant <> ''").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_is_called_that_is_strict_and_none_that_the_configuration_does_not_list() {
    let site = Site::start_with(Cluster::builder().start().await, |stock| {
        format!("{}\"\nfunctions = [\"listed.*\"]\n#", stock.url_as("relay", "stock"))
    })
    .await;
    let (client, stock) = (site.client().await, site.at_stock().await);
    let functions = "CREATE SCHEMA listed; GRANT USAGE ON SCHEMA listed TO relay;
        CREATE FUNCTION listed.strict(gid text, branch_id text, op text, payload jsonb) RETURNS void STRICT LANGUAGE sql
            AS 'INSERT INTO public.taken (id, key) VALUES (gid, payload::text)'";
    stock.batch_execute(functions).await.expect("functions");
    for function in ["listed.strict", "public.take"] {
        let sql = format!(
            r#"SELECT dtm.msg_send('[{{"action": "postgres://stock/{function}"}}]', '{function}', '{{"retry_interval": 0.1}}')"#
        );
        client.batch_execute(&sql).await.expect("msg_send");
    }
    asking::wait(&stock, "SELECT count(*) FROM taken WHERE key = 'null'", |taken| taken == 1).await;
    let refused = "SELECT count(*) FROM dtm.transactions WHERE last_error LIKE '%not among functions of [postgres.stock]%'";
    asking::wait(&client, refused, |refused| refused == 1).await;
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM taken").await, 1);
}
