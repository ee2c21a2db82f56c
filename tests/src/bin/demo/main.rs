// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask demo`: a little business on a throw-away cluster. Orders commit and roll back while the endpoint of their
//! events fails for a time; in the end the books of the business are held against those of the endpoint, and against a topic
//! of Kafka.

mod lake;
mod stage;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use dtm_tests::cluster::{Cluster, bin_dir};
use dtm_tests::ledger::Ledger;
use dtm_tests::receiver::{Received, Receiver, Reply};
use dtm_tests::relay::Relay;
use rand::Rng;
use tokio_postgres::Client;

use crate::lake::Lake;
use crate::stage::{BLUE, GREEN, GREY, Stage, YELLOW};

const ORDERS: u32 = 60;
const CUSTOMERS: u32 = 5;
/// The endpoint answers 503 while the orders of this range are taken.
const OUTAGE: std::ops::Range<u32> = 20..35;
const DELIVERY_DEADLINE: Duration = Duration::from_secs(20);

/// A little business on a throw-away PostgreSQL: what commits is delivered, what rolls back is not.
#[derive(Parser)]
struct Arguments {
    /// Leave everything running at the end, and say how to connect.
    #[arg(long)]
    keep: bool,
    /// Deliver to a throw-away Apache Kafka, too.
    #[arg(long)]
    kafka: bool,
}

fn endpoint_works(stage: &Stage, receiver: &Receiver) {
    let stage = stage.clone();
    receiver.behave(move |request| {
        let again = stage.refused.lock().expect("refused").contains(request.id());
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let attempt = if again { "  (after a retry)" } else { "" };
        stage.say(GREEN, "delivered", &format!("{} {body}{attempt}", request.header("ce-type")));
        Reply::status(200)
    });
}

fn endpoint_fails(stage: &Stage, receiver: &Receiver) {
    let stage = stage.clone();
    receiver.behave(move |request| {
        let first = stage.refused.lock().expect("refused").insert(request.id().to_owned());
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let what = if first { "refused" } else { "retried" };
        stage.say(
            YELLOW,
            what,
            &format!("{} {body}  503, it will be tried again", request.header("ce-type")),
        );
        Reply::status(503)
    });
}

/// What becomes of an order.
#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    Commit,
    RollBack,
    /// The reservation is undone by a savepoint, the order itself commits.
    HalfUndone,
}

async fn order(
    client: &mut Client,
    stage: &Stage,
    ledger: &mut Ledger,
    number: u32,
) -> Result<(), tokio_postgres::Error> {
    let mut random = rand::rng();
    let customer = format!("customer-{}", random.random_range(0..CUSTOMERS));
    let outcome = match number % 6 {
        3 => Outcome::RollBack,
        5 => Outcome::HalfUndone,
        _ => Outcome::Commit,
    };
    let body = serde_json::json!({ "order": number, "customer": &customer });
    let mut transaction = client.transaction().await?;
    transaction.execute("SELECT FROM customers WHERE name = $1 FOR UPDATE", &[&customer]).await?;
    transaction.execute("INSERT INTO orders VALUES ($1, $2)", &[&(number as i32), &customer]).await?;
    let publish = "SELECT dtm.publish($1, $2, key => $3)::text";
    let created: String =
        transaction.query_one(publish, &[&"orders.created", &body, &customer]).await?.get(0);
    if outcome == Outcome::HalfUndone {
        let savepoint = transaction.savepoint("reservation").await?;
        let undone: String =
            savepoint.query_one(publish, &[&"orders.reserved", &body, &customer]).await?.get(0);
        savepoint.rollback().await?;
        ledger.roll_back([undone]);
    }
    if outcome == Outcome::RollBack {
        transaction.rollback().await?;
        stage.say(GREY, "rolled back", &format!("orders.created {body}"));
        ledger.roll_back([created]);
    } else {
        transaction.commit().await?;
        let more = if outcome == Outcome::HalfUndone {
            "  (orders.reserved was rolled back to a savepoint)"
        } else {
            ""
        };
        stage.say(BLUE, "committed", &format!("orders.created {body}{more}"));
        ledger.commit(&customer, [created]);
    }
    Ok(())
}

async fn business(
    cluster: &Cluster,
    stage: &Stage,
    receiver: &Receiver,
) -> Result<Ledger, Box<dyn std::error::Error>> {
    let mut client = cluster.connect("shop").await;
    let mut ledger = Ledger::default();
    for number in 0..ORDERS {
        if number == OUTAGE.start {
            stage.say(YELLOW, "outage", "the endpoint answers 503 from here on");
            endpoint_fails(stage, receiver);
        }
        if number == OUTAGE.end {
            stage.say(YELLOW, "outage", "the endpoint is back");
            endpoint_works(stage, receiver);
        }
        order(&mut client, stage, &mut ledger, number).await?;
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    let complete =
        dtm_tests::process::holds_within(DELIVERY_DEADLINE, || ledger.is_complete(&receiver.received()));
    complete.await;
    Ok(ledger)
}

fn summary(ledger: &Ledger, received: &[Received]) -> bool {
    let verdict = ledger.verdict(received);
    println!("committed    {:>5}", ledger.committed_count());
    println!("delivered    {:>5}", verdict.delivered);
    println!("rolled back  {:>5}", ledger.rolled_back.len());
    println!("duplicates   {:>5}", verdict.duplicates);
    println!("lost         {:>5}", verdict.lost.len());
    if !verdict.phantoms.is_empty() {
        println!("delivered although rolled back: {:?}", verdict.phantoms);
    }
    if !verdict.disordered.is_empty() {
        println!("keys out of order: {:?}", verdict.disordered);
    }
    verdict.lost.is_empty() && verdict.phantoms.is_empty() && verdict.disordered.is_empty()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let stage =
        Stage { begun: Instant::now(), coloured: std::io::stdout().is_terminal(), refused: Arc::default() };
    let kafka = if arguments.kafka { "an Apache Kafka, " } else { "" };
    let all = format!("a throw-away PostgreSQL with pg_dtm, {kafka}a receiving HTTP service, the relay");
    stage.say(GREY, "starting", &all);
    let cluster = Cluster::builder().preload().start().await;
    cluster.create_database("shop").await;
    let lake = if arguments.kafka { Some(Lake::open().await) } else { None };
    let receiver = Receiver::start().await;
    endpoint_works(&stage, &receiver);
    let admin = cluster.connect("shop").await;
    let tables = "CREATE TABLE customers (name text PRIMARY KEY); \
                  INSERT INTO customers SELECT 'customer-' || n FROM generate_series(0, 9) n; \
                  CREATE TABLE orders (id int PRIMARY KEY, customer text REFERENCES customers)";
    admin.batch_execute(tables).await?;
    let subscribe = "SELECT dtm.subscribe('billing', 'orders.*', $1, '{\"retry_base\": \"200ms\", \"retry_cap\": \"1s\"}')";
    admin.execute(subscribe, &[&receiver.url()]).await?;
    let mut relay = match &lake {
        None => Relay::start(&cluster.url("shop")),
        Some(lake) => {
            let subscribe = "SELECT dtm.subscribe('lake', 'orders.>', $1)";
            admin.execute(subscribe, &[&lake.destination()]).await?;
            lake.show(&stage)?;
            let database = format!("[database.shop]\nurl = \"{}\"\n", cluster.url("shop"));
            Relay::start_configured(&(database + &lake.configuration()))
        }
    };

    let ledger = business(&cluster, &stage, &receiver).await?;
    let in_kafka = match &lake {
        None => None,
        Some(lake) => Some(lake.received(&ledger, DELIVERY_DEADLINE).await),
    };
    println!("{}", if lake.is_some() { "\nOver HTTP" } else { "" });
    let mut kept = summary(&ledger, &receiver.received());
    if let Some(in_kafka) = &in_kafka {
        println!("\nIn Kafka");
        kept &= summary(&ledger, in_kafka);
    }
    if arguments.keep {
        println!("\nEverything is left running. Connect with\n");
        println!("  {} {}\n", bin_dir().join("psql").display(), cluster.url("shop"));
        println!("and try SELECT dtm.publish('orders.created', '{{\"order\": 1000}}'); Ctrl-C ends it.");
        if let Some(lake) = &lake {
            println!("{}", lake.hint());
        }
        tokio::signal::ctrl_c().await?;
    }
    if relay.ended(Duration::from_millis(if arguments.keep { 1_000 } else { 0 })).await.is_none() {
        relay.terminate().await;
    }
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
