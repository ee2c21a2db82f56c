// SPDX-License-Identifier: PostgreSQL
//! Storing how far each subscription has come: all cursors that moved in one statement, a few times a second.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_postgres::Statement;
use tokio_util::sync::CancellationToken;

use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;

/// Between two statements at the least.
const EVERY: Duration = Duration::from_millis(100);

/// A move that says no more than "nothing for this subscription came by" may wait this long.
const IDLE_EVERY: Duration = Duration::from_secs(1);

/// After a statement that the database refused.
const REFUSED: Duration = Duration::from_millis(500);

/// A refusal that stays is told so often.
const TELL_EVERY: Duration = Duration::from_secs(60);

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
}

struct Move {
    owner: Owner,
    cursor: Cursor,
    due: Instant,
    /// It covers events.
    delivered: bool,
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
    /// Leaves a move to be stored. `delivered`: it covers events, so that storing it soon spares duplicates after a crash.
    pub fn moved(&self, owner: &Owner, cursor: Cursor, delivered: bool) {
        let now = Instant::now();
        let due = if delivered { now } else { now + IDLE_EVERY };
        let mut waiting = self.lock();
        let key = (owner.subscription, owner.shard);
        let (due, delivered) = waiting
            .moves
            .get(&key)
            .map_or((due, delivered), |earlier| (earlier.due.min(due), earlier.delivered || delivered));
        waiting.moves.insert(key, Move { owner: owner.clone(), cursor, due, delivered });
        drop(waiting);
        self.arrived.notify_one();
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

    /// Whether events are delivered that no stored cursor covers: they would be delivered again.
    pub fn has_unstored(&self) -> bool {
        let waiting = self.lock();
        waiting.under_way || waiting.moves.values().any(|entry| entry.delivered)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is due, or all of it if somebody waits; and the number of barriers that are passed with it.
    fn take(&self, now: Instant) -> (Vec<Move>, u64) {
        let mut waiting = self.lock();
        let all = waiting.barriers > *self.passed.borrow();
        let due: Vec<Move> =
            waiting.moves.extract_if(|_, entry| all || entry.due <= now).map(|(_, entry)| entry).collect();
        waiting.under_way = due.iter().any(|entry| entry.delivered);
        (due, waiting.barriers)
    }

    /// What was taken is stored, or refused for good.
    fn settled(&self, barriers: u64) {
        self.lock().under_way = false;
        self.passed.send_replace(barriers);
    }

    /// What was taken could not be stored: it is due again, except where there is a newer move, which says more.
    fn put_back(&self, moves: Vec<Move>, now: Instant) {
        let mut waiting = self.lock();
        for entry in moves {
            match waiting.moves.entry((entry.owner.subscription, entry.owner.shard)) {
                Entry::Vacant(place) => {
                    place.insert(Move { due: now, ..entry });
                }
                Entry::Occupied(mut newer) => {
                    let newer = newer.get_mut();
                    newer.due = now;
                    newer.delivered |= entry.delivered;
                }
            }
        }
        waiting.under_way = false;
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
    let sql = "SELECT position_ids, fenced FROM dtm.relay_move($1, $2, $3, $4, $5, $6, $7, $8)";
    let statement = link.prepare("moving cursors", sql).await?;
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
            Ok(()) => {
                told = None;
                cursors.settled(barriers);
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

async fn store(link: &Link, statement: &Statement, moves: &[Move]) -> Result<(), SourceError> {
    let batch = Batch::of(moves);
    let row = link.query_one("moving cursors", statement, &batch.parameters()).await?;
    batch.stored(row.get(0))?;
    refuse(moves, row.get(1));
    Ok(())
}

fn refuse(moves: &[Move], fenced: Vec<i64>) {
    for entry in moves.iter().filter(|entry| fenced.contains(&entry.owner.subscription)) {
        entry.owner.fenced.cancel();
    }
}

/// The arguments of one statement, column by column.
#[derive(Default)]
struct Batch<'a> {
    new_marks: Vec<&'a Mark>,
    new_positions: Vec<&'a str>,
    subscriptions: Vec<i64>,
    shards: Vec<i32>,
    epochs: Vec<i64>,
    tokens: Vec<i64>,
    positions: Vec<i64>,
    targets: Vec<Option<i64>>,
    acked: Vec<i64>,
}

impl<'a> Batch<'a> {
    fn of(moves: &'a [Move]) -> Self {
        let mut batch = Batch::default();
        let mut places = HashMap::new();
        for Move { owner, cursor, .. } in moves {
            batch.subscriptions.push(owner.subscription);
            batch.shards.push(owner.shard);
            batch.epochs.push(owner.epoch);
            batch.tokens.push(owner.token);
            let position = batch.refer(&cursor.position, &mut places);
            batch.positions.push(position);
            let target = cursor.target.as_ref().map(|target| batch.refer(target, &mut places));
            batch.targets.push(target);
            batch.acked.push(cursor.acked);
        }
        batch
    }

    /// The id that a mark is stored under; else -k, and it goes along as the k-th new one.
    fn refer(&mut self, mark: &'a Arc<Mark>, places: &mut HashMap<*const Mark, i64>) -> i64 {
        mark.id().unwrap_or_else(|| {
            *places.entry(Arc::as_ptr(mark)).or_insert_with(|| {
                self.new_marks.push(mark);
                self.new_positions.push(mark.text());
                -(self.new_marks.len() as i64)
            })
        })
    }

    fn parameters(&self) -> [&(dyn tokio_postgres::types::ToSql + Sync); 8] {
        [
            &self.new_positions,
            &self.subscriptions,
            &self.shards,
            &self.epochs,
            &self.tokens,
            &self.positions,
            &self.targets,
            &self.acked,
        ]
    }

    fn stored(&self, ids: Vec<i64>) -> Result<(), SourceError> {
        if ids.len() != self.new_marks.len() {
            let problem = format!("{} ids for {} new positions", ids.len(), self.new_marks.len());
            return Err(SourceError::Answer { what: "moving cursors", problem });
        }
        self.new_marks.iter().zip(ids).for_each(|(mark, id)| mark.stored(id));
        Ok(())
    }
}

#[cfg(test)]
#[path = "cursors_tests.rs"]
mod tests;
