// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask`: builds, installs, starts, tests and measures pg_dtm.

mod apt;
mod cargo;
mod cli;
mod clients;
mod extension;
mod install;
mod job;
mod kafka;
mod packages;
mod pg_config;
mod progress;
mod run;
mod server;
mod suite;
mod tally;
mod test;
mod tree;
mod workspace;

use std::process::ExitCode;

/// What went wrong, in words for the person at the terminal: one line, and what to do about it.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    progress::start();
    match cli::main() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
