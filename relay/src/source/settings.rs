// SPDX-License-Identifier: PostgreSQL
//! What the parameters of a connection string mean, with libpq's environment variables and defaults behind them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::url::{self, Parameters, UrlError};

/// How a connection is encrypted and the server known, as `sslmode` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Not encrypted.
    Disable,
    /// Encrypted if the server insists.
    Allow,
    /// Encrypted if the server can.
    Prefer,
    /// Encrypted; whoever the server is, unless there is a root certificate.
    Require,
    /// Encrypted, and the certificate comes from a trusted authority.
    VerifyCa,
    /// As before, and it is made out to the host that was asked for.
    VerifyFull,
}

/// Who is trusted to sign a server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// Nobody was named, and there is no `~/.postgresql/root.crt`.
    None,
    /// `sslrootcert=system`: the authorities that the operating system trusts.
    System,
    /// The certificates of a PEM file.
    File(PathBuf),
}

/// Whether SCRAM is bound to the TLS channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// No.
    Disable,
    /// Where both sides can.
    Prefer,
    /// Or no connection.
    Require,
}

/// A server that may be the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// A host name, an address, or the directory of a unix socket.
    pub host: String,
    /// Where to connect to instead of looking the name up.
    pub address: Option<IpAddr>,
    /// The port, of TCP or of the socket's name.
    pub port: u16,
}

impl Server {
    /// Whether it is reached over a unix socket.
    pub fn is_local_socket(&self) -> bool {
        self.address.is_none() && self.host.starts_with(['/', '@'])
    }
}

/// Everything that is needed to connect to one database.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Tried in this order until one is a primary.
    pub servers: Vec<Server>,
    /// Whether the order is shuffled first.
    pub shuffle: bool,
    /// The role.
    pub user: String,
    /// Its password, if the string or the environment has one.
    pub password: Option<String>,
    /// The database's name.
    pub dbname: String,
    /// Command-line options for the server.
    pub options: Option<String>,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
    /// For one attempt at one server.
    pub connect_timeout: Duration,
    /// See [`SslMode`].
    pub sslmode: SslMode,
    /// TLS from the first byte, without asking first.
    pub direct_tls: bool,
    /// TLS 1.3 or nothing.
    pub tls13_only: bool,
    /// See [`Roots`].
    pub roots: Roots,
    /// The client's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// See [`ChannelBinding`].
    pub channel_binding: ChannelBinding,
    /// Where passwords stand.
    pub passfile: Option<PathBuf>,
    /// Idle time before the first TCP keepalive; `None`: no keepalives.
    pub keepalives_idle: Option<Duration>,
    /// Time between keepalives.
    pub keepalives_interval: Duration,
    /// How many of them go unanswered.
    pub keepalives_count: u32,
    /// How long sent data may stay unacknowledged.
    pub tcp_user_timeout: Duration,
}

/// Without the password.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

/// Accepted, by libpq's names, and the environment variable that stands in for each.
const PARAMETERS: [(&str, &str); 25] = [
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("dbname", "PGDATABASE"),
    ("options", "PGOPTIONS"),
    ("application_name", "PGAPPNAME"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("sslmode", "PGSSLMODE"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("fallback_application_name", ""),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_count", ""),
    ("tcp_user_timeout", ""),
];

/// Accepted with values that ask for what the relay does anyway.
const HARMLESS: [(&str, &[&str]); 4] = [
    ("client_encoding", &["utf8", "utf-8", "auto"]),
    ("gssencmode", &["disable", "prefer"]),
    ("sslcompression", &["0"]),
    ("sslsni", &["1"]),
];

/// What the machine contributes: environment variables and files.
pub trait Surroundings {
    /// The value of an environment variable.
    fn variable(&self, name: &str) -> Option<String>;
    /// Whether a file or folder is there.
    fn exists(&self, path: &Path) -> bool;
}

/// The machine that the relay runs on.
#[derive(Clone, Copy, Debug)]
pub struct ThisMachine;

impl Surroundings for ThisMachine {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok().filter(|value| !value.is_empty())
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }
}

impl Settings {
    /// Reads a connection string. Unknown parameters and values are errors that name them.
    pub fn parse(text: &str, around: &dyn Surroundings) -> Result<Self, UrlError> {
        let mut given = url::parameters(text)?;
        refuse_unknown(&mut given)?;
        for (name, variable) in PARAMETERS {
            if !variable.is_empty() && given.get(name).is_none_or(String::is_empty) {
                given.extend(around.variable(variable).map(|value| (name.to_owned(), value)));
            }
        }
        Reader { given, around }.settings()
    }

    /// The database in words, without a password.
    pub fn describe(&self) -> String {
        let servers: Vec<String> =
            self.servers.iter().map(|server| format!("{}:{}", server.host, server.port)).collect();
        format!("database {:?} as {:?} at {}", self.dbname, self.user, servers.join(", "))
    }
}

fn refuse_unknown(given: &mut Parameters) -> Result<(), UrlError> {
    for (name, harmless) in HARMLESS {
        if let Some(value) = given.remove(name)
            && !harmless.contains(&value.to_ascii_lowercase().as_str())
        {
            return Err(UrlError(format!("{name}={value} is not supported")));
        }
    }
    match given.keys().find(|key| !PARAMETERS.iter().any(|(name, _)| name == key)) {
        Some(unknown) => Err(UrlError(format!("the parameter {unknown:?} is unknown or not supported"))),
        None => Ok(()),
    }
}

struct Reader<'a> {
    given: Parameters,
    around: &'a dyn Surroundings,
}

impl Reader<'_> {
    fn settings(&self) -> Result<Settings, UrlError> {
        self.check_session_attributes()?;
        let user = self.text("user").map(str::to_owned).or_else(|| self.around.variable("USER"));
        let user = user.or_else(|| self.around.variable("LOGNAME"));
        let user =
            user.ok_or_else(|| UrlError("it names no user, and neither PGUSER nor USER is set".into()))?;
        let roots = self.roots();
        let name = self.text("application_name").or_else(|| self.text("fallback_application_name"));
        Ok(Settings {
            servers: self.servers()?,
            shuffle: self.choice("load_balance_hosts", &[("disable", false), ("random", true)], false)?,
            password: self.text("password").map(str::to_owned),
            dbname: self.text("dbname").unwrap_or(&user).to_owned(),
            options: self.text("options").map(str::to_owned),
            application_name: name.unwrap_or("dtm-relay").to_owned(),
            connect_timeout: self.seconds("connect_timeout", 10)?,
            sslmode: self.sslmode(&roots)?,
            direct_tls: self.choice("sslnegotiation", &[("postgres", false), ("direct", true)], false)?,
            tls13_only: self.choice(
                "ssl_min_protocol_version",
                &[("TLSv1", false), ("TLSv1.1", false), ("TLSv1.2", false), ("TLSv1.3", true)],
                false,
            )?,
            roots,
            identity: self.identity(),
            channel_binding: self.choice(
                "channel_binding",
                &[
                    ("disable", ChannelBinding::Disable),
                    ("prefer", ChannelBinding::Prefer),
                    ("require", ChannelBinding::Require),
                ],
                ChannelBinding::Prefer,
            )?,
            passfile: self.text("passfile").map(PathBuf::from).or_else(|| self.home(".pgpass")),
            keepalives_idle: match self.choice("keepalives", &[("0", false), ("1", true)], true)? {
                true => Some(self.seconds("keepalives_idle", 5)?),
                false => None,
            },
            keepalives_interval: self.seconds("keepalives_interval", 2)?,
            keepalives_count: self.number("keepalives_count")?.filter(|&n| n > 0).unwrap_or(3),
            tcp_user_timeout: match self.number("tcp_user_timeout")?.filter(|&ms| ms > 0) {
                Some(ms) => Duration::from_millis(u64::from(ms)),
                None => Duration::from_secs(10),
            },
            user,
        })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.given.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn home(&self, file: &str) -> Option<PathBuf> {
        self.around.variable("HOME").map(|home| Path::new(&home).join(file))
    }

    fn existing_in_home(&self, file: &str) -> Option<PathBuf> {
        self.home(file).filter(|path| self.around.exists(path))
    }

    fn number(&self, name: &str) -> Result<Option<u32>, UrlError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(UrlError(format!("{name}={text} is no number"))),
        }
    }

    /// Zero means "no bound" or "the system's default" to libpq; a relay has to notice when the network is silent.
    fn seconds(&self, name: &str, default: u32) -> Result<Duration, UrlError> {
        let seconds = self.number(name)?.filter(|&seconds| seconds > 0).unwrap_or(default);
        Ok(Duration::from_secs(u64::from(seconds)))
    }

    fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)], default: T) -> Result<T, UrlError> {
        let Some(text) = self.text(name) else { return Ok(default) };
        match choices.iter().find(|(choice, _)| *choice == text) {
            Some((_, value)) => Ok(*value),
            None => {
                let choices: Vec<&str> = choices.iter().map(|(choice, _)| *choice).collect();
                Err(UrlError(format!("{name}={text} is none of {}", choices.join(", "))))
            }
        }
    }

    /// A relay writes cursors: only a primary will do, whatever was asked for.
    fn check_session_attributes(&self) -> Result<(), UrlError> {
        let known = ["any", "primary", "read-write", "read-only", "standby", "prefer-standby"]
            .map(|name| (name, name));
        match self.choice("target_session_attrs", &known, "read-write")? {
            "any" | "primary" | "read-write" => Ok(()),
            other => Err(UrlError(format!(
                "target_session_attrs={other} cannot be: a relay needs the primary; leave it out or say read-write"
            ))),
        }
    }

    fn roots(&self) -> Roots {
        match self.text("sslrootcert") {
            Some("system") => Roots::System,
            Some(path) => Roots::File(path.into()),
            None => self.existing_in_home(".postgresql/root.crt").map_or(Roots::None, Roots::File),
        }
    }

    fn sslmode(&self, roots: &Roots) -> Result<SslMode, UrlError> {
        let modes = [
            ("disable", SslMode::Disable),
            ("allow", SslMode::Allow),
            ("prefer", SslMode::Prefer),
            ("require", SslMode::Require),
            ("verify-ca", SslMode::VerifyCa),
            ("verify-full", SslMode::VerifyFull),
        ];
        let default = if *roots == Roots::System { SslMode::VerifyFull } else { SslMode::Prefer };
        let mode = self.choice("sslmode", &modes, default)?;
        match (mode, roots) {
            (mode, Roots::System) if mode != SslMode::VerifyFull => Err(UrlError(
                "sslrootcert=system needs sslmode=verify-full: anybody can have a certificate by a public authority"
                    .into(),
            )),
            (SslMode::VerifyCa | SslMode::VerifyFull, Roots::None) => Err(UrlError(format!(
                "sslmode={} needs sslrootcert (a file, or \"system\"), or a file ~/.postgresql/root.crt",
                if mode == SslMode::VerifyCa { "verify-ca" } else { "verify-full" }
            ))),
            // As libpq has it: with a root certificate at hand, "require" checks against it.
            (SslMode::Require, Roots::File(_)) => Ok(SslMode::VerifyCa),
            (mode, _) => Ok(mode),
        }
    }

    fn identity(&self) -> Option<(PathBuf, PathBuf)> {
        let certificate = self.text("sslcert").map(PathBuf::from);
        let certificate = certificate.or_else(|| self.existing_in_home(".postgresql/postgresql.crt"))?;
        let key = self.text("sslkey").map(PathBuf::from);
        Some((certificate, key.or_else(|| self.home(".postgresql/postgresql.key"))?))
    }

    fn servers(&self) -> Result<Vec<Server>, UrlError> {
        let list =
            |name| -> Vec<&str> { self.text(name).map(|text| text.split(',').collect()).unwrap_or_default() };
        let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = hosts.len().max(addresses.len()).max(1);
        for (name, len) in [("host", hosts.len()), ("hostaddr", addresses.len()), ("port", ports.len())] {
            if len > 1 && len != count || len == 1 && count > 1 && name != "port" {
                return Err(UrlError(format!("{name} lists {len} entries for {count} servers")));
            }
        }
        let at = |list: &[&str], i: usize| list.get(i).copied().unwrap_or_default().trim().to_owned();
        (0..count)
            .map(|i| {
                let address = match at(&addresses, i).as_str() {
                    "" => None,
                    text => Some(
                        text.parse().map_err(|_| UrlError(format!("hostaddr={text} is no IP address")))?,
                    ),
                };
                let port = if ports.len() == 1 { at(&ports, 0) } else { at(&ports, i) };
                let host = match (at(&hosts, i), address) {
                    (host, Some(address)) if host.is_empty() => IpAddr::to_string(&address),
                    (host, _) if host.is_empty() => self.default_host(),
                    (host, _) => host,
                };
                Ok(Server { host, address, port: port_number(&port)? })
            })
            .collect()
    }

    fn default_host(&self) -> String {
        let folders = ["/var/run/postgresql", "/tmp"];
        let found = folders.iter().find(|folder| self.around.exists(Path::new(folder)));
        found.map_or("localhost", |folder| folder).to_owned()
    }
}

fn port_number(text: &str) -> Result<u16, UrlError> {
    match text {
        "" => Ok(5432),
        text => match text.parse() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(UrlError(format!("port={text} is no port"))),
        },
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
