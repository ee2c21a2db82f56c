// SPDX-License-Identifier: PostgreSQL
//! DTM's own clients for the tests, fetched once and compiled where they need it; nothing is installed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::progress::say;
use crate::tree::{is_stamped, make_tree};
use crate::workspace::Workspace;
use crate::{Result, job, packages};

/// The variable that tells a test where they are.
pub const VARIABLE: &str = "DTM_CLIENTS";

/// Python's client, as pip names it.
const PYTHON: &str = "dtmcli==1.7.7.0";

/// What the Go client is compiled from.
const GO_FILES: [&str; 3] = ["go.mod", "go.sum", "main.go"];

/// Makes sure of the clients. Answers their folder: `go` is a program in it, `python` a folder of modules.
pub fn prepare(workspace: &Workspace) -> Result<PathBuf> {
    packages::ensure_go(workspace)?;
    let _lock = workspace.lock()?;
    let tree = workspace.state.join("clients");
    let sources = workspace.root.join("tests/clients/go");
    let mut stamp = PYTHON.to_owned();
    for name in GO_FILES {
        let file = sources.join(name);
        stamp += &fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    if !is_stamped(&tree, &stamp) {
        say("fetching DTM's clients");
        make_tree(workspace, &tree, &stamp, |new| {
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--target"]).arg(new.join("python")).arg(PYTHON);
            job::must(workspace, "pip-clients", &mut pip, false)?;
            let mut go = Command::new("go");
            go.current_dir(&sources).args(["build", "-o"]).arg(new.join("go")).arg(".");
            job::must(workspace, "go-client", &mut go, false)
        })?;
    }
    Ok(tree)
}
