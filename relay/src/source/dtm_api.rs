// SPDX-License-Identifier: PostgreSQL
//! What DTM's clients ask for, of the transactions of one database.

use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::FromSql;

use super::desk::Desk;
use super::error::SourceError;

/// How many transactions wait.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// For their next attempt.
    pub waiting: i64,
    /// For somebody's decision.
    pub stuck: i64,
}

/// A message that a client has made.
#[derive(Clone, Debug, PartialEq)]
pub struct NewMessage {
    /// Its id.
    pub gid: String,
    /// An array of objects with actions; null where the client has told none.
    pub steps: Value,
    /// Of each step, as it is sent.
    pub bodies: Vec<Option<Vec<u8>>>,
    /// As `dtm.msg_send` takes them.
    pub options: Value,
}

/// Which transactions are listed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// This one.
    pub gid: Option<String>,
    /// Those before it.
    pub position: Option<i64>,
    /// Those that have it.
    pub status: Option<String>,
    /// Those of this kind.
    pub trans_type: Option<String>,
    /// Made then or later: milliseconds since 1970.
    pub from: Option<i64>,
    /// Made then or before.
    pub until: Option<i64>,
    /// No more than so many.
    pub limit: i32,
}

/// The transactions of one database, as its clients see them.
pub struct Transactions(Desk);

fn first<'a, T: FromSql<'a>>(row: &'a Row) -> T {
    row.get(0)
}

impl Transactions {
    /// Over these connections.
    pub fn new(desk: Desk) -> Self {
        Transactions(desk)
    }

    /// Answers the status of the one that was there; `None`: it was made.
    pub async fn prepare(
        &self,
        message: &NewMessage,
        query_prepared: &str,
    ) -> Result<Option<String>, SourceError> {
        let NewMessage { gid, steps, bodies, options } = message;
        let sql = "SELECT dtm.server_insert($1, 'prepared', $2, $3, $4, $5)";
        let row =
            self.0.ask("preparing a message", sql, &[gid, steps, bodies, &query_prepared, options]).await?;
        Ok(first(&row))
    }

    /// Answers the status of the one that was there; `None`: it was made.
    pub async fn submit(&self, message: &NewMessage) -> Result<Option<String>, SourceError> {
        let NewMessage { gid, steps, bodies, options } = message;
        let sql = "SELECT dtm.server_submit($1, $2, $3, $4)";
        Ok(first(&self.0.ask("submitting a message", sql, &[gid, steps, bodies, options]).await?))
    }

    /// Answers the status that it had; `None`: there is none.
    pub async fn abort(&self, gid: &str, reason: Option<&str>) -> Result<Option<String>, SourceError> {
        let sql = "SELECT dtm.server_abort($1, $2)";
        Ok(first(&self.0.ask("aborting a message", sql, &[&gid, &reason]).await?))
    }

    /// Ends it where it stands. Answers the status that it had; `None`: there is none.
    pub async fn force_stop(&self, gid: &str) -> Result<Option<String>, SourceError> {
        Ok(first(&self.0.ask("stopping a transaction", "SELECT dtm.server_stop($1)", &[&gid]).await?))
    }

    /// How far it is, in the form of dtm.server_progress. `None`: there is none.
    pub async fn progress(&self, gid: &str) -> Result<Option<Value>, SourceError> {
        let sql = "SELECT dtm.server_progress($1)";
        Ok(first(&self.0.ask("looking how far a transaction is", sql, &[&gid]).await?))
    }

    /// How many wait.
    pub async fn waiting(&self) -> Result<Waiting, SourceError> {
        let sql = "SELECT waiting, stuck FROM dtm.server_waiting()";
        let row = self.0.ask("counting transactions", sql, &[]).await?;
        Ok(Waiting { waiting: row.get(0), stuck: row.get(1) })
    }

    /// False: there is none.
    pub async fn retry(&self, gid: &str) -> Result<bool, SourceError> {
        Ok(first(&self.0.ask("hurrying a transaction", "SELECT dtm.server_retry($1)", &[&gid]).await?))
    }

    /// Those whose next attempt is more than so many seconds away. Answers how many.
    pub async fn retry_all(&self, seconds: f64, most: i32) -> Result<i32, SourceError> {
        let sql = "SELECT dtm.server_retry_all(pg_catalog.make_interval(secs => $1), $2)";
        Ok(first(&self.0.ask("hurrying transactions", sql, &[&seconds, &most]).await?))
    }

    /// A transaction with its branches, in DTM's form.
    pub async fn query(&self, gid: &str) -> Result<Value, SourceError> {
        Ok(first(&self.0.ask("reading a transaction", "SELECT dtm.server_query($1)", &[&gid]).await?))
    }

    /// A page of transactions, in DTM's form.
    pub async fn all(&self, filter: &Filter) -> Result<Value, SourceError> {
        let sql = "SELECT dtm.server_all($1, $2, $3, $4, pg_catalog.to_timestamp($5::bigint / 1000.0::float8), \
                   pg_catalog.to_timestamp($6::bigint / 1000.0::float8), $7)";
        let Filter { gid, position, status, trans_type, from, until, limit } = filter;
        let row =
            self.0.ask("listing", sql, &[gid, position, status, trans_type, from, until, limit]).await?;
        Ok(first(&row))
    }

    /// A page of message topics, in DTM's form.
    pub async fn topics(
        &self,
        topic: Option<&str>,
        position: Option<i64>,
        limit: i32,
    ) -> Result<Value, SourceError> {
        let sql = "SELECT dtm.server_topics($1, $2, $3)";
        Ok(first(&self.0.ask("listing topics", sql, &[&topic, &position, &limit]).await?))
    }

    /// False: it was subscribed already.
    pub async fn subscribe(&self, topic: &str, url: &str, remark: &str) -> Result<bool, SourceError> {
        let sql = "WITH added AS (INSERT INTO dtm.msg_topics (topic, url, remark) VALUES ($1, $2, $3) \
                   ON CONFLICT DO NOTHING RETURNING 1) SELECT EXISTS (SELECT FROM added)";
        Ok(first(&self.0.ask("subscribing to a topic", sql, &[&topic, &url, &remark]).await?))
    }

    /// How many subscribers the topic had, and whether this was one.
    pub async fn unsubscribe(&self, topic: &str, url: &str) -> Result<(i64, bool), SourceError> {
        let sql = "WITH gone AS (DELETE FROM dtm.msg_topics WHERE topic = $1 AND url = $2 RETURNING 1) \
                   SELECT (SELECT pg_catalog.count(*) FROM dtm.msg_topics WHERE topic = $1), EXISTS (SELECT FROM gone)";
        let row = self.0.ask("unsubscribing from a topic", sql, &[&topic, &url]).await?;
        Ok((row.get(0), row.get(1)))
    }

    /// False: there is no such topic.
    pub async fn delete_topic(&self, topic: &str) -> Result<bool, SourceError> {
        let sql = "WITH gone AS (DELETE FROM dtm.msg_topics WHERE topic = $1 RETURNING 1) \
                   SELECT EXISTS (SELECT FROM gone)";
        Ok(first(&self.0.ask("deleting a topic", sql, &[&topic]).await?))
    }
}
