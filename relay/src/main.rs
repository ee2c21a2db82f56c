// SPDX-License-Identifier: PostgreSQL
//! The relay's binary: reads the command line and the configuration, and does what they say.

use std::process::ExitCode;

use clap::Parser as _;
use dtm_relay::cli::{Cli, Command, DeadLettersCommand};
use dtm_relay::config::Config;
use dtm_relay::operate::{self, Change, Deed};
use dtm_relay::{adopt, check, daemon, logging};

// The whole process allocates by it, librdkafka too: records that one thread makes and another one frees are what the system's
// allocator is slow at, and what it keeps memory for.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match work(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dtm-relay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(cli: &Cli) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = Config::load(&cli.overrides())?;
    logging::init(&config)?;
    // Most of the work of an event is done on one core; a second one keeps databases and endpoints apart.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(config.threads).enable_all().build()?;
    runtime.block_on(async {
        Ok(match &cli.command {
            Command::Run(_) => daemon::run(config).await?,
            Command::Check(_) => check::run(&config).await,
            Command::Adopt(args) => adopt::run(&config, args.database.as_deref()).await?,
            Command::Status(output) => operate::status(&config, output).await?,
            Command::DeadLetters(DeadLettersCommand::List(listed)) => operate::list(&config, listed).await?,
            Command::DeadLetters(DeadLettersCommand::Redrive(which)) => {
                operate::deal(&config, Deed::Redrive, which).await?
            }
            Command::DeadLetters(DeadLettersCommand::Discard(which)) => {
                operate::deal(&config, Deed::Discard, which).await?
            }
            Command::Pause(changed) => operate::change(&config, Change::Pause, changed).await?,
            Command::Resume(changed) => operate::change(&config, Change::Resume, changed).await?,
            Command::Rewind(args) => operate::rewind(&config, &args.changed, &args.to).await?,
        })
    })
}
