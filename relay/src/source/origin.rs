// SPDX-License-Identifier: PostgreSQL
//! Which server a connection has reached. What a session learns over one connection it uses over the others: in the middle
//! of a failover, or behind a pooler, they need not have reached the same server.

use std::time::SystemTime;

use super::error::SourceError;
use super::link::Link;

/// One run of one server, and the database in it. The same however it is reached: by another name, address, socket or
/// through a pooler. Two servers are told apart by the microsecond of their starts; a standby and its primary have all else
/// in common. Every role may ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    started_at: SystemTime,
    database: u32,
}

impl Origin {
    async fn of(link: &Link) -> Result<Self, SourceError> {
        let sql = "SELECT pg_catalog.pg_postmaster_start_time(), oid FROM pg_catalog.pg_database \
                   WHERE datname = pg_catalog.current_database()";
        let row = link.query_one("asking which server it is", sql, &[]).await?;
        Ok(Origin { started_at: row.get(0), database: row.get(1) })
    }
}

/// Refuses connections that have not all reached the same server. Another try may find them together.
pub async fn same(first: &Link, others: &[Link]) -> Result<(), SourceError> {
    let expected = Origin::of(first).await?;
    for other in others {
        if Origin::of(other).await? != expected {
            return Err(SourceError::Unreachable("connections have reached different servers".into()));
        }
    }
    Ok(())
}
