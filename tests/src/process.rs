// SPDX-License-Identifier: PostgreSQL
//! Processes of the kit: servers that refuse root run as the user `postgres`; every wait has a deadline.

use std::future::Future;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The user and group that servers run as; none if we are not root and can run them ourselves.
fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let entry =
        passwd.lines().find(|line| line.starts_with("postgres:")).expect("a user postgres to run servers as");
    let fields: Vec<&str> = entry.split(':').collect();
    Some((fields[2].parse().expect("uid"), fields[3].parse().expect("gid")))
}

/// A command that runs as the servers' user.
pub fn server_command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    if let Some((uid, gid)) = server_user() {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/");
    command
}

/// Gives a file or folder to the servers' user.
pub fn give_to_server(path: &Path) {
    if let Some((uid, gid)) = server_user() {
        chown(path, Some(uid), Some(gid)).unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    }
}

/// Runs a command to its end; panics with its output if it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process id");
    kill_process(pid, signal).ok();
}

/// Waits for a child to end by itself.
pub async fn wait(child: &mut Child, deadline: Duration) -> Option<std::process::ExitStatus> {
    let mut status = None;
    let ended = || {
        status = child.try_wait().expect("wait");
        status.is_some()
    };
    holds_within(deadline, ended).await.then_some(status).flatten()
}

/// The greatest memory of a process so far, in MB.
pub fn peak_mb(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// Whether a condition comes to hold before the deadline.
pub async fn holds_within(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    eventually(deadline, || std::future::ready(condition().then_some(()))).await.is_some()
}

/// What an attempt answers once it answers something; none if it does not before the deadline.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    deadline: Duration,
    mut attempt: impl FnMut() -> F,
) -> Option<T> {
    let until = Instant::now() + deadline;
    loop {
        if let Some(answer) = attempt().await {
            return Some(answer);
        }
        if Instant::now() >= until {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
