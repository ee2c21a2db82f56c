// SPDX-License-Identifier: PostgreSQL
//! One database: sessions one after the other, for ever. What a session knew dies with it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info_span, warn};

use crate::config::Database;
use crate::session::{Session, Shared};
use crate::source::connect::Connector;
use crate::source::error::SourceError;

/// The longest time between two attempts to connect.
const AWAY_MAX: Duration = Duration::from_secs(5);

/// Between two attempts where somebody has to mend something first.
const REFUSED: Duration = Duration::from_secs(5);

/// A session that lasted so long begins the back-off anew.
const STABLE: Duration = Duration::from_secs(10);

/// How far a database was served when it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Everything that was delivered is covered by a stored cursor, but for what lies past an event that was not.
    Stored,
    /// The database was away, or went away meanwhile: something that was delivered is delivered again.
    Unstored,
}

/// Keeps a database's sessions going until `stop`.
pub async fn supervise(database: Database, shared: Arc<Shared>, stop: CancellationToken) -> Stopped {
    let span = info_span!("database", name = database.name);
    async {
        let mut unstored = false;
        serve(&database, &shared, &stop, &mut unstored).await;
        if unstored {
            error!("not all cursors could be stored: what they do not cover is delivered again");
            return Stopped::Unstored;
        }
        Stopped::Stored
    }
    .instrument(span)
    .await
}

/// `unstored`: whether the last session that there was has left deliveries that no stored cursor covers. The one after it
/// delivers them again.
async fn serve(database: &Database, shared: &Shared, stop: &CancellationToken, unstored: &mut bool) {
    let mut away = Away::default();
    let connector = loop {
        match Connector::new(database.settings.clone(), shared.config.statement_timeout) {
            Ok(connector) => break connector,
            Err(error) => {
                if away.wait(error, Duration::ZERO, stop).await.is_stopped() {
                    return;
                }
            }
        }
    };
    loop {
        let begun = Instant::now();
        let error = match Session::run(&connector, shared, stop, unstored).await {
            Ok(()) => return,
            Err(error) => error,
        };
        if stop.is_cancelled() {
            warn!("{error}");
            return;
        }
        if away.wait(error, begun.elapsed(), stop).await.is_stopped() {
            return;
        }
    }
}

/// The time without a session. Each new reason is told once.
#[derive(Default)]
struct Away {
    attempts: u32,
    told: Option<SourceError>,
}

enum Waited {
    Enough,
    Stopped,
}

impl Waited {
    fn is_stopped(&self) -> bool {
        matches!(self, Waited::Stopped)
    }
}

impl Away {
    async fn wait(&mut self, error: SourceError, lasted: Duration, stop: &CancellationToken) -> Waited {
        if lasted >= STABLE {
            *self = Away::default();
        }
        if self.told.as_ref() == Some(&error) {
            debug!("{error}");
        } else if error.needs_mending() {
            error!(hint = error.hint(), "not delivering: {error}");
        } else {
            warn!("database away: {error}; trying again until it is back");
        }
        let pause = if error.needs_mending() { REFUSED } else { back_off(self.attempts, rand::random()) };
        self.attempts = self.attempts.saturating_add(1);
        self.told = Some(error);
        tokio::select! {
            () = tokio::time::sleep(pause) => Waited::Enough,
            () = stop.cancelled() => Waited::Stopped,
        }
    }
}

/// From a tenth of a second on, doubling, with a random half. `random` is drawn evenly from `[0, 1)`.
fn back_off(attempts: u32, random: f64) -> Duration {
    let bound = Duration::from_millis(100).saturating_mul(1 << attempts.min(10)).min(AWAY_MAX);
    bound.mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rarer_and_never_stop() {
        assert_eq!(back_off(0, 0.0), Duration::from_millis(50));
        assert_eq!(back_off(3, 0.0), Duration::from_millis(400));
        assert!(back_off(u32::MAX, 0.999) <= AWAY_MAX);
    }
}
