// SPDX-License-Identifier: PostgreSQL
//! A target in PostgreSQL fails over, or comes back from a dump: its receipts and barriers come with it, so nothing that it has is
//! done again, and a business that it lost was never done.

use std::process::Command;
use std::time::Duration;

use dtm_tests::cluster::{Cluster, bin_dir, temporary_folder};
use dtm_tests::process;
use tokio_postgres::Client;

use crate::asking;
use crate::two_databases::{Site, assert_messages_are_whole, do_business, publish, send};

const SUBSCRIBE: &str =
    "SELECT dtm.subscribe('stock', 'orders', 'postgres://stock/public.on_order', '{\"retry_base\": 0.1}')";

/// All events have had their effect, once each.
async fn assert_events_came(stock: &Client, count: i64) {
    let came = "SELECT count(*) FROM taken WHERE key LIKE 'k%'";
    asking::wait(stock, came, |came| came >= count).await;
    assert_eq!(asking::number(stock, came).await, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_done_twice_when_the_target_fails_over() {
    let primary = Cluster::builder().start().await;
    let folder = temporary_folder();
    let standby = Cluster::builder().start_standby(&primary, folder.path()).await;
    let admin = primary.connect("postgres").await;
    let url = |stock: &Cluster| {
        let (first, second) = (stock.port(), standby.port());
        format!("postgres://relay@127.0.0.1:{first},127.0.0.1:{second}/stock")
    };
    admin.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.expect("a setting");
    admin.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    let in_step = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
    asking::wait(&admin, in_step, |standbys| standbys == 1).await;
    let mut site = Site::start_with(primary, url).await;
    let client = site.client().await;
    client.execute(SUBSCRIBE, &[]).await.expect("subscribe");
    let mut business = site.at_stock().await;
    for n in 0..300 {
        publish(&client, n).await;
        send(&client, &format!("sent-{n}")).await;
        if n % 10 == 0 {
            do_business(&client, &mut business, &format!("asked-{n}"), n % 3 > 0).await;
        }
    }
    site.stock.kill9().await;
    for n in 300..400 {
        publish(&client, n).await;
        send(&client, &format!("sent-{n}")).await;
    }
    let stock = standby.connect("stock").await;
    stock.execute("SELECT pg_promote()", &[]).await.expect("pg_promote");
    stock.batch_execute("ALTER SYSTEM RESET synchronous_standby_names").await.expect("a setting");
    stock.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    assert_events_came(&stock, 400).await;
    assert_messages_are_whole(&client, &stock, 400).await;
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM orders").await, 20);
    assert!(site.relay.terminate().await.success());
}

/// Writes the database out, or makes it anew of that.
fn by_program(program: &str, file: &str, site: &Site, dump: &std::path::Path) {
    process::run(
        Command::new(bin_dir().join(program)).args(["-d", &site.stock.url("stock"), file]).arg(dump),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_restored_takes_what_it_has_not_had_and_nothing_twice() {
    let mut site = Site::start().await;
    let client = site.client().await;
    client.execute(SUBSCRIBE, &[]).await.expect("subscribe");
    let mut business = site.at_stock().await;
    let stock = site.at_stock().await;
    let mut published = 0;
    // The relay dies while it is at work: the target has more than the relay knows of.
    for n in 0..200 {
        publish(&client, n).await;
        send(&client, &format!("sent-{n}")).await;
        published += 1;
    }
    asking::wait(&stock, "SELECT count(*) FROM taken", |taken| taken > 100).await;
    site.relay.kill9();
    for n in 0..20 {
        do_business(&client, &mut business, &format!("asked-{n}"), n % 3 > 0).await;
    }
    let had = asking::number(&stock, "SELECT count(*) FROM taken").await;
    let dump = tempfile::NamedTempFile::new().expect("a file");
    by_program("pg_dump", "-f", &site, dump.path());
    // This business is not in the dump: it is as if it had never been.
    for n in 20..40 {
        do_business(&client, &mut business, &format!("asked-{n}"), n % 3 > 0).await;
    }
    drop((business, stock));
    let admin = site.stock.connect("postgres").await;
    admin.batch_execute("DROP DATABASE stock WITH (FORCE)").await.expect("DROP DATABASE");
    site.relay.restart();
    for n in 200..250 {
        publish(&client, n).await;
        send(&client, &format!("sent-{n}")).await;
        published += 1;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    admin.batch_execute("CREATE DATABASE stock").await.expect("CREATE DATABASE");
    by_program("psql", "-1Xqf", &site, dump.path());
    println!("{had} effects were in the dump");
    let stock = site.at_stock().await;
    assert_events_came(&stock, published).await;
    assert_messages_are_whole(&client, &stock, published).await;
    assert_eq!(asking::number(&stock, "SELECT count(*) FROM orders").await, 13);
    assert!(site.relay.terminate().await.success());
}
