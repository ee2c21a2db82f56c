// SPDX-License-Identifier: PostgreSQL
//! Delayed events go into the log when they are due.

use std::convert::Infallible;
use std::time::Duration;

use super::error::SourceError;
use super::link::Link;

/// Events that one statement moves.
const DUE_ROWS: i32 = 1_000;

/// A delayed event may be published at any time, due at once.
const DUE_EVERY: Duration = Duration::from_millis(250);
/// After an error that the connection survived.
const PAUSE: Duration = Duration::from_secs(10);

/// Moves them until the connection fails.
pub async fn follow(link: Link) -> Result<Infallible, SourceError> {
    let due = link.prepare("moving due events", "SELECT moved, next_in FROM dtm.relay_due($1)").await?;
    loop {
        let pause = match link.query_one("moving due events", &due, &[&DUE_ROWS]).await {
            Ok(row) => pause(row.get(0), row.get(1)),
            Err(error) => error.tolerate().map(|()| PAUSE)?,
        };
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
