// SPDX-License-Identifier: PostgreSQL
//! Storing how far each subscription has come, and what became of events that failed: all that moved in one statement, a few
//! times a second.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_postgres::Statement;
use tokio_util::sync::CancellationToken;

use super::batch::{self, Batch};
use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;
use super::settlement::{self, Settlement};

/// Between two statements at the least.
const EVERY: Duration = Duration::from_millis(100);

/// After a statement that the database refused.
const REFUSED: Duration = Duration::from_millis(500);

/// A refusal that stays is told so often.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A move that says no more than "nothing for this subscription came by" may wait this long.
const IDLE_EVERY: Duration = Duration::from_secs(1);

/// Whose cursor it is, and by which right it is moved.
#[derive(Clone, Debug)]
pub struct Owner {
    /// The subscription's id.
    pub subscription: i64,
    /// The shard.
    pub shard: i32,
    /// The epoch that its pipeline works in.
    pub epoch: i64,
    /// The token of its lease.
    pub token: i64,
    /// Cancelled when the database says that the epoch or the token is no longer the newest.
    pub fenced: CancellationToken,
}

/// How far a subscription has come.
#[derive(Clone, Debug)]
pub struct Cursor {
    /// Everything before it is acknowledged.
    pub position: Arc<Mark>,
    /// The end of the window that is being delivered; `None` between windows.
    pub target: Option<Arc<Mark>>,
    /// Up to this sequence number that window is acknowledged.
    pub acked: i64,
    /// Beyond that, what is delivered already; only told by a pipeline that ends.
    pub ahead: Vec<i64>,
}

/// A cursor that moved, and the events that have to be settled with it.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) owner: Owner,
    pub(super) cursor: Cursor,
    pub(super) settlements: Vec<Settlement>,
    due: Instant,
    /// It covers events, or settles some.
    soon: bool,
}

impl Move {
    /// Whether it was left by this owner: one of an earlier token or epoch would be refused.
    fn is_of(&self, owner: &Owner) -> bool {
        (self.owner.epoch, self.owner.token) == (owner.epoch, owner.token)
    }
}

#[derive(Default)]
struct Waiting {
    /// The newest move of each subscription and shard: no more than there are pipelines.
    moves: HashMap<(i64, i32), Move>,
    /// How many barriers were asked for.
    barriers: u64,
    /// Moves that cover events were taken, and it is not known yet whether they are stored.
    under_way: bool,
}

/// Where pipelines leave their moves.
#[derive(Default)]
pub struct Cursors {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    passed: watch::Sender<u64>,
}

impl Cursors {
    /// Leaves a move to be stored. `soon`: it covers events, so that storing it soon spares duplicates after a crash.
    pub fn moved(&self, owner: &Owner, cursor: Cursor, mut settlements: Vec<Settlement>, soon: bool) {
        let now = Instant::now();
        let mut soon = soon || !settlements.is_empty();
        let mut due = if soon { now } else { now + IDLE_EVERY };
        let mut waiting = self.lock();
        let key = (owner.subscription, owner.shard);
        if let Some(mut earlier) = waiting.moves.remove(&key).filter(|earlier| earlier.is_of(owner)) {
            due = due.min(earlier.due);
            soon |= earlier.soon;
            settlement::follow(&mut earlier.settlements, settlements);
            settlements = earlier.settlements;
        }
        waiting.moves.insert(key, Move { owner: owner.clone(), cursor, settlements, due, soon });
        drop(waiting);
        self.arrived.notify_one();
    }

    /// What was taken could not be stored: it is due again, before what has come since.
    fn put_back(&self, moves: Vec<Move>, due: Instant) {
        let mut waiting = self.lock();
        for mut earlier in moves {
            earlier.due = due;
            match waiting.moves.entry((earlier.owner.subscription, earlier.owner.shard)) {
                Entry::Vacant(place) => {
                    place.insert(earlier);
                }
                Entry::Occupied(mut later) if later.get().is_of(&earlier.owner) => {
                    let later = later.get_mut();
                    settlement::follow(&mut earlier.settlements, std::mem::take(&mut later.settlements));
                    later.settlements = earlier.settlements;
                    later.due = due;
                    later.soon |= earlier.soon;
                }
                // What an earlier owner left would be refused.
                Entry::Occupied(_) => {}
            }
        }
        waiting.under_way = false;
    }

    /// What was taken is stored, or refused for good.
    fn settled(&self, barriers: u64) {
        self.lock().under_way = false;
        self.passed.send_replace(barriers);
    }

    /// Whether events are delivered that no stored cursor covers: they would be delivered again.
    pub fn has_unstored(&self) -> bool {
        let waiting = self.lock();
        waiting.under_way || waiting.moves.values().any(|entry| entry.soon)
    }

    /// Waits until every move that was left before is stored or refused.
    pub async fn barrier(&self) {
        let mut passed = self.passed.subscribe();
        let mine = {
            let mut waiting = self.lock();
            waiting.barriers += 1;
            waiting.barriers
        };
        self.arrived.notify_one();
        let _ = passed.wait_for(|&passed| passed >= mine).await;
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is due, or all of it if somebody waits; and the number of barriers that are passed with it.
    pub(super) fn take(&self, now: Instant) -> (Vec<Move>, u64) {
        let mut waiting = self.lock();
        let all = waiting.barriers > *self.passed.borrow();
        let due: Vec<Move> =
            waiting.moves.extract_if(|_, entry| all || entry.due <= now).map(|(_, entry)| entry).collect();
        waiting.under_way = due.iter().any(|entry| entry.soon);
        (due, waiting.barriers)
    }

    fn next_due(&self) -> Option<Instant> {
        self.lock().moves.values().map(|entry| entry.due).min()
    }

    async fn wait(&self) {
        match self.next_due() {
            Some(due) => {
                let _ = tokio::time::timeout_at(due, self.arrived.notified()).await;
            }
            None => self.arrived.notified().await,
        }
    }
}

/// Stores moves until the connection fails. What is delivered does not depend on it: a table that somebody has locked for
/// long holds up the cursors alone.
pub async fn follow(link: Link, cursors: Arc<Cursors>) -> Result<Infallible, SourceError> {
    let statement = link.prepare("preparing to move cursors", batch::SQL).await?;
    let mut told: Option<(SourceError, Instant)> = None;
    loop {
        cursors.wait().await;
        let begun = Instant::now();
        let (moves, barriers) = cursors.take(begun);
        if moves.is_empty() {
            cursors.settled(barriers);
            continue;
        }
        match store(&link, &statement, &moves).await {
            Ok(busy) => {
                told = None;
                let is_busy = |at: usize| i32::try_from(at + 1).is_ok_and(|place| busy.contains(&place));
                let moves = moves.into_iter().enumerate().filter(|(at, _)| is_busy(*at));
                let left: Vec<Move> = moves.map(|(_, entry)| entry).collect();
                match left.is_empty() {
                    true => cursors.settled(barriers),
                    false => cursors.put_back(left, begun + EVERY),
                }
                tokio::time::sleep_until(begun + EVERY).await;
            }
            Err(error) => {
                let now = Instant::now();
                cursors.put_back(moves, now);
                if !error.spares_connection() {
                    return Err(error);
                }
                if !told.as_ref().is_some_and(|(before, at)| *before == error && now < *at + TELL_EVERY) {
                    tracing::error!(hint = error.hint(), "{error}; a crash repeats what was delivered since");
                    told = Some((error, now));
                }
                tokio::time::sleep(REFUSED).await;
            }
        }
    }
}

/// Stores moves in one statement. Answers the places, counted from 1, of those that have to wait: somebody changes their
/// subscription at this moment.
async fn store(link: &Link, statement: &Statement, moves: &[Move]) -> Result<Vec<i32>, SourceError> {
    let batch = Batch::of(moves, Instant::now());
    let row = link.query_one("moving cursors", statement, &batch.parameters()).await?;
    batch.stored(row.get(0))?;
    refuse(moves, &row.get::<_, Vec<i32>>(1));
    Ok(row.get(2))
}

/// Those at these places, counted from 1, are no longer their owner's to move.
fn refuse(moves: &[Move], places: &[i32]) {
    for &place in places {
        if let Some(entry) = usize::try_from(place - 1).ok().and_then(|at| moves.get(at)) {
            entry.owner.fenced.cancel();
        }
    }
}

#[cfg(test)]
#[path = "cursors_tests.rs"]
mod tests;
