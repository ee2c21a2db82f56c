// SPDX-License-Identifier: PostgreSQL
//! A real PgBouncer in front of a cluster.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::cluster::Cluster;
use crate::process::{self, server_command};

/// A running PgBouncer in transaction mode. Dropping it stops it.
pub struct Pgbouncer {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Pgbouncer {
    /// Starts one with a small pool of server connections, so that clients really share them.
    pub async fn start(cluster: &Cluster) -> Pgbouncer {
        let folder =
            tempfile::Builder::new().prefix("pg_dtm-").tempdir_in("/tmp").expect("a temporary folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let users = folder.path().join("users.txt");
        std::fs::write(&users, "\"postgres\" \"\"\n").expect("users");
        let config = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 3\n\
             max_client_conn = 100\nlogfile = {}\n",
            cluster.port(),
            users.display(),
            folder.path().join("log").display()
        );
        std::fs::write(&config, text).expect("a configuration file");
        for path in [folder.path(), &users, &config] {
            process::give_to_server(path);
        }
        let program =
            ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].into_iter().find(|path| Path::new(path).exists());
        let mut command =
            server_command(program.expect("pgbouncer is not installed: run this by cargo xtask"));
        command.arg("-q").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let bouncer = Pgbouncer { child: command.spawn().expect("pgbouncer"), port, _folder: folder };
        let url = bouncer.url("postgres");
        let ready = || async { tokio_postgres::connect(&url, NoTls).await.ok() };
        assert!(
            process::eventually(Duration::from_secs(20), ready).await.is_some(),
            "PgBouncer did not start"
        );
        bouncer
    }

    /// A session through it, as superuser.
    pub async fn connect(&self, database: &str) -> Client {
        let connected = tokio_postgres::connect(&self.url(database), NoTls).await;
        let (client, connection) = connected.expect("a connection through PgBouncer");
        tokio::spawn(connection);
        client
    }

    /// A URL through it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
