// SPDX-License-Identifier: PostgreSQL
//! Which subscriptions this relay delivers, and for how long it may believe so.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Row;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::SourceError;
use super::link::Link;

/// A subscription, or a shard of one, that this relay has to deliver.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The subscription's id.
    pub subscription: i64,
    /// Which shard of it.
    pub shard: i32,
    /// The subscription's name.
    pub name: String,
    /// Its patterns.
    pub topics: Vec<String>,
    /// Where it goes.
    pub destination: String,
    /// Its options as they are stored.
    pub options: serde_json::Value,
    /// Events published before are passed over.
    pub since: Option<SystemTime>,
    /// Raised when its cursor is set by hand.
    pub epoch: i64,
    /// Of the lease: cursors move only under the newest.
    pub token: i64,
}

/// All that a relay owns; `None` until the first heartbeat.
pub type Assignments = Option<Arc<Vec<Assignment>>>;

/// Who the relay is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Drawn anew by each process.
    pub relay: Uuid,
    /// Shown to users as the owner.
    pub name: String,
    /// How long a lease holds without a heartbeat.
    pub lease: Duration,
}

/// What the heartbeats tell the rest of the relay.
pub struct Told {
    /// Until then nobody else takes over. The clock is the relay's own: it counts from before the heartbeat was sent.
    pub valid_until: watch::Sender<Instant>,
    /// What is to be delivered.
    pub assignments: watch::Sender<Assignments>,
}

/// Sends heartbeats until the connection fails, or until `release`, when it gives up all leases.
pub async fn follow(
    link: Link,
    identity: Identity,
    told: Told,
    release: CancellationToken,
) -> Result<(), SourceError> {
    let columns = "subscription, shard, name, topics, destination, options, since, epoch, token";
    let sql = format!("SELECT {columns} FROM dtm.relay_lease($1, $2, $3)");
    let beat = link.prepare("renewing leases", &sql).await?;
    let seconds = identity.lease.as_secs_f64();
    let mut beats = tokio::time::interval((identity.lease / 3).min(Duration::from_secs(1)));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut refused = None;
    loop {
        tokio::select! {
            _ = beats.tick() => {}
            () = release.cancelled() => {
                link.query("releasing leases", "SELECT dtm.relay_release($1)", &[&identity.relay]).await?;
                return Ok(());
            }
        }
        let asked_at = Instant::now();
        match link.query("renewing leases", &beat, &[&identity.relay, &identity.name, &seconds]).await {
            Ok(rows) => {
                refused = None;
                told.valid_until.send_replace(asked_at + identity.lease);
                publish(&told.assignments, rows.iter().map(assignment).collect());
            }
            // Without a lease the pipelines stop by themselves; the next beat may do better.
            Err(error) if error.spares_connection() => {
                if refused.as_ref() != Some(&error) {
                    tracing::error!(hint = error.hint(), "{error}");
                    refused = Some(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn assignment(row: &Row) -> Assignment {
    Assignment {
        subscription: row.get(0),
        shard: row.get(1),
        name: row.get(2),
        topics: row.get(3),
        destination: row.get(4),
        options: row.get(5),
        since: row.get(6),
        epoch: row.get(7),
        token: row.get(8),
    }
}

fn publish(assignments: &watch::Sender<Assignments>, new: Vec<Assignment>) {
    assignments.send_if_modified(|old| {
        let changed = old.as_ref().is_none_or(|old| **old != new);
        if changed {
            *old = Some(Arc::new(new));
        }
        changed
    });
}
