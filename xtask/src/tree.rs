// SPDX-License-Identifier: PostgreSQL
//! Directories that are whole or not there: what is fetched or copied once and used by many runs.

use std::fs;
use std::path::Path;

use crate::Result;
use crate::workspace::{Workspace, make_dir};

/// Fills a new directory beside `tree` and puts it into its place when it is whole.
pub fn make_tree(
    workspace: &Workspace,
    tree: &Path,
    stamp: &str,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let new = tree.with_extension("new");
    remove(&new)?;
    make_dir(&new)?;
    fill(&new)?;
    fs::write(new.join("stamp"), stamp).map_err(|e| format!("{}: {e}", new.display()))?;
    workspace.share(&new)?;
    remove(tree)?;
    fs::rename(&new, tree).map_err(|e| format!("{}: {e}", tree.display()))
}

/// Whether a directory is there that was made with this stamp.
pub fn is_stamped(tree: &Path, stamp: &str) -> bool {
    fs::read_to_string(tree.join("stamp")).is_ok_and(|found| found == stamp)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", dir.display())),
        _ => Ok(()),
    }
}
