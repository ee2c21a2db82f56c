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
use super::pages::PAGE;
use super::tail::Tail;

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

/// At so many events in a [`Pace::busy`] the pause is twice as long, and so on up to five times: the more there is, the less
/// it matters when it is read, and the more it costs to read it piece by piece.
const EVENTS_PER_LOOK: f64 = 1.0;
const BUSY_MAX: f64 = 5.0;

impl Pace {
    /// The time to the next look after one that found something: `events` since the one before, `elapsed` ago.
    fn under_traffic(&self, events: i64, elapsed: Duration) -> Duration {
        let looks = elapsed.as_secs_f64() / self.busy.as_secs_f64();
        self.busy.mul_f64((events as f64 / looks.max(1.0) / EVENTS_PER_LOOK).clamp(1.0, BUSY_MAX))
    }

    /// The time to the next look after one that found nothing, by how long ago the head last moved: a twentieth of it, so
    /// that an event waits for a small part of the time that none came.
    fn in_quiet(&self, quiet: Duration) -> Duration {
        (quiet / 20).clamp(self.busy, self.idle)
    }

    /// The least pause after a look that found something, by how long the last ones took. Such a look copies the server's
    /// table of locks, and everybody who takes or releases one waits meanwhile; with very many locks that is milliseconds,
    /// and looks without a pause between them would stand in the way of those who publish. `usual` is what a look may take.
    fn after_slow_looks(&self, last: [Duration; 3], usual: Duration) -> Duration {
        // The shortest: one that took long by chance tells nothing about the next.
        let took = last.into_iter().min().unwrap_or_default();
        (took.saturating_sub(usual) * PAUSE_FOR_SLOWNESS).min(self.idle)
    }
}

const PAUSE_FOR_SLOWNESS: u32 = 10;

/// What a look may take beyond the way there and back: it waits until what it has seen is flushed.
const USUAL_LOOK: Duration = Duration::from_millis(5);

/// One waiting call: it ends by itself, so that a relay that has gone leaves nothing behind for long.
const WAIT_MS: i32 = 2_000;

/// Reads the head until the connection fails, and publishes each new one; before that, the window up to it for those who
/// wait there.
pub async fn follow(
    link: Link,
    greeting: Greeting,
    pace: Pace,
    tail: Arc<Tail>,
    heads: watch::Sender<Head>,
) -> Result<Infallible, SourceError> {
    let poll = link.prepare("reading the head", "SELECT dtm.relay_poll($1)").await?;
    let page = link.prepare("preparing to read pages", PAGE).await?;
    let mut wait = if greeting.preloaded { Some(prepare_wait(&link).await?) } else { None };
    let usual = round_trip(&link).await? + USUAL_LOOK;
    let mut known: Head = None;
    let mut moved_at = Instant::now();
    let mut looks = [Duration::ZERO; 3];
    loop {
        let asked_at = Instant::now();
        if let Some(mark) = look(&link, &poll, known.as_deref()).await? {
            looks = [looks[1], looks[2], asked_at.elapsed()];
            if mark.era() != greeting.era {
                return Err(SourceError::Unreachable("the database has begun a new era".into()));
            }
            let events = known.as_ref().map_or(0, |known| mark.position().seq - known.position().seq);
            let pause = pace.under_traffic(events, moved_at.elapsed());
            moved_at = Instant::now();
            if let Some(known) = &known {
                tail.read(&link, &page, known, &mark).await?;
            }
            heads.send_replace(Some(mark.clone()));
            known = Some(mark);
            tokio::time::sleep(pause.max(pace.after_slow_looks(looks, usual))).await;
            continue;
        }
        match (&wait, &known) {
            (Some(statement), Some(known)) => {
                if !sleep_until_woken(&link, statement, known).await? {
                    tracing::warn!(
                        "no place is left among the relays that wait at this server: polling instead"
                    );
                    wait = None;
                }
            }
            _ => tokio::time::sleep(pace.in_quiet(moved_at.elapsed())).await,
        }
    }
}

/// The way to the server and back, of several the shortest: a server far away is no slow one.
async fn round_trip(link: &Link) -> Result<Duration, SourceError> {
    let mut shortest = Duration::MAX;
    for _ in 0..3 {
        let asked_at = Instant::now();
        link.batch("measuring the way", "").await?;
        shortest = shortest.min(asked_at.elapsed());
    }
    Ok(shortest)
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
        assert_eq!(pace.in_quiet(ms(0)), ms(1));
        assert_eq!(pace.in_quiet(ms(100)), ms(5));
        assert_eq!(pace.in_quiet(ms(1_000)), ms(50));
        assert_eq!(pace.in_quiet(ms(60_000)), ms(100));
    }

    #[test]
    fn slow_looks_are_followed_by_ten_times_their_excess_and_never_by_more_than_the_idle_pause() {
        let ms = Duration::from_millis;
        let pace = Pace { busy: ms(1), idle: ms(100) };
        let after = |last: [u64; 3], usual| pace.after_slow_looks(last.map(ms), ms(usual));
        assert_eq!(after([2, 2, 2], 5), ms(0), "a flush is no slowness");
        assert_eq!(after([25, 25, 25], 25), ms(0), "nor is a long way");
        assert_eq!(after([2, 60, 60], 5), ms(0), "nor is chance");
        assert_eq!(after([9, 10, 12], 5), ms(40));
        assert_eq!(after([500, 500, 500], 5), ms(100));
    }

    #[test]
    fn the_more_there_is_the_more_is_read_at_once() {
        let ms = Duration::from_millis;
        let pace = Pace { busy: ms(1), idle: ms(100) };
        assert_eq!(pace.under_traffic(0, ms(50)), ms(1));
        assert_eq!(pace.under_traffic(2, ms(2)), ms(1), "1,000 a second");
        assert_eq!(pace.under_traffic(6, ms(2)), ms(3), "3,000 a second");
        assert_eq!(pace.under_traffic(80, ms(5)), ms(5), "16,000 a second");
        assert_eq!(pace.under_traffic(1, Duration::ZERO), ms(1));
    }
}
