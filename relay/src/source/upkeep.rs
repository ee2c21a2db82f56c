// SPDX-License-Identifier: PostgreSQL
//! What keeps a database in shape: segments turn over, old ids and receipts are purged, and who lags too far behind is told of.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Statement};

use super::error::SourceError;
use super::link::Link;
use super::reminders::Reminders;

/// Steps of one kind that are taken one after the other.
const STEPS: usize = 16;
/// Ids and receipts that one statement purges.
const PURGE_ROWS: i32 = 10_000;

/// How often, and how much.
#[derive(Clone, Copy, Debug)]
pub struct Upkeep {
    /// Between two rounds.
    pub every: Duration,
    /// Cursors, positions, leases and heartbeats turn over at this size, in bytes.
    pub control_bytes: i64,
}

/// Works until the connection fails.
pub async fn follow(link: Link, upkeep: Upkeep) -> Result<Infallible, SourceError> {
    let log = link.prepare("rotating the log", "SELECT dtm.rotate_log()").await?;
    let control = link.prepare("rotating control data", "SELECT dtm.rotate_control($1)").await?;
    let purge = link.prepare("purging", "SELECT dtm.purge($1)").await?;
    let lag = "SELECT name, state, lag_seconds, lag_bytes, lost FROM dtm.watch_lag()";
    let lag = link.prepare("looking who lags behind", lag).await?;
    let mut rounds = tokio::time::interval(upkeep.every);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reminders = Reminders::after(Duration::ZERO);
    loop {
        rounds.tick().await;
        match link.query("looking who lags behind", &lag, &[]).await {
            Ok(rows) => complain(&rows, &mut reminders),
            Err(error) => error.tolerate()?,
        }
        rotate(&link, "rotating the log", &log, &[]).await?;
        rotate(&link, "rotating control data", &control, &[&upkeep.control_bytes]).await?;
        for _ in 0..STEPS {
            match link.query_one("purging", &purge, &[&PURGE_ROWS]).await {
                Ok(row) if row.get::<_, i64>(0) >= i64::from(PURGE_ROWS) => {}
                Ok(_) => break,
                Err(error) => {
                    error.tolerate()?;
                    break;
                }
            }
        }
    }
}

/// Goes on for as long as there is a step to take.
async fn rotate(
    link: &Link,
    what: &'static str,
    step: &Statement,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<(), SourceError> {
    for _ in 0..STEPS {
        match link.query_one(what, step, parameters).await.map(|row| row.get::<_, Option<String>>(0)) {
            Ok(Some(done)) => tracing::debug!("{what}: a segment is {done}"),
            Ok(None) => break,
            Err(error) => return error.tolerate(),
        }
    }
    Ok(())
}

fn complain(rows: &[Row], reminders: &mut Reminders<String>) {
    let is_dropped = |row: &&Row| row.get::<_, Option<&str>>(4).is_some();
    let (dropped, late): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(is_dropped);
    let lag = |row: &Row| (row.get::<_, Option<f64>>(2), row.get::<_, Option<i64>>(3));
    for row in dropped {
        let (name, lost) = (row.get::<_, &str>(0), row.get::<_, &str>(4));
        let ((lag_seconds, lag_bytes), hint) = (lag(row), "dtm.rewind brings it back");
        tracing::error!(
            subscription = name,
            lag_seconds,
            lag_bytes,
            hint,
            "it lagged too far behind and is dropped: it has lost {lost}"
        );
    }
    let names: Vec<String> = late.iter().map(|row| row.get(0)).collect();
    let due = reminders.due(&names, Instant::now());
    for row in late.into_iter().filter(|row| due.contains(&row.get(0))) {
        let (name, state) = (row.get::<_, &str>(0), row.get::<_, &str>(1));
        let (lag_seconds, lag_bytes) = lag(row);
        tracing::warn!(
            subscription = name,
            state,
            lag_seconds,
            lag_bytes,
            "it lags far behind, and the log is kept for it"
        );
    }
}
