// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask bench NAME`: measures against a baseline of the same run, checks every id, and prints a table.

use clap::{Parser, ValueEnum};
use dtm_tests::bench::{backlog, barrier, fanout, http, kafka, latency, msg, pinned, publish, report};

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// Publishing against a prepared INSERT into a plain outbox table
    Publish,
    /// From COMMIT to the arrival at the endpoint
    Latency,
    /// With a transaction that holds back vacuum, against without
    Pinned,
    /// Delivering a backlog, against a bare client that posts the same
    Http,
    /// A hundred subscriptions against one, and nine endpoints beside a dead one
    Fanout,
    /// From the bottom of five million events, against from 200,000; and the relay's memory
    Backlog,
    /// The barrier, against the bare INSERT that it is made of
    Barrier,
    /// 2-phase messages, against a bare program that writes and calls the same; recovery after an outage
    Msg,
    /// Delivering a backlog into Kafka, against a bare loop that produces the same; latency; memory
    Kafka,
}

/// Benchmarks of pg_dtm.
#[derive(Parser)]
struct Arguments {
    /// Which one
    #[arg(value_enum)]
    name: Bench,
    /// Print the result as JSON too, as the last line
    #[arg(long)]
    json: bool,
    /// How many times each measurement and its baseline are taken, in turn
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    pairs: u16,
    /// How many events the backlog of `kafka` has
    #[arg(long, default_value_t = kafka::EVENTS)]
    events: usize,
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    let pairs = usize::from(arguments.pairs);
    let (name, rows) = match arguments.name {
        Bench::Publish => ("publish", publish::run(pairs).await),
        Bench::Latency => ("latency", latency::run(pairs).await),
        Bench::Pinned => ("pinned", pinned::run(pairs).await),
        Bench::Http => ("http", http::run(pairs).await),
        Bench::Fanout => ("fanout", fanout::run(pairs).await),
        Bench::Backlog => ("backlog", backlog::run(pairs).await),
        Bench::Barrier => ("barrier", barrier::run(pairs).await),
        Bench::Msg => ("msg", msg::run(pairs).await),
        Bench::Kafka => ("kafka", kafka::run(pairs, arguments.events).await),
    };
    report::print(name, &rows, arguments.json);
}
