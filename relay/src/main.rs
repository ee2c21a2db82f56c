// SPDX-License-Identifier: PostgreSQL
//! The relay's binary: reads the command line and the configuration, and does what they say.

use std::process::ExitCode;

use clap::Parser as _;
use dtm_relay::cli::{Cli, Command};
use dtm_relay::config::Config;
use dtm_relay::{adopt, check, daemon, logging};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    match &cli.command {
        Command::Run(_) => runtime.block_on(daemon::run(config)),
        Command::Check(_) => Ok(runtime.block_on(check::run(&config))),
        Command::Adopt(args) => Ok(runtime.block_on(adopt::run(&config, args.database.as_deref()))?),
    }
}
