// SPDX-License-Identifier: PostgreSQL
//! The head of the log, read once for all subscriptions of a database.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_postgres::Statement;

use super::error::SourceError;
use super::hello::Greeting;
use super::link::Link;
use super::mark::Mark;

/// The head of the log as it is published: nothing before it was read once.
pub type Head = Option<Arc<Mark>>;

/// How often the head is read.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// While there is traffic.
    pub busy: Duration,
    /// When there has been none for long.
    pub idle: Duration,
}

impl Pace {
    /// The time to the next look, by how long ago the head last moved: a twentieth of it, so
    /// that an event waits for a small part of the time that none came.
    fn after(&self, quiet: Duration) -> Duration {
        (quiet / 20).clamp(self.busy, self.idle)
    }
}

/// One waiting call: it ends by itself, so that a relay that has gone leaves nothing behind for long.
const WAIT_MS: i32 = 2_000;

/// Reads the head until the connection fails, and publishes each new one.
pub async fn follow(
    link: Link,
    greeting: Greeting,
    pace: Pace,
    heads: watch::Sender<Head>,
) -> Result<Infallible, SourceError> {
    let poll = link.prepare("reading the head", "SELECT dtm.relay_poll($1)").await?;
    let mut wait = if greeting.preloaded { Some(prepare_wait(&link).await?) } else { None };
    let mut known: Head = None;
    let mut moved_at = Instant::now();
    loop {
        if let Some(mark) = look(&link, &poll, known.as_deref()).await? {
            if mark.era() != greeting.era {
                return Err(SourceError::Unreachable("the database has begun a new era".into()));
            }
            moved_at = Instant::now();
            heads.send_replace(Some(mark.clone()));
            known = Some(mark);
        }
        match (&wait, &known) {
            (Some(statement), Some(known)) => {
                tokio::time::sleep(pace.busy).await;
                if !sleep_until_woken(&link, statement, known).await? {
                    tracing::warn!(
                        "no place is left among the relays that wait at this server: polling instead"
                    );
                    wait = None;
                }
            }
            _ => tokio::time::sleep(pace.after(moved_at.elapsed())).await,
        }
    }
}

async fn look(link: &Link, poll: &Statement, known: Option<&Mark>) -> Result<Head, SourceError> {
    let what = "reading the head";
    let row = link.query_one(what, poll, &[&known.map(Mark::text)]).await?;
    row.get::<_, Option<String>>(0).map(|text| Mark::parse(what, text)).transpose()
}

async fn prepare_wait(link: &Link) -> Result<Statement, SourceError> {
    // A backend that sleeps does not see by itself that its client has gone. Not every system can look.
    let check = link.batch("preparing to wait", "SET client_connection_check_interval = '1s'").await;
    match check {
        Err(error) if !error.spares_connection() => return Err(error),
        Err(error) => tracing::debug!("the server cannot look for clients that have gone: {error}"),
        Ok(()) => {}
    }
    link.prepare("preparing to wait", "CALL dtm.relay_wait($1, $2)").await
}

/// Waits at the server until there is something past `known`, or a while; false if it has no place to wait.
async fn sleep_until_woken(link: &Link, wait: &Statement, known: &Mark) -> Result<bool, SourceError> {
    match link.query("waiting", wait, &[&known.text(), &WAIT_MS]).await {
        Ok(_) => Ok(true),
        Err(error) if error.sqlstate() == Some("55000") => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_slows_down_with_quiet() {
        let ms = Duration::from_millis;
        let pace = Pace { busy: ms(1), idle: ms(100) };
        assert_eq!(pace.after(ms(0)), ms(1));
        assert_eq!(pace.after(ms(100)), ms(5));
        assert_eq!(pace.after(ms(1_000)), ms(50));
        assert_eq!(pace.after(ms(60_000)), ms(100));
    }
}
