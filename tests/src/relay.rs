// SPDX-License-Identifier: PostgreSQL
//! The relay as a process of its own, that can be asked to end, stopped and killed.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process;

const END_DEADLINE: Duration = Duration::from_secs(30);

/// The name of a configuration file in a relay's own folder.
const CONFIGURATION: &str = "relay.toml";

/// The program under test.
pub fn program() -> PathBuf {
    std::env::var_os("DTM_RELAY").map(PathBuf::from).expect("DTM_RELAY is not set: run this by cargo xtask")
}

/// Runs a command of the relay that ends by itself. Answers whether it succeeded, and all that it printed.
pub fn run(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program()).args(arguments).output().expect("dtm-relay");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
}

/// A relay process. Dropping it kills it.
pub struct Relay {
    child: Option<Child>,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    log: PathBuf,
    folder: TempDir,
}

impl Relay {
    /// Starts `dtm-relay run` for one database.
    pub fn start(database_url: &str) -> Relay {
        Relay::start_with(&["--database-url", database_url])
    }

    /// Starts `dtm-relay run` with a configuration file of this text.
    pub fn start_configured(toml: &str) -> Relay {
        Relay::start_configured_with(toml, &[])
    }

    /// Starts `dtm-relay run` with a configuration file of this text and these variables of the environment.
    pub fn start_configured_with(toml: &str, variables: &[(&str, &str)]) -> Relay {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join(CONFIGURATION);
        std::fs::write(&file, toml).expect("a configuration file");
        Relay::spawned(vec!["--config".to_owned(), file.display().to_string()], variables, folder)
    }

    /// Gives it a configuration file of another text, which counts from its next start on.
    pub fn configure(&self, toml: &str) {
        std::fs::write(self.folder.path().join(CONFIGURATION), toml).expect("a configuration file");
    }

    /// Starts `dtm-relay run` with these arguments.
    pub fn start_with(arguments: &[&str]) -> Relay {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Relay::spawned(arguments.iter().map(|argument| (*argument).to_owned()).collect(), &[], folder)
    }

    fn spawned(arguments: Vec<String>, variables: &[(&str, &str)], folder: TempDir) -> Relay {
        let log = folder.path().join("relay.log");
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables = variables.iter().map(owned).collect();
        let mut relay = Relay { child: None, arguments, variables, log, folder };
        relay.restart();
        relay
    }

    /// Starts the process again after it has ended; its log goes on.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "the relay runs already");
        let log = File::options().create(true).append(true).open(&self.log).expect("the log");
        let errors = log.try_clone().expect("the log");
        let mut command = Command::new(program());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.arg("run").args(&self.arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
        self.child = Some(command.spawn().expect("dtm-relay"));
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running relay").id()
    }

    /// Asks it to end (SIGTERM) and waits for it.
    pub async fn terminate(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("a running relay");
        process::signal(child.id(), Signal::TERM);
        let Some(status) = process::wait(&mut child, END_DEADLINE).await else {
            child.kill().ok();
            panic!("the relay did not end:\n{}", self.log());
        };
        status
    }

    /// Waits for it to end by itself.
    pub async fn ended(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let status = process::wait(self.child.as_mut().expect("a running relay"), deadline).await;
        if status.is_some() {
            self.child = None;
        }
        status
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("a running relay");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// SIGSTOP: it is there and does nothing.
    pub fn pause(&self) {
        process::signal(self.pid(), Signal::STOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        process::signal(self.pid(), Signal::CONT);
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has logged a text.
    pub async fn wait_for_log(&self, text: &str) {
        let found = process::holds_within(END_DEADLINE, || self.log().contains(text)).await;
        assert!(found, "the relay did not log {text:?}:\n{}", self.log());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().rev().nth(6_000).map_or(0, |(at, _)| at);
            eprintln!("--- the relay's log, its end:\n{}", &log[from..]);
        }
    }
}
