// SPDX-License-Identifier: PostgreSQL
//! What can go wrong between the relay and a database.

use std::error::Error as _;
use std::time::Duration;

use tokio_postgres::error::SqlState;

use super::tls::TlsError;
use super::url::UrlError;
use crate::causes::with_causes;

/// A failure at a database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The connection URL is wrong. Nothing but another URL helps.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// A certificate or key that the URL names cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No connection came about, or one that was there is gone.
    #[error("{0}")]
    Unreachable(String),
    /// A call was not answered in time: the network is silent, or the server is stuck.
    #[error("{what}: no answer within {} s", limit.as_secs_f64())]
    Silent {
        /// The call.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The database answered an error.
    #[error("{what}: {message} (SQLSTATE {sqlstate}){}", detail.as_ref().map(|d| format!(" {d}")).unwrap_or_default())]
    Database {
        /// The call.
        what: &'static str,
        /// The five characters.
        sqlstate: String,
        /// The error's message.
        message: String,
        /// The error's detail.
        detail: Option<String>,
        /// The error's hint.
        hint: Option<String>,
    },
    /// The database is not one that this relay can deliver from.
    #[error("{problem}")]
    Unfit {
        /// What is wrong.
        problem: String,
        /// How to mend it.
        hint: String,
    },
    /// The database answered something that this relay does not understand.
    #[error("{what}: {problem}")]
    Answer {
        /// The call.
        what: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },
}

impl SourceError {
    /// Whether somebody has to change something before another try can help: such tries are made slowly.
    pub fn needs_mending(&self) -> bool {
        match self {
            SourceError::Url(_)
            | SourceError::Tls(_)
            | SourceError::Unfit { .. }
            | SourceError::Answer { .. } => true,
            SourceError::Unreachable(_) | SourceError::Silent { .. } => false,
            // Connection exceptions, resources, operator intervention (shutdown, crash, start-up) and conflicts pass.
            SourceError::Database { sqlstate, .. } => {
                !["08", "40", "53", "57", "58"].contains(&&sqlstate[..sqlstate.len().min(2)])
            }
        }
    }

    /// Whether the connection that it came over is still good: the database refused this one statement.
    pub fn spares_connection(&self) -> bool {
        matches!(self, SourceError::Database { sqlstate, .. } if !sqlstate.starts_with("08") && !sqlstate.starts_with("57P"))
    }

    /// Whether somebody else's transaction was in the way.
    pub fn is_lock_not_available(&self) -> bool {
        self.sqlstate() == Some(SqlState::LOCK_NOT_AVAILABLE.code())
    }

    /// Passes over an error of the statement alone, which holds up nothing else, and tells of it.
    pub(super) fn tolerate(self) -> Result<(), Self> {
        if !self.spares_connection() {
            return Err(self);
        }
        tracing::warn!(hint = self.hint(), "{self}");
        Ok(())
    }

    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            SourceError::Database { hint, .. } => hint.as_deref(),
            SourceError::Unfit { hint, .. } => Some(hint),
            _ => None,
        }
    }

    /// The SQLSTATE, if the database answered one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            SourceError::Database { sqlstate, .. } => Some(sqlstate),
            _ => None,
        }
    }

    /// The failure of a call by what the driver says.
    pub(super) fn of(what: &'static str, error: &tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => SourceError::Database {
                what,
                sqlstate: db.code().code().to_owned(),
                message: db.message().to_owned(),
                detail: db.detail().map(str::to_owned),
                hint: db.hint().map(str::to_owned).or_else(|| grant_hint(db.code())),
            },
            None => SourceError::Unreachable(format!("{what}: {}", with_causes(error))),
        }
    }
}

fn grant_hint(code: &SqlState) -> Option<String> {
    (*code == SqlState::INSUFFICIENT_PRIVILEGE)
        .then(|| "Run \"dtm-relay check\": it names the privileges that are missing.".to_owned())
}

/// The failure of a connection attempt, in which the driver wraps what the server said.
pub(super) fn connecting(error: &tokio_postgres::Error) -> SourceError {
    match error.as_db_error() {
        Some(_) => SourceError::of("connecting", error),
        None => match error.source() {
            Some(cause) => SourceError::Unreachable(format!("{error}: {}", with_causes(cause))),
            None => SourceError::Unreachable(error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(sqlstate: &str) -> SourceError {
        let sqlstate = sqlstate.to_owned();
        SourceError::Database { what: "x", sqlstate, message: "m".into(), detail: None, hint: None }
    }

    #[test]
    fn a_restart_passes_and_a_refusal_does_not() {
        for passes in ["57P01", "57P03", "53300", "08006", "40001"] {
            assert!(!database(passes).needs_mending(), "{passes}");
        }
        for stays in ["55000", "42501", "28P01", "3D000"] {
            assert!(database(stays).needs_mending(), "{stays}");
        }
        assert!(database("42501").spares_connection());
        assert!(!database("57P01").spares_connection());
        assert!(!SourceError::Unreachable("gone".into()).spares_connection());
    }
}
