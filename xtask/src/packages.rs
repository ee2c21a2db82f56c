// SPDX-License-Identifier: PostgreSQL
//! The system packages that pg_dtm is built and tested with: which are missing, and who can install them.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::pg_config::PgConfig;
use crate::progress::say;
use crate::workspace::{Workspace, command_ok};
use crate::{apt, cargo, job};

/// What a command is going to do. Each includes those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Compile the extension for a PostgreSQL that is there.
    Extension,
    /// Compile the relay too, and run both with a private PostgreSQL 15.
    Server,
    /// Run the tests: also PostgreSQL 16 and 18, and PgBouncer.
    Tests,
}

/// A package, by its name in Debian.
struct Package {
    name: &'static str,
    needed_for: Purpose,
    is_here: fn() -> bool,
}

/// Judged by what they contain, so that a compiler or a server from elsewhere counts too.
const PACKAGES: &[Package] = &[
    Package { name: "gcc", needed_for: Purpose::Extension, is_here: || program("cc") },
    Package { name: "libc6-dev", needed_for: Purpose::Extension, is_here: || file("/usr/include/stdio.h") },
    Package { name: "pkg-config", needed_for: Purpose::Extension, is_here: || program("pkg-config") },
    Package { name: "clang", needed_for: Purpose::Extension, is_here: || program("clang") },
    Package { name: "libclang-dev", needed_for: Purpose::Extension, is_here: libclang },
    // The relay's Kafka client is C, with some C++ that is compiled with it.
    Package { name: "g++", needed_for: Purpose::Server, is_here: || program("c++") },
    Package { name: "make", needed_for: Purpose::Server, is_here: || program("make") },
    Package { name: "libssl-dev", needed_for: Purpose::Server, is_here: || library("openssl") },
    Package { name: "zlib1g-dev", needed_for: Purpose::Server, is_here: || library("zlib") },
    Package { name: "libcurl4-openssl-dev", needed_for: Purpose::Server, is_here: || library("libcurl") },
    Package {
        name: "postgresql-15",
        needed_for: Purpose::Server,
        is_here: || file("/usr/lib/postgresql/15/bin/postgres"),
    },
    Package {
        name: "postgresql-server-dev-15",
        needed_for: Purpose::Server,
        is_here: || file("/usr/include/postgresql/15/server/postgres.h"),
    },
    Package {
        name: "pgbouncer",
        needed_for: Purpose::Tests,
        is_here: || program("pgbouncer") || file("/usr/sbin/pgbouncer"),
    },
    Package { name: "python3", needed_for: Purpose::Tests, is_here: || program("python3") },
    Package { name: "python3-pip", needed_for: Purpose::Tests, is_here: pip },
];

/// Makes sure that everything for `purpose` is there: installs it if we are root and have apt, else says what to run.
/// Under root also makes sure of a user `postgres`, because PostgreSQL refuses to run as root.
pub fn ensure(workspace: &Workspace, purpose: Purpose) -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|package| package.needed_for <= purpose && !(package.is_here)())
        .map(|package| package.name)
        .collect();
    if !missing.is_empty() {
        provide(workspace, &missing)?;
    }
    if workspace.is_root && purpose >= Purpose::Server {
        ensure_user()?;
    }
    Ok(())
}

/// Makes sure of what a Kafka of our own is fetched and run with.
pub fn ensure_kafka(workspace: &Workspace) -> Result<()> {
    let missing: Vec<&str> = [("java", "default-jre-headless"), ("mvn", "maven")]
        .into_iter()
        .filter(|(name, _)| !program(name))
        .map(|(_, package)| package)
        .collect();
    if missing.is_empty() { Ok(()) } else { provide(workspace, &missing) }
}

/// Makes sure of the compiler of DTM's Go client.
pub fn ensure_go(workspace: &Workspace) -> Result<()> {
    if program("go") { Ok(()) } else { provide(workspace, &["golang-go"]) }
}

/// Makes sure of the headers that extensions are compiled with, where the PostgreSQL is Debian's: elsewhere it is not known
/// what they are called.
pub fn ensure_headers(workspace: &Workspace, pg_config: &PgConfig) -> Result<()> {
    if pg_config.has_headers() || !pg_config.is_debian() {
        return Ok(());
    }
    provide(workspace, &[&format!("postgresql-server-dev-{}", pg_config.major)])
}

/// Makes sure of the parts of the Rust toolchain that a minimal one lacks.
pub fn ensure_components(workspace: &Workspace) -> Result<()> {
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(program, _)| command_ok(cargo::command(workspace).args([program, "--version"])).is_err())
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !program("rustup") {
        return Err(format!(
            "parts of the Rust toolchain are missing, install them with: rustup component add {}",
            missing.join(" ")
        ));
    }
    say(&format!("installing {}", missing.join(", ")));
    let mut rustup = Command::new("rustup");
    rustup.current_dir(&workspace.root).args(["component", "add"]).args(missing);
    job::must(workspace, "rustup", &mut rustup, true)
}

fn provide(workspace: &Workspace, missing: &[&str]) -> Result<()> {
    if !program("apt-get") {
        return Err(format!(
            "missing on this machine (by their names in Debian), install them first: {}",
            missing.join(", ")
        ));
    }
    if !workspace.is_root {
        return Err(format!("system packages are missing, install them with: {}", apt::by_hand(missing)));
    }
    apt::install(workspace, missing)
}

fn ensure_user() -> Result<()> {
    if command_ok(Command::new("id").arg("-u").arg("postgres")).is_ok() {
        return Ok(());
    }
    command_ok(Command::new("useradd").args(["--system", "--shell", "/bin/sh", "postgres"]))
        .map_err(|e| format!("no user postgres to run PostgreSQL as (it refuses root): {e}"))
}

/// Whether a program is in the PATH.
pub fn program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Whether a C library can be compiled with.
fn library(name: &str) -> bool {
    command_ok(Command::new("pkg-config").args(["--exists", name])).is_ok()
}

fn file(path: &str) -> bool {
    Path::new(path).is_file()
}

/// The library that reads PostgreSQL's headers, where Debian and others put it.
fn libclang() -> bool {
    if std::env::var_os("LIBCLANG_PATH").is_some() {
        return true;
    }
    let versions = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut dirs: Vec<_> = versions
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("llvm"))
        .map(|entry| entry.path().join("lib"))
        .collect();
    dirs.extend(["/usr/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu"].map(Into::into));
    dirs.iter().any(|dir| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).any(|name| is_libclang(&name.to_string_lossy()))
    })
}

fn is_libclang(name: &str) -> bool {
    let versioned = name.starts_with("libclang-") && !name.starts_with("libclang-cpp");
    (versioned || name.starts_with("libclang.")) && name.contains(".so")
}

fn pip() -> bool {
    command_ok(Command::new("python3").args(["-m", "pip", "--version"])).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libclang_by_its_names() {
        for name in ["libclang.so", "libclang.so.1", "libclang-14.so.1", "libclang-14.so"] {
            assert!(is_libclang(name), "{name}");
        }
        for name in ["libclang-cpp.so.14", "libclangBasic.a", "libclang_rt.so", "libclang-14.a"] {
            assert!(!is_libclang(name), "{name}");
        }
    }
}
