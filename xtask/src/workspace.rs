// SPDX-License-Identifier: PostgreSQL
//! Where things are: the sources, cargo's target directory and the directory of the private servers.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// The directories that every command needs, and whether we are root.
pub struct Workspace {
    /// The top of the sources.
    pub root: PathBuf,
    /// Cargo's target directory: `CARGO_TARGET_DIR` if set.
    pub target: PathBuf,
    /// Private servers and logs.
    pub state: PathBuf,
    /// PostgreSQL refuses to run as root: then it runs as user `postgres`, who must be able to read the servers.
    pub is_root: bool,
}

impl Workspace {
    /// Finds the directories and makes those that are ours.
    pub fn open() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().ok_or("xtask lies outside of a workspace")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(path) => std::path::absolute(&path).map_err(|e| format!("CARGO_TARGET_DIR: {e}"))?,
            None => root.join("target"),
        };
        let is_root = fs::metadata("/proc/self").map_err(|e| format!("/proc/self: {e}"))?.uid() == 0;
        let state = if is_root {
            Path::new("/var/cache/pg_dtm").join(short_hash(root.as_os_str().as_encoded_bytes()))
        } else {
            target.join("pg")
        };
        let workspace = Self { root, target, state, is_root };
        make_dir(&workspace.state.join("log"))?;
        if is_root {
            for dir in [Path::new("/var/cache/pg_dtm"), &workspace.state] {
                command_ok(Command::new("chmod").arg("a+rx").arg(dir))?;
            }
        }
        Ok(workspace)
    }

    /// The log file of a step.
    pub fn log(&self, name: &str) -> PathBuf {
        self.state.join("log").join(format!("{name}.log"))
    }

    /// Waits for other runs in this workspace to be done with the private servers, and keeps them off while it lives.
    pub fn lock(&self) -> Result<File> {
        let path = self.state.join("lock");
        let file = File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        file.lock().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(file)
    }

    /// Lets user `postgres` read a directory that root made.
    pub fn share(&self, dir: &Path) -> Result<()> {
        if self.is_root { command_ok(Command::new("chmod").arg("-R").arg("a+rX").arg(dir)) } else { Ok(()) }
    }
}

/// Makes a directory and its parents.
pub fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))
}

/// Runs a short command whose output matters only if it fails.
pub fn command_ok(command: &mut Command) -> Result<()> {
    command_output(command).map(drop)
}

/// Runs a short command for its output.
pub fn command_output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("cannot run {name}: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name} failed: {}", said.trim().lines().last().unwrap_or("it said nothing")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// FNV-1a: the same for the same path in every version of the compiler, unlike the standard library's hasher.
fn short_hash(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")[..10].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_fnv1a() {
        assert_eq!(short_hash(b""), "cbf29ce484");
        assert_eq!(short_hash(b"a"), "af63dc4c86");
    }
}
