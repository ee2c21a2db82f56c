// SPDX-License-Identifier: PostgreSQL
//! `cargo xtask install`: the extension into a PostgreSQL of the user's.

use std::path::Path;
use std::process::ExitCode;

use crate::Result;
use crate::extension;
use crate::packages::{self, Purpose};
use crate::pg_config::PgConfig;
use crate::progress::say;
use crate::server::Server;
use crate::workspace::Workspace;

/// Installs into the PostgreSQL that `pg_config` belongs to. It is not restarted.
pub fn run(workspace: &Workspace, pg_config: &Path) -> Result<ExitCode> {
    let server = Server { pg_config: PgConfig::ask(pg_config)?, headers: PgConfig::ask(pg_config)? };
    packages::ensure(workspace, Purpose::Extension)?;
    packages::ensure_headers(workspace, &server.headers)?;
    extension::install(workspace, &server)?;
    say(&format!(
        "installed into PostgreSQL {} ({}); next, in a database: CREATE EXTENSION pg_dtm;",
        server.pg_config.major,
        server.pg_config.pkglibdir.display()
    ));
    say("a server that has the library preloaded goes on with the old one until it is restarted");
    Ok(ExitCode::SUCCESS)
}
