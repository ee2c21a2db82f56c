// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay adopt`: makes a copy of a database one of its own.

use std::process::ExitCode;
use std::time::Duration;

use crate::config::Config;
use crate::operate::{OperateError, choose, connect_to};
use crate::source::error::SourceError;
use crate::source::link::Link;

/// An attempt waits a tenth of a second for transactions that are open; whoever publishes waits behind it for no longer.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(500);

/// Gives the database a new era and this relay's environment.
pub async fn run(config: &Config, name: Option<&str>) -> Result<ExitCode, OperateError> {
    let database = choose(&config.databases, name)?;
    let link = connect_to(config, database).await?;
    adopt(&link, &config.environment).await?;
    println!("adopted: {} now belongs to environment {:?}", database.settings.describe(), config.environment);
    let sql = "SELECT name FROM dtm.subscription WHERE state = 'paused' ORDER BY name";
    let paused = link.query("listing paused subscriptions", sql, &[]).await?;
    for row in paused {
        println!("paused: {} (SELECT dtm.resume(...) lets it go on)", row.get::<_, String>(0));
    }
    Ok(ExitCode::SUCCESS)
}

async fn adopt(link: &Link, environment: &str) -> Result<(), SourceError> {
    for _ in 1..ATTEMPTS {
        match link.query("adopting", "SELECT dtm.adopt($1)", &[&environment]).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_lock_not_available() => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
    }
    link.query("adopting", "SELECT dtm.adopt($1)", &[&environment]).await.map(drop)
}
