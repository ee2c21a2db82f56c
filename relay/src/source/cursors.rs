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
use uuid::Uuid;

use super::batch::{self, Batch};
use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;
use super::reminders::{Reminders, TELL_EVERY};
use super::settlement::{self, Settlement};

/// Between two statements at the least.
const EVERY: Duration = Duration::from_millis(100);

/// The same where somebody waits for it.
const URGENT_EVERY: Duration = Duration::from_millis(10);

/// After a statement that the database refused.
const REFUSED: Duration = Duration::from_millis(500);

/// Storing is held up when it takes longer than this.
const HELD_UP: Duration = Duration::from_secs(1);

/// A cursor that waits for somebody's transaction is told of after so long.
const PATIENCE: Duration = Duration::from_secs(5);

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

impl Owner {
    fn unit(&self) -> (i64, i32) {
        (self.subscription, self.shard)
    }
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
    /// Of exactly-once delivery: the window before the last one, and the last one.
    pub windows: Vec<Uuid>,
}

/// A cursor that moved, and the events that have to be settled with it.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) owner: Owner,
    pub(super) cursor: Cursor,
    pub(super) settlements: Vec<Settlement>,
    due: Instant,
    /// When the first of the moves that it is made of and that cover something was left.
    since: Instant,
    /// How many events it covers or settles beyond what is stored.
    covers: usize,
    /// The number of the first of the moves that it is made of.
    number: u64,
}

impl Move {
    fn unit(&self) -> (i64, i32) {
        self.owner.unit()
    }

    /// Whether it was left by this owner: one of an earlier token or epoch would be refused.
    fn is_of(&self, owner: &Owner) -> bool {
        (self.owner.epoch, self.owner.token) == (owner.epoch, owner.token)
    }
}

/// A move whose statement is under way.
struct UnderWay {
    since: Instant,
    number: u64,
    covers: usize,
}

#[derive(Default)]
struct Waiting {
    /// The newest move of each subscription and shard: no more than there are pipelines.
    moves: HashMap<(i64, i32), Move>,
    /// It is not known yet whether these are stored.
    under_way: HashMap<(i64, i32), UnderWay>,
    /// How many moves have been left.
    left: u64,
}

impl Waiting {
    /// Whether a move with this number or an earlier one is neither stored nor refused.
    fn has(&self, unit: (i64, i32), number: u64) -> bool {
        let waits = self.moves.get(&unit).map(|entry| entry.number);
        let under_way = self.under_way.get(&unit).map(|entry| entry.number);
        waits.into_iter().chain(under_way).any(|earlier| earlier <= number)
    }
}

/// Where pipelines leave their moves.
#[derive(Default)]
pub struct Cursors {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    /// Somebody waits for what has been left.
    urgent: Notify,
    /// Told when a statement has ended.
    ended: watch::Sender<()>,
}

impl Cursors {
    /// Leaves a move to be stored. `covers`: so many events more than the one before; storing it soon spares duplicates after a
    /// crash.
    pub fn moved(&self, owner: &Owner, cursor: Cursor, mut settlements: Vec<Settlement>, covers: usize) {
        let now = Instant::now();
        let mut covers = covers + settlements.len();
        let mut due = if covers > 0 { now } else { now + IDLE_EVERY };
        let mut waiting = self.lock();
        waiting.left += 1;
        let (mut number, mut since) = (waiting.left, now);
        if let Some(mut earlier) = waiting.moves.remove(&owner.unit()).filter(|earlier| earlier.is_of(owner))
        {
            due = due.min(earlier.due);
            if earlier.covers > 0 {
                since = earlier.since;
            }
            covers += earlier.covers;
            number = earlier.number;
            settlement::follow(&mut earlier.settlements, settlements);
            settlements = earlier.settlements;
        }
        waiting.moves.insert(
            owner.unit(),
            Move { owner: owner.clone(), cursor, settlements, due, since, covers, number },
        );
        drop(waiting);
        self.arrived.notify_one();
    }

    /// The statement has ended; these of what was taken are not stored yet, and due again before what has come since.
    fn ended(&self, not_stored: Vec<Move>, due: Instant) {
        let mut waiting = self.lock();
        waiting.under_way.clear();
        for mut earlier in not_stored {
            earlier.due = due;
            match waiting.moves.entry(earlier.unit()) {
                Entry::Vacant(place) => {
                    place.insert(earlier);
                }
                Entry::Occupied(mut later) if later.get().is_of(&earlier.owner) => {
                    let later = later.get_mut();
                    settlement::follow(&mut earlier.settlements, std::mem::take(&mut later.settlements));
                    later.settlements = earlier.settlements;
                    later.due = due;
                    later.covers += earlier.covers;
                    (later.number, later.since) = (earlier.number, earlier.since);
                }
                // What an earlier owner left would be refused.
                Entry::Occupied(_) => {}
            }
        }
        drop(waiting);
        self.ended.send_replace(());
    }

    /// Whether events are delivered that no stored cursor covers: they would be delivered again.
    pub fn has_unstored(&self) -> bool {
        let waiting = self.lock();
        let under_way = waiting.under_way.values().map(|entry| entry.covers);
        under_way.chain(waiting.moves.values().map(|entry| entry.covers)).any(|covers| covers > 0)
    }

    /// How many events of this owner are delivered or settled and no stored cursor covers them, if that has been so for longer
    /// than storing takes.
    pub fn held_up(&self, owner: &Owner, now: Instant) -> usize {
        let waiting = self.lock();
        let under_way = waiting.under_way.get(&owner.unit()).map(|entry| (entry.since, entry.covers));
        let waits = waiting.moves.get(&owner.unit()).map(|entry| (entry.since, entry.covers));
        let all = || under_way.iter().chain(&waits);
        let is_late = all().any(|(since, covers)| *covers > 0 && *since + HELD_UP <= now);
        if is_late { all().map(|(_, covers)| covers).sum() } else { 0 }
    }

    /// Waits until every move that this owner has left is stored or refused. Others are not waited for: a user's transaction
    /// may hold them up for long.
    pub async fn barrier(&self, owner: &Owner) {
        let mut ended = self.ended.subscribe();
        let last = {
            let mut waiting = self.lock();
            if let Some(entry) = waiting.moves.get_mut(&owner.unit()) {
                entry.due = Instant::now();
            }
            waiting.left
        };
        self.arrived.notify_one();
        self.urgent.notify_one();
        let _ = ended.wait_for(|()| !self.lock().has(owner.unit(), last)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is due.
    pub(super) fn take(&self, now: Instant) -> Vec<Move> {
        let mut waiting = self.lock();
        let due: Vec<Move> =
            waiting.moves.extract_if(|_, entry| entry.due <= now).map(|(_, entry)| entry).collect();
        let under_way = |entry: &Move| {
            (entry.unit(), UnderWay { since: entry.since, number: entry.number, covers: entry.covers })
        };
        waiting.under_way = due.iter().map(under_way).collect();
        due
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
    let encoding = "SELECT pg_catalog.current_setting('server_encoding')";
    let is_utf8 = link.query_one("asking for the encoding", encoding, &[]).await?.get::<_, &str>(0) == "UTF8";
    let store = Store { link, statement, is_utf8 };
    let mut waits = Reminders::after(PATIENCE);
    let mut told: Option<(SourceError, Instant)> = None;
    let mut told_broken: Option<Instant> = None;
    loop {
        cursors.wait().await;
        let begun = Instant::now();
        let mut moves = cursors.take(begun);
        if moves.is_empty() {
            continue;
        }
        match store.all(&mut moves).await {
            Ok(refused) => {
                told = None;
                complain(&refused.broken, &mut told_broken);
                waits.due(&refused.busy, begun).into_iter().for_each(tell_of_wait);
                let again = begun + if refused.broken.is_empty() { EVERY } else { REFUSED };
                cursors.ended(refused.not_stored, again);
                tokio::time::sleep_until(begun + URGENT_EVERY).await;
                let _ = tokio::time::timeout_at(begun + EVERY, cursors.urgent.notified()).await;
            }
            Err(error) => {
                let now = Instant::now();
                cursors.ended(moves, now);
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

fn tell_of_wait(subscription: i64) {
    let hint =
        "end it: what was delivered since comes again after a crash, and in the end nothing more is sent";
    tracing::warn!(
        subscription,
        hint,
        "its cursor waits for a transaction that redrives, discards or rewinds"
    );
}

/// What has to wait.
#[derive(Default)]
struct Refused {
    not_stored: Vec<Move>,
    /// The ids of subscriptions that cannot be settled.
    broken: Vec<i64>,
    /// The ids of those that somebody works on.
    busy: Vec<i64>,
}

struct Store {
    link: Link,
    statement: Statement,
    /// The database can store every text.
    is_utf8: bool,
}

impl Store {
    /// Stores moves: in one statement or, where the database refuses that, one by one, so that what is wrong with one holds up
    /// no other. Those that are not stored after an error stay in `moves`.
    async fn all(&self, moves: &mut Vec<Move>) -> Result<Refused, SourceError> {
        let error = match self.store(moves).await {
            Err(error) if error.spares_connection() && moves.len() > 1 => error,
            done => return done,
        };
        let (mut refused, mut wrong) = (Refused::default(), Vec::new());
        for entry in std::mem::take(moves) {
            let mut one = vec![entry];
            match self.store(&mut one).await {
                Ok(more) => {
                    refused.not_stored.extend(more.not_stored);
                    refused.broken.extend(more.broken);
                    refused.busy.extend(more.busy);
                }
                Err(_) => wrong.append(&mut one),
            }
        }
        if wrong.is_empty() {
            return Ok(refused);
        }
        wrong.append(&mut refused.not_stored);
        *moves = wrong;
        Err(error)
    }

    /// Stores moves in one statement. Those have to wait whose subscription somebody changes at this moment, those that park an
    /// event that is not in the log, and those whose positions have to be told anew.
    async fn store(&self, moves: &mut Vec<Move>) -> Result<Refused, SourceError> {
        let batch = Batch::of(moves, Instant::now(), self.is_utf8);
        let row = self.link.query_one("moving cursors", &self.statement, &batch.parameters()).await?;
        batch.stored(row.get(0))?;
        refuse(moves, &row.get::<_, Vec<i32>>(1));
        let (busy, broken, stale): (Vec<i32>, Vec<i32>, Vec<i32>) = (row.get(2), row.get(3), row.get(4));
        let is_at =
            |places: &[i32], at: usize| i32::try_from(at + 1).is_ok_and(|place| places.contains(&place));
        let mut refused = Refused::default();
        for (at, entry) in std::mem::take(moves).into_iter().enumerate() {
            if is_at(&broken, at) {
                refused.broken.push(entry.owner.subscription);
            }
            if is_at(&busy, at) {
                refused.busy.push(entry.owner.subscription);
            }
            if is_at(&stale, at) {
                entry.cursor.position.forgotten();
                entry.cursor.target.iter().for_each(|target| target.forgotten());
            }
            if [&busy, &broken, &stale].iter().any(|places| is_at(places, at)) {
                refused.not_stored.push(entry);
            }
        }
        Ok(refused)
    }
}

fn complain(broken: &[i64], told: &mut Option<Instant>) {
    let now = Instant::now();
    if broken.is_empty() || told.is_some_and(|at| now < at + TELL_EVERY) {
        return;
    }
    *told = Some(now);
    let hint = "has the log been truncated by hand? dtm.rewind sets a cursor past the gap";
    tracing::error!(subscriptions = ?broken, hint, "events that failed are not in the log: these cursors stand still");
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
