// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay adopt`: makes a copy of a database one of its own.

use std::process::ExitCode;

use crate::config::{Config, Database};
use crate::source::connect::Connector;
use crate::source::error::SourceError;
use crate::source::hello;

/// Why a database could not be adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Several are configured.
    #[error("the configuration has several databases; name one by --database: {0}")]
    Which(String),
    /// None has that name.
    #[error("the configuration has no database {0:?}; it has: {1}")]
    Unknown(String, String),
    /// The database refused, or is away.
    #[error("{0}{hint}", hint = .0.hint().map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Source(#[from] SourceError),
}

/// Gives the database a new era and this relay's environment.
pub async fn run(config: &Config, name: Option<&str>) -> Result<ExitCode, AdoptError> {
    let database = choose(&config.databases, name)?;
    let link = Connector::new(database.settings.clone(), config.statement_timeout)?.connect().await?;
    hello::check_extension(&link).await?;
    hello::check_protocol(&link).await?;
    link.query("adopting", "SELECT dtm.adopt($1)", &[&config.environment]).await?;
    println!("adopted: {} now belongs to environment {:?}", database.settings.describe(), config.environment);
    let sql = "SELECT name FROM dtm.subscription WHERE state = 'paused' ORDER BY name";
    let paused = link.query("listing paused subscriptions", sql, &[]).await?;
    for row in paused {
        println!("paused: {} (SELECT dtm.resume(...) lets it go on)", row.get::<_, String>(0));
    }
    Ok(ExitCode::SUCCESS)
}

fn choose<'a>(databases: &'a [Database], name: Option<&str>) -> Result<&'a Database, AdoptError> {
    let names = || databases.iter().map(|database| database.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, databases) {
        (None, [only]) => Ok(only),
        (None, _) => Err(AdoptError::Which(names())),
        (Some(name), _) => databases
            .iter()
            .find(|database| database.name == name)
            .ok_or_else(|| AdoptError::Unknown(name.into(), names())),
    }
}
