// SPDX-License-Identifier: PostgreSQL
//! What a PostgreSQL says about itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::workspace::command_output;

/// The answers of one `pg_config`.
pub struct PgConfig {
    /// The program.
    pub program: PathBuf,
    /// The major version.
    pub major: u32,
    /// Programs.
    pub bindir: PathBuf,
    /// Where the server looks for libraries of extensions.
    pub pkglibdir: PathBuf,
    /// Where the server looks for control files and SQL of extensions.
    pub extension_dir: PathBuf,
    /// The server's headers; they are a package of their own and may be missing.
    pub include_server: PathBuf,
}

impl PgConfig {
    /// Asks the program at `path`.
    pub fn ask(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(format!("there is no pg_config at {}", path.display()));
        }
        let program = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let ask = |what: &str| command_output(Command::new(&program).arg(what));
        let version = ask("--version")?;
        let major = major(&version)
            .ok_or_else(|| format!("{} names no version of PostgreSQL: {version}", program.display()))?;
        Ok(Self {
            major,
            bindir: ask("--bindir")?.into(),
            pkglibdir: ask("--pkglibdir")?.into(),
            extension_dir: Path::new(&ask("--sharedir")?).join("extension"),
            include_server: ask("--includedir-server")?.into(),
            program,
        })
    }

    /// Whether extensions can be compiled for it.
    pub fn has_headers(&self) -> bool {
        self.include_server.join("postgres.h").is_file()
    }

    /// Whether it lies where Debian's packages put theirs.
    pub fn is_debian(&self) -> bool {
        is_debian(&self.program, self.major)
    }
}

fn is_debian(program: &Path, major: u32) -> bool {
    program == Path::new(&format!("/usr/lib/postgresql/{major}/bin/pg_config"))
}

/// The major version in `PostgreSQL 15.20 (Debian ...)`, `PostgreSQL 18beta1`, `postgres (PostgreSQL) 16.14`.
fn major(version: &str) -> Option<u32> {
    let number = version.split_once("PostgreSQL")?.1.trim_start_matches([')', ' ']);
    let digits = number.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_is_known_by_its_place() {
        assert!(is_debian(Path::new("/usr/lib/postgresql/15/bin/pg_config"), 15));
        assert!(!is_debian(Path::new("/usr/lib/postgresql/15/bin/pg_config"), 16));
        assert!(!is_debian(Path::new("/usr/local/pgsql/bin/pg_config"), 15));
    }

    #[test]
    fn majors() {
        assert_eq!(major("PostgreSQL 15.20 (Debian 15.20-0+deb12u1)"), Some(15));
        assert_eq!(major("PostgreSQL 16.14"), Some(16));
        assert_eq!(major("PostgreSQL 18beta1"), Some(18));
        assert_eq!(major("PostgreSQL 19devel"), Some(19));
        assert_eq!(major("postgres (PostgreSQL) 18.4"), Some(18));
        assert_eq!(major("MySQL 8.0"), None);
        assert_eq!(major("PostgreSQL"), None);
    }
}
