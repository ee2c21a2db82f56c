// SPDX-License-Identifier: PostgreSQL
//! The extension's files: compiled for one PostgreSQL, its SQL put together, all of it put where the server looks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::cargo;
use crate::job;
use crate::pg_config::PgConfig;
use crate::progress::say;
use crate::server::Server;
use crate::workspace::{Workspace, make_dir};

/// The versions that the extension can be compiled for.
pub const SUPPORTED: std::ops::RangeInclusive<u32> = 15..=18;

/// Compiles the library with the headers of `server` and installs it there.
pub fn install(workspace: &Workspace, server: &Server) -> Result<()> {
    let major = server.pg_config.major;
    if !SUPPORTED.contains(&major) {
        return Err(format!("PostgreSQL {major} is not supported: 15 to 18 are"));
    }
    if !server.headers.has_headers() {
        return Err(format!(
            "the headers of PostgreSQL {major} are missing in {}: install them (Debian: postgresql-server-dev-{major})",
            server.headers.include_server.display()
        ));
    }
    let library = compile(workspace, &server.headers)?;
    // Of other bytes and another inode than a library that a server has loaded: that one goes on with the old.
    put(&library, &server.pg_config.pkglibdir.join("pg_dtm.so"))?;
    for (name, text) in scripts(&workspace.root)? {
        put_text(&text, &server.pg_config.extension_dir.join(name))?;
    }
    put(
        &workspace.root.join("extension/pg_dtm.control"),
        &server.pg_config.extension_dir.join("pg_dtm.control"),
    )
}

fn compile(workspace: &Workspace, headers: &PgConfig) -> Result<PathBuf> {
    let major = headers.major;
    say(&format!("compiling the extension for PostgreSQL {major}"));
    // One folder for each: they would compile the bindings anew at every change from one to another.
    let target = workspace.target.join(format!("pg{major}"));
    let mut build = cargo::command(workspace);
    build
        .args([
            "build",
            "--profile",
            "extension",
            "-p",
            "pg_dtm",
            "--features",
            &format!("pg{major}"),
            "--target-dir",
        ])
        .arg(&target)
        .env("PGRX_PG_CONFIG_PATH", &headers.program);
    job::must(workspace, &format!("build-pg{major}"), &mut build, true)?;
    Ok(target.join("extension/libpg_dtm.so"))
}

/// The SQL files of an installation, by name: the newest version in one piece, the steps up to it, and the older versions.
fn scripts(root: &Path) -> Result<Vec<(String, String)>> {
    let version = default_version(&read(&root.join("extension/pg_dtm.control"))?)?;
    let mut newest = String::new();
    for path in sql_files(&root.join("sql/install"))? {
        newest += &read(&path)?;
    }
    let newest_name = format!("pg_dtm--{version}.sql");
    let mut scripts = Vec::new();
    for folder in ["sql/released", "sql/upgrade"] {
        for path in sql_files(&root.join(folder))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = with_includes(root, &read(&path)?)?;
            if name == newest_name && text != newest {
                return Err(format!(
                    "sql/install differs from {folder}/{name}, which is released and stays as it is: \
                     raise default_version in extension/pg_dtm.control and write sql/upgrade/pg_dtm--{version}--NEXT.sql"
                ));
            }
            scripts.push((name, text));
        }
    }
    scripts.push((newest_name, newest));
    Ok(scripts)
}

/// A step of an upgrade says `\include install/NAME.sql` where it makes all that this file makes.
fn with_includes(root: &Path, text: &str) -> Result<String> {
    text.split_inclusive('\n')
        .map(|line| match line.strip_prefix("\\include ") {
            Some(name) => read(&root.join("sql").join(name.trim_end())),
            None => Ok(line.to_owned()),
        })
        .collect()
}

fn default_version(control: &str) -> Result<String> {
    control
        .lines()
        .find_map(|line| line.strip_prefix("default_version = '")?.strip_suffix('\''))
        .map(str::to_owned)
        .ok_or_else(|| "extension/pg_dtm.control names no default_version".to_owned())
}

/// The SQL files of a folder in the order of their names; none where there is no such folder.
fn sql_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn put(from: &Path, to: &Path) -> Result<()> {
    put_with(to, |new| fs::copy(from, new).map(drop))
}

fn put_text(text: &str, to: &Path) -> Result<()> {
    put_with(to, |new| fs::write(new, text))
}

/// Writes a file beside its place and moves it there whole.
fn put_with(to: &Path, write: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let folder = to.parent().ok_or("a file has a folder")?;
    make_dir(folder)?;
    let new = to.with_extension("new");
    // Whatever the umask: the server runs as another user.
    let readable = || fs::set_permissions(&new, fs::Permissions::from_mode(0o644));
    write(&new).and_then(|()| readable()).and_then(|()| fs::rename(&new, to)).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!("{} may not be written to by you; try again as root", folder.display())
        }
        _ => format!("cannot write {}: {e}", to.display()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_is_installed() {
        assert_eq!(default_version("comment = 'x'\ndefault_version = '0.1'\n").as_deref(), Ok("0.1"));
        assert!(default_version("comment = 'x'\n").is_err());
    }

    #[test]
    fn a_released_version_is_what_it_was() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let scripts = scripts(&root).expect("the workspace's own scripts agree with what is released");
        assert!(scripts.iter().all(|(name, text)| name.starts_with("pg_dtm--") && !text.is_empty()));
    }

    #[test]
    fn an_include_is_replaced_by_the_file() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let file = read(&root.join("sql/install/03-publish.sql")).expect("a file");
        let text = with_includes(&root, "SELECT 1;\n\\include install/03-publish.sql\nSELECT 2;\n");
        assert_eq!(text, Ok(format!("SELECT 1;\n{file}SELECT 2;\n")));
        assert!(with_includes(&root, "\\include install/none.sql\n").is_err());
    }
}
