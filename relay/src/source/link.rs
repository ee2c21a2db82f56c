// SPDX-License-Identifier: PostgreSQL
//! One connection on which no call waits for ever.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Connection, Row, Socket, Statement, ToStatement};
use tokio_util::task::AbortOnDropHandle;

use super::error::SourceError;
use crate::causes::with_causes;

/// A connection. Dropping it closes the socket, and the server notices.
pub struct Link {
    client: Client,
    limit: Duration,
    ended: Arc<OnceLock<String>>,
    _driver: AbortOnDropHandle<()>,
}

impl AsRef<Link> for Link {
    fn as_ref(&self) -> &Link {
        self
    }
}

impl Link {
    /// Drives a connection from now on; `limit` bounds every call.
    pub(super) fn new<T>(client: Client, connection: Connection<Socket, T>, limit: Duration) -> Self
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let ended = Arc::new(OnceLock::new());
        let why = ended.clone();
        let driver = tokio::spawn(async move {
            let end = connection.await;
            let _ = why.set(match end {
                Ok(()) => "the server closed the connection".to_owned(),
                Err(error) => with_causes(&error),
            });
        });
        Link { client, limit, ended, _driver: AbortOnDropHandle::new(driver) }
    }

    /// Bounds every call from now on by another limit.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Whether the server has closed it, or the network has, as far as that is known.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Runs statements that answer nothing.
    pub async fn batch(&self, what: &'static str, sql: &str) -> Result<(), SourceError> {
        self.bounded(what, self.client.batch_execute(sql)).await
    }

    /// Prepares a statement that is run often.
    pub async fn prepare(&self, what: &'static str, sql: &str) -> Result<Statement, SourceError> {
        self.bounded(what, self.client.prepare(sql)).await
    }

    /// Runs a statement and answers its rows.
    pub async fn query<S: ToStatement + ?Sized>(
        &self,
        what: &'static str,
        statement: &S,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, SourceError> {
        self.bounded(what, self.client.query(statement, parameters)).await
    }

    /// Runs a statement that answers exactly one row.
    pub async fn query_one<S: ToStatement + ?Sized>(
        &self,
        what: &'static str,
        statement: &S,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, SourceError> {
        let mut rows = self.query(what, statement, parameters).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(row),
            _ => Err(SourceError::Answer {
                what,
                problem: "it answered another number of rows than one".into(),
            }),
        }
    }

    async fn bounded<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, SourceError> {
        match tokio::time::timeout(self.limit, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if error.is_closed() => {
                let reason = self.ended.get().map_or("connection closed", String::as_str);
                Err(SourceError::Unreachable(format!("{what}: {reason}")))
            }
            Ok(Err(error)) => Err(SourceError::of(what, &error)),
            Err(_) => Err(SourceError::Silent { what, limit: self.limit }),
        }
    }
}
