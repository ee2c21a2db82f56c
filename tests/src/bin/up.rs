// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask up`: a development cluster that is kept, a relay and a receiver that prints what arrives, until Ctrl-C.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::relay::Relay;

const DATABASE: &str = "dev";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let folder = PathBuf::from(
        std::env::var_os("DTM_UP_DIR").expect("DTM_UP_DIR is not set: run this by cargo xtask"),
    );
    let _lock = match alone(&folder) {
        Ok(lock) => lock,
        Err(problem) => {
            eprintln!("up: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let mut cluster =
        Cluster::builder().preload().config("max_prepared_transactions", "20").at(&folder).start().await;
    let admin = cluster.connect("postgres").await;
    let exists =
        admin.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&DATABASE]).await.expect("a query");
    if exists.is_none() {
        cluster.create_database(DATABASE).await;
    }
    let mut receiver = Command::new(std::env::var_os("DTM_RECEIVER").expect("DTM_RECEIVER is not set"))
        .arg("--print")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the receiver");
    let mut lines = BufReader::new(receiver.stdout.take().expect("its output")).lines();
    let port = lines.next().expect("a first line").expect("a port");
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("received  {line}")));
    let url = format!("http://127.0.0.1:{}/", port.trim());
    let subscribe =
        "SELECT dtm.subscribe('dev', '>', $1, '{\"retry_base\": \"200ms\", \"retry_cap\": \"5s\"}')";
    cluster.connect(DATABASE).await.execute(subscribe, &[&url]).await.expect("subscribe");
    let mut relay = Relay::start(&cluster.url(DATABASE));

    println!(
        "PostgreSQL with pg_dtm, the relay and a receiver are running; the data is kept in {}.",
        folder.display()
    );
    println!("\n  psql {}\n", cluster.url(DATABASE));
    println!("  SELECT dtm.publish('orders.created', '{{\"id\": 42}}', key => 'customer-7');\n");
    println!("What the subscription \"dev\" (all topics) delivers is printed here. Ctrl-C ends everything.");
    tokio::signal::ctrl_c().await.expect("Ctrl-C");
    // On a terminal all of them have had the signal too.
    if relay.ended(Duration::from_secs(1)).await.is_none() {
        relay.terminate().await;
    }
    receiver.kill().ok();
    receiver.wait().ok();
    cluster.stop().await;
    ExitCode::SUCCESS
}

/// Keeps others off the folder while the answer lives: a second one would rewrite the configuration of the first.
fn alone(folder: &Path) -> Result<File, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::create_dir_all(folder).map_err(failed)?;
    let lock = File::create(folder.join("lock")).map_err(failed)?;
    if lock.try_lock().is_err() {
        return Err(format!("it runs already on {}; end that one first, by Ctrl-C", folder.display()));
    }
    match Cluster::left_running(folder) {
        Some(pid) => {
            Err(format!("its PostgreSQL still runs from an earlier time; end it first: kill -INT {pid}"))
        }
        None => Ok(lock),
    }
}
