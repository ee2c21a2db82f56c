// SPDX-License-Identifier: PostgreSQL
//! A PostgreSQL cluster of its own for a test: made, crashed, restarted and removed by it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::port;
use crate::process::{self, server_command};

const START_DEADLINE: Duration = Duration::from_secs(60);

/// How many ports are tried: another process can take one between its choice and the server's start.
const PORTS_TRIED: usize = 5;

/// The folder of the server's programs: the tree that `cargo xtask` made, with the extension installed.
pub fn bin_dir() -> PathBuf {
    std::env::var_os("DTM_PG_BIN").map(PathBuf::from).expect("DTM_PG_BIN is not set: run this by cargo xtask")
}

/// The folders of the programs of older versions that are there, with the extension installed.
pub fn older_bin_dirs() -> Vec<PathBuf> {
    let all = std::env::var_os("DTM_PG_OLDER_BINS").filter(|all| !all.is_empty());
    all.map_or_else(Vec::new, |all| std::env::split_paths(&all).collect())
}

/// How a cluster is to be.
pub struct Builder {
    config: Vec<(String, String)>,
    at: Option<PathBuf>,
    bin: PathBuf,
}

/// A running (or crashed) cluster. Dropping it stops and removes it.
pub struct Cluster {
    // Before the folder: the server has to be gone when that is removed.
    server: Option<Child>,
    bin: PathBuf,
    data: PathBuf,
    sockets: PathBuf,
    log: PathBuf,
    port: u16,
    _folder: TempDir,
}

impl Builder {
    /// A line of postgresql.conf.
    pub fn config(mut self, name: &str, value: &str) -> Self {
        self.config.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Loads the library at the server's start, so that commits wake the relay.
    pub fn preload(self) -> Self {
        self.config("shared_preload_libraries", "pg_dtm")
    }

    /// Takes the server's programs from another folder than [`bin_dir`].
    pub fn bin(mut self, folder: &Path) -> Self {
        self.bin = folder.to_owned();
        self
    }

    /// Keeps the cluster in this folder, and takes it up again if it is there.
    pub fn at(mut self, folder: &Path) -> Self {
        self.at = Some(folder.to_owned());
        self
    }

    /// Makes and starts a standby in a folder of its own that follows a primary. What a standby must not have less of than its
    /// primary is to be configured.
    pub async fn start_standby(self, primary: &Cluster, folder: &Path) -> Cluster {
        process::give_to_server(folder);
        let mut backup = server_command(bin_dir().join("pg_basebackup"));
        backup
            .args(["-h", "127.0.0.1", "-U", "postgres", "-c", "fast", "-R", "-p"])
            .arg(primary.port().to_string());
        process::run(backup.arg("-D").arg(folder.join("data")));
        let follow = format!("host=127.0.0.1 port={} user=postgres", primary.port());
        self.config("primary_conninfo", &follow).at(folder).start().await
    }

    /// Makes the cluster and starts it.
    pub async fn start(self) -> Cluster {
        // Not in a folder that is kept: the path of a socket is 107 bytes long at the most.
        let temporary = temporary_folder();
        let root = self.at.clone().unwrap_or_else(|| temporary.path().to_owned());
        let mut cluster = Cluster {
            server: None,
            bin: self.bin.clone(),
            data: root.join("data"),
            sockets: temporary.path().join("s"),
            log: root.join("log"),
            port: 0,
            _folder: temporary,
        };
        for folder in [&root, &cluster.sockets] {
            std::fs::create_dir_all(folder).expect("a folder");
            process::give_to_server(folder);
        }
        if !cluster.data.join("PG_VERSION").exists() {
            let initdb = self.bin.join("initdb");
            let flags =
                ["-k", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"];
            process::run(server_command(initdb).args(flags).arg(&cluster.data));
        }
        for _ in 0..PORTS_TRIED {
            cluster.configure(&self.config);
            if cluster.try_start().await.is_ok() {
                return cluster;
            }
        }
        panic!("the server did not start:\n{}", cluster.log());
    }
}

impl Cluster {
    /// A cluster with PostgreSQL's defaults, fsync and synchronous_commit included.
    pub fn builder() -> Builder {
        Builder { config: Vec::new(), at: None, bin: bin_dir() }
    }

    fn configure(&mut self, lines: &[(String, String)]) {
        self.port = port::free();
        let mut text = format!(
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\nmax_connections = 100\n",
            self.port,
            self.sockets.display()
        );
        for (name, value) in lines {
            text += &format!("{name} = '{value}'\n");
        }
        std::fs::write(self.data.join("postgresql.auto.conf"), text).expect("postgresql.auto.conf");
        process::give_to_server(&self.data.join("postgresql.auto.conf"));
    }

    /// The server that an earlier run has left running on a folder that is kept.
    pub fn left_running(folder: &Path) -> Option<u32> {
        let data = folder.join("data");
        let pid = std::fs::read_to_string(data.join("postmaster.pid")).ok()?.lines().next()?.parse().ok()?;
        let works_in = std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
        (works_in == data.canonicalize().ok()?).then_some(pid)
    }

    /// Starts the server, after a crash or a stop too, and waits until it takes connections.
    pub async fn start(&mut self) {
        if self.try_start().await.is_err() {
            panic!("the server did not start:\n{}", self.log());
        }
    }

    /// An error: it has ended by itself, or takes too long.
    async fn try_start(&mut self) -> Result<(), ()> {
        assert!(self.server.is_none(), "the server runs already");
        let log = File::options().create(true).append(true).open(&self.log).expect("the log");
        let errors = log.try_clone().expect("the log");
        let mut command = server_command(self.bin.join("postgres"));
        command.arg("-D").arg(&self.data).stdin(Stdio::null()).stdout(log).stderr(errors);
        let mut server = command.spawn().expect("postgres");
        let (pid, config) = (server.id(), self.url("postgres"));
        let started = process::eventually(START_DEADLINE, || {
            let ended = server.try_wait().expect("wait").is_some();
            let ready = !ended && self.is_ready(pid);
            let config = &config;
            async move {
                match (ended, ready) {
                    (true, _) => Some(Err(())),
                    (false, true) => tokio_postgres::connect(config, NoTls).await.ok().map(|_| Ok(())),
                    (false, false) => None,
                }
            }
        });
        let result = started.await.unwrap_or(Err(()));
        match result {
            Ok(()) => self.server = Some(server),
            Err(()) => {
                server.kill().ok();
                server.wait().expect("wait");
            }
        }
        result
    }

    /// Whether this very server has its port, and not another one that answers there.
    fn is_ready(&self, pid: u32) -> bool {
        let text = std::fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.first() == Some(&pid.to_string().as_str())
            && matches!(lines.get(7), Some(&"ready" | &"standby"))
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.server.as_ref().expect("a running server").id()
    }

    /// SIGKILL to all of the server's processes, as a power cut would: nothing is written any more.
    pub async fn kill9(&mut self) {
        let mut server = self.server.take().expect("a running server");
        let postmaster = server.id();
        process::signal(postmaster, Signal::STOP);
        let children = children(postmaster);
        process::signal(postmaster, Signal::KILL);
        children.iter().for_each(|child| process::signal(*child, Signal::KILL));
        server.wait().expect("wait");
        let gone = || children.iter().all(|child| !Path::new(&format!("/proc/{child}")).exists());
        assert!(
            process::holds_within(START_DEADLINE, gone).await,
            "a process of the server outlives SIGKILL"
        );
        std::fs::remove_file(self.data.join("postmaster.pid")).ok();
    }

    /// Stops the server: sessions are cut off, what is committed is written.
    pub async fn stop(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        process::signal(server.id(), Signal::INT);
        if process::wait(&mut server, START_DEADLINE).await.is_none() {
            server.kill().ok();
            panic!("the server did not stop");
        }
    }

    /// A URL over TCP.
    pub fn url(&self, database: &str) -> String {
        self.url_as("postgres", database)
    }

    /// A URL over TCP for a user.
    pub fn url_as(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of the unix socket.
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A session as superuser.
    pub async fn connect(&self, database: &str) -> Client {
        self.connect_as("postgres", database).await
    }

    /// A session of a user.
    pub async fn connect_as(&self, user: &str, database: &str) -> Client {
        let connected = tokio_postgres::connect(&self.url_as(user, database), NoTls).await;
        let (client, connection) = connected.unwrap_or_else(|error| panic!("{user}@{database}: {error}"));
        tokio::spawn(connection);
        client
    }

    /// Makes a database with the extension in it.
    pub async fn create_database(&self, name: &str) {
        let create = format!("CREATE DATABASE {name}");
        self.connect("postgres").await.batch_execute(&create).await.expect("CREATE DATABASE");
        self.connect(name).await.batch_execute("CREATE EXTENSION pg_dtm").await.expect("CREATE EXTENSION");
    }

    /// Runs psql with a script and answers what it prints; stops at the first error.
    pub fn psql(&self, database: &str, script: &str) -> String {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(script.as_bytes()).expect("a script");
        let mut command = std::process::Command::new(bin_dir().join("psql"));
        command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &self.url(database), "-f"]).arg(file.path());
        process::run(&mut command)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            // Immediate shutdown: the cluster is removed, nothing of it is needed.
            process::signal(server.id(), Signal::QUIT);
            server.wait().ok();
        }
    }
}

/// A temporary folder with a short path that is the servers' user's.
pub fn temporary_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("pg_dtm-").tempdir_in("/tmp").expect("a temporary folder");
    process::give_to_server(folder.path());
    folder
}

/// The processes that a process has started.
fn children(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    tasks.split_whitespace().map(|pid| pid.parse().expect("a process id")).collect()
}
