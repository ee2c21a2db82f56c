// SPDX-License-Identifier: PostgreSQL
//! `[dtm_server]`: where the server listens, whom it answers, and for which database.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use crate::calls::secrets::{Secret, SecretTable, Secrets};
use crate::config::Database;

/// Where DTM's clients look for a server.
const LISTEN: &str = "127.0.0.1:36789";

/// The table as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTable {
    listen: Option<String>,
    database: Option<String>,
    token: Option<Token>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
}

/// The token: a `[secret.NAME]`, or where it stands.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Named(String),
    Here(SecretTable),
}

/// The settings of the server, checked.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Whose transactions it has.
    pub database: Database,
    /// What clients have to know.
    pub token: Option<Secret>,
    /// Certificates and their key, as PEM files.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl ServerTable {
    /// Checks them. An error is the setting and what is wrong with it.
    pub fn read(
        self,
        databases: &[Database],
        secrets: &Secrets,
    ) -> Result<ServerSettings, (&'static str, String)> {
        let listen = self.listen.as_deref().unwrap_or(LISTEN);
        let listen: SocketAddr =
            listen.parse().map_err(|_| ("listen", format!("{listen:?} is no address such as {LISTEN:?}")))?;
        let token = match self.token {
            None => None,
            Some(Token::Here(table)) => Some(table.read().map_err(|why| ("token", why))?),
            Some(Token::Named(name)) => match secrets.get(&name) {
                Some(secret) => Some(secret.clone()),
                None => return Err(("token", format!("there is no [secret.{name}]"))),
            },
        };
        if token.is_none() && !listen.ip().is_loopback() {
            let why = format!("it is missing: whoever reaches {listen} could make and stop transactions");
            return Err(("token", why));
        }
        let tls = match (self.tls_cert, self.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, Some(_)) => return Err(("tls_cert", "it is missing, and tls_key is there".into())),
            (Some(_), None) => return Err(("tls_key", "it is missing, and tls_cert is there".into())),
        };
        Ok(ServerSettings { listen, database: database(self.database, databases)?, token, tls })
    }
}

fn database(name: Option<String>, databases: &[Database]) -> Result<Database, (&'static str, String)> {
    let known = || databases.iter().map(|database| database.name.as_str()).collect::<Vec<_>>().join(", ");
    match (&name, databases) {
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(("database", format!("it is missing, and there are several: {}", known()))),
        (Some(name), _) => {
            let found = databases.iter().find(|database| database.name == *name).cloned();
            found
                .ok_or_else(|| ("database", format!("there is no [database.{name}]; there are: {}", known())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::settings::{Settings, ThisMachine};

    fn read(table: &str, databases: &[&str]) -> Result<ServerSettings, (&'static str, String)> {
        let database = |name: &&str| Database {
            name: (*name).to_owned(),
            settings: Settings::parse("postgres://u@h/d", &ThisMachine).unwrap(),
        };
        let databases: Vec<_> = databases.iter().map(database).collect();
        let secrets = Secrets::from([("api".to_owned(), Secret::from("abc".to_owned()))]);
        let table: ServerTable = serde_json::from_str(table).unwrap();
        table.read(&databases, &secrets)
    }

    #[test]
    fn nothing_needs_to_be_said_where_there_is_one_database() {
        let settings = read("{}", &["shop"]).unwrap();
        assert_eq!(settings.listen.to_string(), LISTEN);
        assert_eq!(settings.database.name, "shop");
        assert!(settings.token.is_none() && settings.tls.is_none());
    }

    #[test]
    fn a_token_is_named_or_stands_elsewhere_and_may_be_missing_only_on_this_machine() {
        let revealed =
            |table: &str| read(table, &["a"]).map(|settings| settings.token.map(|t| t.reveal().to_owned()));
        assert_eq!(revealed(r#"{"listen": "0.0.0.0:1", "token": "api"}"#), Ok(Some("abc".into())));
        assert!(revealed(r#"{"token": {"env": "PATH"}}"#).unwrap().is_some());
        for (table, key) in [
            (r#"{"listen": "0.0.0.0:1"}"#, "token"),
            (r#"{"listen": "[::]:1"}"#, "token"),
            (r#"{"token": "other"}"#, "token"),
            (r#"{"listen": "here"}"#, "listen"),
            (r#"{"tls_cert": "a"}"#, "tls_key"),
            (r#"{"tls_key": "a"}"#, "tls_cert"),
            (r#"{"database": "b"}"#, "database"),
        ] {
            assert_eq!(revealed(table).unwrap_err().0, key, "{table}");
        }
        assert_eq!(read("{}", &["a", "b"]).unwrap_err().0, "database");
    }
}
