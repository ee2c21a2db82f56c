// SPDX-License-Identifier: PostgreSQL
//! Programs of the kit that run on a private server: the demo, the development cluster, the benchmarks.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::Result;
use crate::cargo::{self, Programs};
use crate::extension;
use crate::kafka;
use crate::packages::{self, Purpose};
use crate::progress::say;
use crate::server::{self, DEBIAN_MAJOR, Server};
use crate::workspace::Workspace;

/// Builds everything that `name` needs and runs it on this terminal. `with_kafka`: it starts an Apache Kafka.
pub fn binary(workspace: &Workspace, name: &str, args: Vec<String>, with_kafka: bool) -> Result<ExitCode> {
    packages::ensure(workspace, Purpose::Server)?;
    let kafka = if with_kafka { Some(kafka::prepare(workspace)?) } else { None };
    let server = server::prepare(workspace, DEBIAN_MAJOR)?;
    extension::install(workspace, &server)?;
    say("compiling the relay");
    let programs = cargo::build_programs(workspace, &[name, "receiver", "poster"])?;
    say(&format!("starting: {name}"));
    let mut command = Command::new(programs.path(name));
    command.args(args);
    environment(&mut command, workspace, &server, &programs);
    command.envs(kafka.map(|folder| (kafka::VARIABLE, folder)));
    // In our place, so that Ctrl-C reaches it alone and the terminal is its until it has tidied up.
    Err(format!("cannot run {name}: {}", command.exec()))
}

/// Tells a program of the kit where the server and the other programs are.
pub fn environment(command: &mut Command, workspace: &Workspace, server: &Server, programs: &Programs) {
    command
        .env("DTM_PG_BIN", &server.pg_config.bindir)
        .env("DTM_PG_MAJOR", server.pg_config.major.to_string())
        .env("DTM_RELAY", programs.path("dtm-relay"))
        .env("DTM_RECEIVER", programs.path("receiver"))
        .env("DTM_POSTER", programs.path("poster"))
        .env("DTM_UP_DIR", up_dir(&workspace.state))
        .env("DTM_ISOLATIONTESTER", server.isolationtester());
}

fn up_dir(state: &Path) -> std::path::PathBuf {
    state.join("up")
}
