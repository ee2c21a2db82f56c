// SPDX-License-Identifier: PostgreSQL
//! Calls of cargo for the workspace's own crates.

use std::path::PathBuf;
use std::process::Command;

use crate::Result;
use crate::job;
use crate::workspace::Workspace;

/// cargo, in the top of the sources.
pub fn command(workspace: &Workspace) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&workspace.root).env("CARGO_TARGET_DIR", &workspace.target);
    command
}

/// Compiles the relay and programs of the kit as users run them, optimised.
pub fn build_programs(workspace: &Workspace, programs: &[&str]) -> Result<Programs> {
    let mut build = command(workspace);
    build.args(["build", "--release", "-p", "dtm-relay", "-p", "dtm-tests", "--bin", "dtm-relay"]);
    for program in programs {
        build.args(["--bin", program]);
    }
    job::must(workspace, "build-programs", &mut build, true)?;
    Ok(Programs { dir: workspace.target.join("release") })
}

/// Where the compiled programs are.
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// The path of one of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}
