// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask test`: everything that CI runs, with one line for each step and a sum at the end.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::Result;
use crate::cargo;
use crate::clients;
use crate::extension;
use crate::job;
use crate::kafka;
use crate::packages::{self, Purpose};
use crate::progress::say;
use crate::server::{self, DEBIAN_MAJOR, MAJORS};
use crate::suite::Suites;
use crate::tally::Tally;
use crate::workspace::Workspace;

const TAIL_LINES: usize = 150;

/// Runs everything, or the tests whose names contain `filter`. `all`: the slow tests on every version.
pub fn run(workspace: &Workspace, all: bool, filter: Option<&str>) -> Result<ExitCode> {
    packages::ensure(workspace, Purpose::Tests)?;
    if filter.is_none() {
        packages::ensure_components(workspace)?;
    }
    let mut report = Report { workspace, tally: Tally::default() };
    if filter.is_none() {
        report.lints()?;
    }
    report.unit_tests(filter)?;
    report.servers(all, filter)?;
    // The last line, which says it all.
    println!("{} passed, {} failed", report.tally.passed, report.tally.failed);
    Ok(if report.tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Report<'a> {
    workspace: &'a Workspace,
    tally: Tally,
}

impl Report<'_> {
    fn lints(&mut self) -> Result<()> {
        let mut fmt = cargo::command(self.workspace);
        self.step("fmt", fmt.args(["fmt", "--all", "--check"]))?;
        let mut clippy = cargo::command(self.workspace);
        self.step("clippy", clippy.args(["clippy", "--all-targets", "--", "-D", "warnings"]))?;
        let server = server::prepare(self.workspace, DEBIAN_MAJOR)?;
        let mut clippy = cargo::command(self.workspace);
        clippy
            .args(["clippy", "-p", "pg_dtm", "--features", &format!("pg{DEBIAN_MAJOR}"), "--target-dir"])
            .arg(self.workspace.target.join(format!("pg{DEBIAN_MAJOR}")))
            .args(["--", "-D", "warnings"])
            .env("PGRX_PG_CONFIG_PATH", &server.headers.program);
        self.step("clippy-extension", &mut clippy)
    }

    fn unit_tests(&mut self, filter: Option<&str>) -> Result<()> {
        let mut unit = cargo::command(self.workspace);
        unit.args([
            "test",
            "-p",
            "dtm-core",
            "-p",
            "dtm-relay",
            "-p",
            "dtm-tests",
            "-p",
            "xtask",
            "--lib",
            "--bins",
        ]);
        unit.args(["--no-fail-fast", "--"]).args(filter);
        self.tests("unit tests", &mut unit)
    }

    fn servers(&mut self, all: bool, filter: Option<&str>) -> Result<()> {
        say("compiling the relay and the tests");
        let programs = cargo::build_programs(self.workspace, &[])?;
        let suites = Suites::build(self.workspace)?;
        let kafka = kafka::prepare(self.workspace)?;
        let clients = clients::prepare(self.workspace)?;
        let mut older: Vec<PathBuf> = Vec::new();
        for major in MAJORS {
            let server = server::prepare(self.workspace, major)?;
            extension::install(self.workspace, &server)?;
            for suite in ["isolation", "quick", "slow"] {
                if suite == "slow" && major != DEBIAN_MAJOR && !all {
                    continue;
                }
                let mut command = suites.command(suite, self.workspace, &server, &programs)?;
                command.env(kafka::VARIABLE, &kafka).env(clients::VARIABLE, &clients).env(
                    "DTM_PG_OLDER_BINS",
                    std::env::join_paths(&older).map_err(|error| error.to_string())?,
                );
                self.tests(&format!("{suite} tests on PostgreSQL {major}"), command.args(filter))?;
            }
            older.push(server.pg_config.bindir);
        }
        Ok(())
    }

    fn step(&mut self, name: &str, command: &mut Command) -> Result<()> {
        say(name);
        let done = job::run(self.workspace, name, command, false)?;
        self.tally += Tally::of_step(done.ok);
        self.failure(name, &done);
        Ok(())
    }

    fn tests(&mut self, name: &str, command: &mut Command) -> Result<()> {
        say(name);
        let done = job::run(self.workspace, &name.replace(' ', "-"), command, false)?;
        let tally = Tally::of_output(&done.output, done.ok);
        say(&format!("  {} passed, {} failed", tally.passed, tally.failed));
        self.tally += tally;
        self.failure(name, &done);
        Ok(())
    }

    fn failure(&self, name: &str, done: &job::Done) {
        if !done.ok {
            job::show(&job::tail(&done.output, TAIL_LINES));
            say(&format!("FAILED: {name} ({}; the whole output is in {})", done.why, done.log.display()));
        }
    }
}
