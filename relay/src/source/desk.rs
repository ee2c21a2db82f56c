// SPDX-License-Identifier: PostgreSQL
//! The connections that requests from outside take turns at.

use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::connect::Connector;
use super::error::SourceError;
use super::hello;
use super::link::Link;
use super::pool::Pool;

/// Connections at the most.
const LINKS: usize = 4;

/// Longer than it takes to connect where somebody is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// The connections.
pub struct Desk {
    connector: Connector,
    environment: String,
    pool: Pool<Link>,
}

impl Desk {
    /// Connects to nothing yet. A database of another environment will be refused.
    pub fn new(connector: Connector, environment: String) -> Self {
        Desk { connector, environment, pool: Pool::new(LINKS) }
    }

    /// Runs a statement that answers one row. It is not repeated where it is not known whether it was run.
    pub async fn ask(
        &self,
        what: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, SourceError> {
        let away = || SourceError::Silent { what: "connecting", limit: PATIENCE };
        let begun = tokio::time::timeout(PATIENCE, async {
            let turn = self.pool.turn().await.map_err(|_| away())?;
            Ok::<_, SourceError>((turn, self.link().await?))
        });
        let (_turn, link) = begun.await.unwrap_or_else(|_| Err(away()))?;
        let answer = link.query_one(what, sql, parameters).await;
        if answer.as_ref().map_or_else(SourceError::spares_connection, |_| true) {
            self.pool.keep(link);
        }
        answer
    }

    async fn link(&self) -> Result<Link, SourceError> {
        if let Some(link) = self.pool.take() {
            return Ok(link);
        }
        let link = self.connector.connect().await?;
        hello::hello(&link, &self.environment).await?;
        Ok(link)
    }
}
