// SPDX-License-Identifier: PostgreSQL
//! What keeps a database in shape: segments turn over, old ids and receipts are purged, and who lags too far behind is told of.

use std::collections::HashMap;
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
    /// A subscription that lags too far behind and does not catch up is dropped after so long, if it says so.
    pub lag_patience: Duration,
}

/// Works until the connection fails.
pub async fn follow(link: Link, upkeep: Upkeep) -> Result<Infallible, SourceError> {
    let log = link.prepare("rotating the log", "SELECT dtm.rotate_log()").await?;
    let control = link.prepare("rotating control data", "SELECT dtm.rotate_control($1)").await?;
    let purge = link.prepare("purging", "SELECT dtm.purge($1)").await?;
    let mut lag = Lag::watch(&link, upkeep.lag_patience).await?;
    let mut rounds = tokio::time::interval(upkeep.every);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        lag.look(&link).await?;
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

/// Who lags behind: told of, and dropped after a while.
struct Lag {
    look: Statement,
    drop: Statement,
    patience: Patience,
    late: Reminders<String>,
    lost: Reminders<String>,
}

impl Lag {
    async fn watch(link: &Link, patience: Duration) -> Result<Self, SourceError> {
        let look = "SELECT id, name, state, terms, lag_seconds, lag_events, lag_bytes, has_cursor, may_be_dropped \
                    FROM dtm.watch_lag()";
        Ok(Lag {
            look: link.prepare("looking who lags behind", look).await?,
            drop: link.prepare("dropping who lags behind", "SELECT dtm.drop_late($1, $2, $3)").await?,
            patience: Patience::of(patience),
            late: Reminders::after(Duration::ZERO),
            lost: Reminders::after(Duration::ZERO),
        })
    }

    async fn look(&mut self, link: &Link) -> Result<(), SourceError> {
        let rows = match link.query("looking who lags behind", &self.look, &[]).await {
            Ok(rows) => rows,
            Err(error) => return error.tolerate(),
        };
        if rows.iter().any(|row| row.get::<_, Option<i64>>(0).is_none()) {
            return Ok(()); // another relay is looking, or a restore is not complete
        }
        let (mut late, lost): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.get(7));
        let looks = late.iter().filter(|row| row.get(8));
        let looks = looks.map(|row| (row.get(0), Look { terms: row.get(3), events: row.get(5) })).collect();
        for (id, first) in self.patience.exhausted(looks, Instant::now()) {
            match link
                .query_one("dropping who lags behind", &self.drop, &[&id, &first.terms, &first.events])
                .await
            {
                Ok(row) => {
                    let Some(lost) = row.get::<_, Option<&str>>(0) else { continue };
                    for row in late.extract_if(.., |row| row.get::<_, i64>(0) == id) {
                        tell_of_drop(row, lost);
                    }
                }
                Err(error) => error.tolerate()?,
            }
        }
        for row in due(&mut self.late, late) {
            let (name, state) = (row.get::<_, &str>(1), row.get::<_, &str>(2));
            let (lag_seconds, lag_bytes) = measures(row);
            tracing::warn!(
                subscription = name,
                state,
                lag_seconds,
                lag_bytes,
                "it lags far behind, and the log is kept for it"
            );
        }
        for row in due(&mut self.lost, lost) {
            let (name, state) = (row.get::<_, &str>(1), row.get::<_, &str>(2));
            let hint = "dtm.rewind sets one: to 'now', to 'earliest', or to a time";
            tracing::error!(
                subscription = name,
                state,
                hint,
                "it has no cursor, and all of the log is kept for it"
            );
        }
        Ok(())
    }
}

/// Those that are to be told of.
fn due<'a>(reminders: &mut Reminders<String>, mut rows: Vec<&'a Row>) -> Vec<&'a Row> {
    let names: Vec<String> = rows.iter().map(|row| row.get(1)).collect();
    let due = reminders.due(&names, Instant::now());
    rows.retain(|row| due.contains(&row.get(1)));
    rows
}

fn measures(row: &Row) -> (Option<f64>, Option<i64>) {
    (row.get(4), row.get(6))
}

fn tell_of_drop(row: &Row, lost: &str) {
    let (name, (lag_seconds, lag_bytes)) = (row.get::<_, &str>(1), measures(row));
    let hint = "dtm.rewind brings it back";
    tracing::error!(
        subscription = name,
        lag_seconds,
        lag_bytes,
        hint,
        "it lagged too far behind and is dropped: it has lost {lost}"
    );
}

/// What was seen of a subscription that lags too far behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    /// If they are others, somebody has done something about it.
    terms: i64,
    /// How many events it has not had.
    events: i64,
}

/// When subscriptions that lag too far behind were seen first: who catches up is given the time that it takes.
struct Patience {
    length: Duration,
    known: HashMap<i64, (Instant, Look)>,
}

impl Patience {
    fn of(length: Duration) -> Self {
        Patience { length, known: HashMap::new() }
    }

    /// These, and no others, lag too far behind now. Answers those that do since long and have not caught up, with the first
    /// look at them.
    fn exhausted(&mut self, late: Vec<(i64, Look)>, now: Instant) -> Vec<(i64, Look)> {
        let before = std::mem::take(&mut self.known);
        let mut exhausted = Vec::new();
        for (id, look) in late {
            let first = before.get(&id).copied().filter(|(_, first)| first.terms == look.terms);
            let (mut since, mut first) = first.unwrap_or((now, look));
            if now.duration_since(since) >= self.length {
                if look.events < first.events {
                    (since, first) = (now, look);
                } else {
                    exhausted.push((id, first));
                }
            }
            self.known.insert(id, (since, first));
        }
        exhausted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn look(events: i64) -> Look {
        Look { terms: 7, events }
    }

    #[test]
    fn who_is_late_at_two_looks_and_has_not_caught_up_between_them_has_exhausted_the_patience() {
        let (mut patience, begin) = (Patience::of(60 * SECOND), Instant::now());
        assert!(patience.exhausted(vec![(1, look(10)), (2, look(10)), (3, look(10))], begin).is_empty());
        // Of the looks between them none counts but for who is not late at all.
        assert!(patience.exhausted(vec![(1, look(5)), (2, look(20))], begin + 59 * SECOND).is_empty());
        let later = vec![(1, look(10)), (2, look(9)), (3, look(10))];
        assert_eq!(patience.exhausted(later.clone(), begin + 60 * SECOND), [(1, look(10))]);
        // What had caught up a little is given as long again.
        assert_eq!(patience.exhausted(later.clone(), begin + 119 * SECOND), [(1, look(10))]);
        assert_eq!(
            patience.exhausted(later, begin + 120 * SECOND),
            [(1, look(10)), (2, look(9)), (3, look(10))]
        );
    }

    #[test]
    fn where_somebody_has_done_something_patience_begins_anew() {
        let (mut patience, begin) = (Patience::of(60 * SECOND), Instant::now());
        assert!(patience.exhausted(vec![(1, look(10))], begin).is_empty());
        let other = Look { terms: 8, events: 10 };
        assert!(patience.exhausted(vec![(1, other)], begin + 60 * SECOND).is_empty());
        assert_eq!(patience.exhausted(vec![(1, other)], begin + 120 * SECOND), [(1, other)]);
    }

    #[test]
    fn without_patience_the_first_look_decides() {
        assert_eq!(
            Patience::of(Duration::ZERO).exhausted(vec![(1, look(3))], Instant::now()),
            [(1, look(3))]
        );
    }
}
