// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay adopt`: makes a copy of a database one of its own.

use std::process::ExitCode;

use crate::config::Config;
use crate::operate::{OperateError, choose, connect_to};

/// Gives the database a new era and this relay's environment.
pub async fn run(config: &Config, name: Option<&str>) -> Result<ExitCode, OperateError> {
    let database = choose(&config.databases, name)?;
    let link = connect_to(config, database).await?;
    link.query("adopting", "SELECT dtm.adopt($1)", &[&config.environment]).await?;
    println!("adopted: {} now belongs to environment {:?}", database.settings.describe(), config.environment);
    let sql = "SELECT name FROM dtm.subscription WHERE state = 'paused' ORDER BY name";
    let paused = link.query("listing paused subscriptions", sql, &[]).await?;
    for row in paused {
        println!("paused: {} (SELECT dtm.resume(...) lets it go on)", row.get::<_, String>(0));
    }
    Ok(ExitCode::SUCCESS)
}
