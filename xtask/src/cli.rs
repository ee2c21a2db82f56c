// SPDX-License-Identifier: PostgreSQL
//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::Result;
use crate::packages::{self, Purpose};
use crate::workspace::Workspace;
use crate::{install, kafka, run, server, test};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, installs, starts, tests and measures pg_dtm")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A throw-away PostgreSQL, the relay and a receiver: shows what is published, retried and delivered
    Demo {
        /// Leave everything running and say how to connect
        #[arg(long)]
        keep: bool,
        /// Start an Apache Kafka too
        #[arg(long)]
        kafka: bool,
    },
    /// Everything that CI runs: formatting, lints, and the tests on PostgreSQL 15, 16 and 18
    ///
    /// Tests that need no more of Kafka than topics use that of KAFKA_BOOTSTRAP_SERVERS where it is set, and remove what they
    /// made there. All others start brokers of their own.
    Test {
        /// Also run the slow tests on every version, not on 15 alone
        #[arg(long)]
        all: bool,
        /// Run only the tests whose name contains this (and neither formatting nor lints)
        filter: Option<String>,
    },
    /// Build the extension and install it into a PostgreSQL (15 to 18)
    Install {
        /// The pg_config of that PostgreSQL
        #[arg(long, value_name = "PATH")]
        pg_config: PathBuf,
    },
    /// Run a benchmark and print its table
    Bench {
        /// Which one
        name: String,
        /// Print the result as JSON too, as the last line
        #[arg(long)]
        json: bool,
        /// Arguments of the benchmark itself
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// A development cluster with the extension, the relay and a receiver, until Ctrl-C
    Up {
        /// Arguments of the development cluster itself
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Only the set-up: system packages, the private PostgreSQL servers and the programs of Kafka
    Setup,
}

/// Runs what the command line asks for.
pub fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let workspace = Workspace::open()?;
    match cli.command {
        Command::Demo { keep, kafka } => {
            let flags = [(keep, "--keep"), (kafka, "--kafka")];
            let args = flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.to_owned());
            run::binary(&workspace, "demo", args.collect(), kafka)
        }
        Command::Up { args } => run::binary(&workspace, "up", args, false),
        Command::Bench { name, json, args } => {
            let with_kafka = name == "kafka";
            let mut all = vec![name];
            all.extend(json.then(|| "--json".to_owned()));
            all.extend(args);
            run::binary(&workspace, "bench", all, with_kafka)
        }
        Command::Install { pg_config } => install::run(&workspace, &pg_config),
        Command::Test { all, filter } => test::run(&workspace, all, filter.as_deref()),
        Command::Setup => {
            packages::ensure(&workspace, Purpose::Tests)?;
            for major in server::MAJORS {
                server::prepare(&workspace, major)?;
            }
            kafka::prepare(&workspace)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
