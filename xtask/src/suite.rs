// SPDX-License-Identifier: PostgreSQL
//! The test programs of the kit: compiled once, run against each server.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::cargo::{self, Programs};
use crate::job;
use crate::run::environment;
use crate::server::Server;
use crate::workspace::Workspace;

/// The compiled test programs.
pub struct Suites {
    found: Vec<(String, PathBuf)>,
}

impl Suites {
    /// Compiles them, optimised as the relay is, so that both share what they depend on.
    pub fn build(workspace: &Workspace) -> Result<Self> {
        let mut build = cargo::command(workspace);
        build.args(["test", "--release", "-p", "dtm-tests", "--tests", "--no-run"]);
        let done = job::run(workspace, "build-tests", &mut build, false)?;
        if !done.ok {
            job::show(&job::tail(&done.output, 60));
            return Err(format!("the tests do not compile (the whole output is in {})", done.log.display()));
        }
        Ok(Self { found: executables(&done.output, &workspace.root) })
    }

    /// One of them, to be run with this server.
    pub fn command(
        &self,
        name: &str,
        workspace: &Workspace,
        server: &Server,
        programs: &Programs,
    ) -> Result<Command> {
        let found = self.found.iter().find(|(source, _)| source == name);
        let (_, path) = found.ok_or_else(|| format!("cargo named no test program {name}"))?;
        let mut command = Command::new(path);
        command.current_dir(workspace.root.join("tests"));
        environment(&mut command, workspace, server, programs);
        Ok(command)
    }
}

/// Reads cargo's lines `Executable tests/quick/main.rs (target/release/deps/quick-0123)`.
fn executables(output: &str, root: &Path) -> Vec<(String, PathBuf)> {
    let lines = output.lines().filter_map(|line| line.trim().strip_prefix("Executable tests/"));
    lines
        .filter_map(|line| {
            let (source, path) = line.split_once(" (")?;
            let name = source.trim_end_matches("/main.rs").trim_end_matches(".rs");
            Some((name.to_owned(), root.join(path.strip_suffix(')')?)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_by_their_sources() {
        let output = "   Compiling dtm-tests\n  Executable unittests src/lib.rs (target/release/deps/dtm_tests-1)\n  \
                      Executable tests/isolation.rs (target/release/deps/isolation-2)\n  \
                      Executable tests/quick/main.rs (/t/release/deps/quick-3)\n";
        let found = executables(output, Path::new("/w"));
        let expected = [
            ("isolation".to_owned(), PathBuf::from("/w/target/release/deps/isolation-2")),
            ("quick".to_owned(), PathBuf::from("/t/release/deps/quick-3")),
        ];
        assert_eq!(found, expected);
    }
}
