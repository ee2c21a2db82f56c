// SPDX-License-Identifier: PostgreSQL
//! A long-running program: its output goes to a log file, its last lines are shown if it fails.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::progress::{say, seconds};
use crate::workspace::Workspace;
use crate::{Result, workspace};

const POLL: Duration = Duration::from_millis(50);
const STILL_THERE: Duration = Duration::from_secs(20);
/// Longer than any step takes: what runs on after this hangs.
const LIMIT: Duration = Duration::from_secs(30 * 60);
const TAIL_LINES: usize = 40;

/// What a program left behind.
pub struct Done {
    /// It ended by itself, with success.
    pub ok: bool,
    /// Standard output and error, as logged.
    pub output: String,
    /// Where that is.
    pub log: PathBuf,
    /// Why it did not end well, in a few words.
    pub why: String,
}

/// Runs `command` to its end with its output in the log `name`.
/// `on_terminal`: standard error goes to the terminal if it is one (programs that show their own progress).
pub fn run(workspace: &Workspace, name: &str, command: &mut Command, on_terminal: bool) -> Result<Done> {
    let log = workspace.log(name);
    let failed = |e: std::io::Error| format!("{}: {e}", log.display());
    let out = File::create(&log).map_err(failed)?;
    let shown = on_terminal && std::io::stderr().is_terminal();
    let err = if shown { Stdio::inherit() } else { Stdio::from(out.try_clone().map_err(failed)?) };
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|e| format!("cannot run {program}: {e}"))?;
    let status = wait(&mut child, (!shown).then_some(log.as_path()))?;
    let bytes = fs::read(&log).map_err(failed)?;
    let (ok, why) = match status {
        Some(status) => (status.success(), format!("{program}: {status}")),
        None => (false, format!("{program} was ended after {}", seconds(LIMIT))),
    };
    Ok(Done { ok, output: String::from_utf8_lossy(&bytes).into_owned(), log, why })
}

/// As [`run`], and a failure shows the end of the log and is an error.
pub fn must(workspace: &Workspace, name: &str, command: &mut Command, on_terminal: bool) -> Result<()> {
    let done = run(workspace, name, command, on_terminal)?;
    if done.ok {
        return Ok(());
    }
    show(&tail(&done.output, TAIL_LINES));
    Err(format!("{} (the whole output is in {})", done.why, done.log.display()))
}

/// Prints lines of a log.
pub fn show(text: &str) {
    for line in text.lines() {
        eprintln!("    {line}");
    }
}

/// The last `count` lines.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Waits for the end, with a sign of life now and then. `None`: it took longer than the limit.
fn wait(child: &mut Child, log: Option<&Path>) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    let mut next_sign = STILL_THERE;
    loop {
        if let Some(status) = child.try_wait().map_err(|e| format!("cannot wait for a program: {e}"))? {
            return Ok(Some(status));
        }
        if start.elapsed() > LIMIT {
            end_with_descendants(child)?;
            return Ok(None);
        }
        if let Some(log) = log
            && start.elapsed() > next_sign
        {
            say(&format!("  ... {}", last_line(log)));
            next_sign += STILL_THERE;
        }
        thread::sleep(POLL);
    }
}

/// Ends a program and what it started: cargo does not pass a signal on to the test it runs.
fn end_with_descendants(child: &mut Child) -> Result<()> {
    let mut family = vec![child.id()];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        family.extend(children(parent));
        next += 1;
    }
    let mut kill = Command::new("kill");
    kill.arg("-KILL").args(family.iter().map(u32::to_string));
    workspace::command_ok(&mut kill)?;
    child.wait().map_err(|e| format!("cannot wait for a program: {e}"))?;
    Ok(())
}

fn children(parent: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// The last line of a growing log that says something, cut to the width of a terminal.
fn last_line(log: &Path) -> String {
    let end = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(4096)))?;
        let mut bytes = Vec::new();
        file.take(4096).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = end().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no output yet");
    line.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\n", 2), "a");
        assert_eq!(tail("", 2), "");
    }
}
