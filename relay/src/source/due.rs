// SPDX-License-Identifier: PostgreSQL
//! What is done by time: delayed events go into the log when they are due, old ids and receipts are purged.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::Instant;

use super::error::SourceError;
use super::link::Link;

/// Events that one statement moves, and ids that one purges.
const DUE_ROWS: i32 = 1_000;
const PURGE_ROWS: i32 = 10_000;

/// A delayed event may be published at any time, due at once.
const DUE_EVERY: Duration = Duration::from_millis(250);
const PURGE_EVERY: Duration = Duration::from_secs(60);
/// After an error that the connection survived.
const PAUSE: Duration = Duration::from_secs(10);

/// Moves and purges until the connection fails.
pub async fn follow(link: Link) -> Result<Infallible, SourceError> {
    let due = link.prepare("moving due events", "SELECT moved, next_in FROM dtm.relay_due($1)").await?;
    let purge = link.prepare("purging", "SELECT dtm.purge($1)").await?;
    let mut purge_at = Instant::now() + PURGE_EVERY;
    loop {
        let pause = match link.query_one("moving due events", &due, &[&DUE_ROWS]).await {
            Ok(row) => pause(row.get(0), row.get(1)),
            Err(error) => tolerate(error)?,
        };
        if Instant::now() >= purge_at {
            let purged = match link.query_one("purging", &purge, &[&PURGE_ROWS]).await {
                Ok(row) => row.get::<_, i64>(0),
                Err(error) => tolerate(error).map(|_| 0)?,
            };
            let more = purged >= i64::from(PURGE_ROWS);
            purge_at = Instant::now() + if more { DUE_EVERY } else { PURGE_EVERY };
        }
        tokio::time::sleep(pause).await;
    }
}

fn pause(moved: i32, next_in: Option<f64>) -> Duration {
    if moved >= DUE_ROWS {
        return Duration::ZERO;
    }
    let next = Duration::try_from_secs_f64(next_in.unwrap_or(f64::MAX).max(0.001)).unwrap_or(DUE_EVERY);
    next.min(DUE_EVERY)
}

/// An error of the statement alone holds up nothing else.
fn tolerate(error: SourceError) -> Result<Duration, SourceError> {
    if !error.spares_connection() {
        return Err(error);
    }
    tracing::warn!(hint = error.hint(), "{error}");
    Ok(PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_look_comes_when_something_is_due_but_soon() {
        assert_eq!(pause(0, None), DUE_EVERY);
        assert_eq!(pause(0, Some(30.0)), DUE_EVERY);
        assert_eq!(pause(3, Some(0.1)), Duration::from_millis(100));
        assert_eq!(pause(3, Some(-5.0)), Duration::from_millis(1));
        assert_eq!(pause(DUE_ROWS, Some(60.0)), Duration::ZERO);
    }
}
