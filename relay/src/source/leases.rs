// SPDX-License-Identifier: PostgreSQL
//! Which subscriptions this relay delivers, and for how long it may believe so.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::{Row, Statement};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::SourceError;
use super::link::Link;
use super::pages::Unit;

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
    /// Into how many shards it is split.
    pub shards: i32,
    /// Raised when its cursor is set by hand.
    pub epoch: i64,
    /// Raised when what is parked or dead was changed by hand.
    pub revision: i64,
    /// Of the lease: cursors move only under the newest.
    pub token: i64,
    /// This relay has more than its share: what is in flight is waited for, and another relay takes over.
    pub release: bool,
}

impl Assignment {
    /// What it is a part of.
    pub fn unit(&self) -> Unit {
        Unit { subscription: self.subscription, shard: self.shard, shards: self.shards }
    }
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
    /// What is no longer delivered here, and another relay may have: the pipeline has ended.
    pub given: mpsc::Receiver<Given>,
}

/// A lease that is given up.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// The subscription's id.
    pub subscription: i64,
    /// The shard.
    pub shard: i32,
    /// Of the lease.
    pub token: i64,
}

/// Sends heartbeats until the connection fails, or until `release`, when it gives up all leases.
pub async fn follow(
    link: Link,
    identity: Identity,
    mut told: Told,
    release: CancellationToken,
) -> Result<(), SourceError> {
    let columns = "subscription, shard, name, topics, destination, options, since, epoch, token, shards, revision, release";
    let sql = format!("SELECT {columns} FROM dtm.relay_assign($1, $2, $3)");
    let beat = link.prepare("renewing leases", &sql).await?;
    let give = link.prepare("giving up leases", "SELECT dtm.relay_give($1, $2, $3, $4)").await?;
    link.query("beginning with new leases", "SELECT dtm.relay_begin($1)", &[&identity.relay]).await?;
    let seconds = identity.lease.as_secs_f64();
    let mut beats = tokio::time::interval((identity.lease / 3).min(Duration::from_secs(1)));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut refused = None;
    loop {
        tokio::select! {
            _ = beats.tick() => {}
            Some(first) = told.given.recv() => {
                let mut given = vec![first];
                while let Ok(more) = told.given.try_recv() {
                    given.push(more);
                }
                give_up(&link, &give, identity.relay, &given).await?;
                continue;
            }
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
        shards: row.get(9),
        revision: row.get(10),
        release: row.get(11),
    }
}

async fn give_up(link: &Link, give: &Statement, relay: Uuid, given: &[Given]) -> Result<(), SourceError> {
    let subscriptions: Vec<i64> = given.iter().map(|given| given.subscription).collect();
    let shards: Vec<i32> = given.iter().map(|given| given.shard).collect();
    let tokens: Vec<i64> = given.iter().map(|given| given.token).collect();
    match link.query("giving up leases", give, &[&relay, &subscriptions, &shards, &tokens]).await {
        Ok(_) => Ok(()),
        // It is asked for again with the next heartbeat.
        Err(error) if error.spares_connection() => {
            tracing::warn!(hint = error.hint(), "{error}");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn publish(assignments: &watch::Sender<Assignments>, new: Vec<Assignment>) {
    assignments.send_if_modified(|old| {
        // What is asked for back is told with each heartbeat, until it is given.
        let changed =
            old.as_ref().is_none_or(|old| **old != new) || new.iter().any(|assignment| assignment.release);
        if changed {
            *old = Some(Arc::new(new));
        }
        changed
    });
}
