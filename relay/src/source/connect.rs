// SPDX-License-Identifier: PostgreSQL
//! Connecting to the primary among the servers of a connection string, and a session as the relay wants it.

use std::time::Duration;

use rand::seq::SliceRandom as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config as driver;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Config, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::{self, SourceError};
use super::link::Link;
use super::passfile;
use super::settings::{ChannelBinding, Server, Settings, SslMode};
use super::tls;

/// What every session is set to. Durable locally: a lease or cursor that a crash takes back would be given out twice; but
/// nothing waits for a standby, which would only delay the relay, not make it safer.
const SESSION: &str = "SET search_path = '';
    SET default_transaction_isolation = 'read committed';
    SET default_transaction_read_only = off;
    SET synchronous_commit = local;
    SET jit = off;
    SET lock_timeout = '10s';
    SET idle_in_transaction_session_timeout = '60s'";

/// What a session is set to in which users' functions run: what they see is what they are used to. But what was done there counts
/// as done: a crash must not take it back.
const TARGET_SESSION: &str = "SET default_transaction_isolation = 'read committed';
    SELECT pg_catalog.set_config('synchronous_commit', 'local', false)
    WHERE pg_catalog.current_setting('synchronous_commit') = 'off';
    SET default_transaction_read_only = off;
    SET idle_in_transaction_session_timeout = '60s'";

/// How much longer the relay waits for an answer than the server works on it.
pub const GRACE: Duration = Duration::from_secs(5);

/// Makes connections to one database.
#[derive(Clone)]
pub struct Connector {
    settings: Settings,
    statement_timeout: Duration,
    tls: MakeRustlsConnect,
    session: &'static str,
}

impl Connector {
    /// Reads certificates and keys, but connects to nothing yet. `statement_timeout` bounds every statement.
    pub fn new(settings: Settings, statement_timeout: Duration) -> Result<Self, SourceError> {
        let tls = MakeRustlsConnect::new(tls::client_config(&settings)?);
        Ok(Connector { settings, statement_timeout, tls, session: SESSION })
    }

    /// The same to a database that functions are called in.
    pub fn to_target(settings: Settings, statement_timeout: Duration) -> Result<Self, SourceError> {
        Ok(Connector { session: TARGET_SESSION, ..Connector::new(settings, statement_timeout)? })
    }

    /// What sessions are set to.
    pub fn session(&self) -> &'static str {
        self.session
    }

    /// What it connects to.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Connects to the first server that is a primary. The error tells of every server that was tried.
    pub async fn connect(&self) -> Result<Link, SourceError> {
        let mut servers: Vec<&Server> = self.settings.servers.iter().collect();
        if self.settings.shuffle {
            servers.shuffle(&mut rand::rng());
        }
        let mut failures = Vec::new();
        for server in servers {
            match self.connect_to(server).await {
                Ok(link) => return Ok(link),
                Err(error) => failures.push((server, error)),
            }
        }
        match <[_; 1]>::try_from(failures) {
            Ok([(_, error)]) => Err(error),
            Err(failures) => {
                let told = failures
                    .iter()
                    .map(|(server, error)| format!("{}:{}: {error}", server.host, server.port));
                Err(SourceError::Unreachable(told.collect::<Vec<_>>().join("; ")))
            }
        }
    }

    async fn connect_to(&self, server: &Server) -> Result<Link, SourceError> {
        let link = self.open(server).await?;
        link.batch("preparing the session", self.session).await?;
        let milliseconds = self.statement_timeout.as_millis();
        link.batch("preparing the session", &format!("SET statement_timeout = {milliseconds}")).await?;
        let recovering = "SELECT pg_catalog.pg_is_in_recovery()";
        let row = link.query_one("asking whether it is a primary", recovering, &[]).await?;
        if row.get(0) {
            return Err(SourceError::Unfit {
                problem: format!("{}:{} is a standby (pg_is_in_recovery)", server.host, server.port),
                hint: "Connect the relay to the primary; with several hosts in its URL it finds it.".into(),
            });
        }
        Ok(link)
    }

    /// Opens a connection, encrypted or not as `sslmode` has it; over a unix socket it says nothing.
    async fn open(&self, server: &Server) -> Result<Link, SourceError> {
        let mode = if server.is_local_socket() { SslMode::Disable } else { self.settings.sslmode };
        match mode {
            SslMode::Disable => self.attempt(server, driver::SslMode::Disable).await,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                self.attempt(server, driver::SslMode::Require).await
            }
            SslMode::Allow => self.either(server, driver::SslMode::Disable, driver::SslMode::Require).await,
            SslMode::Prefer => self.either(server, driver::SslMode::Prefer, driver::SslMode::Disable).await,
        }
    }

    async fn either(
        &self,
        server: &Server,
        first: driver::SslMode,
        second: driver::SslMode,
    ) -> Result<Link, SourceError> {
        let error = match self.attempt(server, first).await {
            Ok(link) => return Ok(link),
            Err(error) => error,
        };
        // What the server itself says is final, unless it may depend on the encryption: pg_hba.conf.
        if error.sqlstate().is_some_and(|sqlstate| sqlstate != "28000") {
            return Err(error);
        }
        self.attempt(server, second).await.map_err(|_| error)
    }

    async fn attempt(&self, server: &Server, mode: driver::SslMode) -> Result<Link, SourceError> {
        let config = self.config(server, mode);
        let limit = self.settings.connect_timeout;
        let connecting = async {
            match mode {
                driver::SslMode::Disable => self.establish(&config, NoTls).await,
                _ => self.establish(&config, self.tls.clone()).await,
            }
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(result) => result,
            Err(_) => Err(SourceError::Silent { what: "connecting", limit }),
        }
    }

    async fn establish<T>(&self, config: &Config, tls: T) -> Result<Link, SourceError>
    where
        T: MakeTlsConnect<Socket>,
        T::Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (client, connection) = config.connect(tls).await.map_err(|error| error::connecting(&error))?;
        Ok(Link::new(client, connection, self.statement_timeout + GRACE))
    }

    fn config(&self, server: &Server, mode: driver::SslMode) -> Config {
        let settings = &self.settings;
        let mut config = Config::new();
        config
            .host(&server.host)
            .port(server.port)
            .user(&settings.user)
            .dbname(&settings.dbname)
            .application_name(&settings.application_name)
            .ssl_mode(mode)
            .channel_binding(match settings.channel_binding {
                ChannelBinding::Disable => driver::ChannelBinding::Disable,
                ChannelBinding::Prefer => driver::ChannelBinding::Prefer,
                ChannelBinding::Require => driver::ChannelBinding::Require,
            })
            .tcp_user_timeout(settings.tcp_user_timeout)
            .keepalives(settings.keepalives_idle.is_some())
            .keepalives_interval(settings.keepalives_interval)
            .keepalives_retries(settings.keepalives_count);
        if let Some(idle) = settings.keepalives_idle {
            config.keepalives_idle(idle);
        }
        if let Some(address) = server.address {
            config.hostaddr(address);
        }
        if settings.direct_tls && mode == driver::SslMode::Require {
            config.ssl_negotiation(driver::SslNegotiation::Direct);
        }
        if let Some(options) = &settings.options {
            config.options(options);
        }
        if let Some(password) = passfile::password(settings, server) {
            config.password(password);
        }
        config
    }
}
