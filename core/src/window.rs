// SPDX-License-Identifier: PostgreSQL
//! Windows of the log: what a later position sees and an earlier one did not.
//!
//! # Why nothing is skipped
//!
//! A position is read in the order *sequence, locks, snapshot, sequence* ([`Reading`]), and a publisher locks the log, takes its
//! transaction id and only then a sequence number, holding the lock until its transaction has left the snapshots.
//! Take any row, of transaction `x` with sequence number `s`, and a position that does not see `x`.
//!
//! * `s` above the position's `seq`: the next window looks there.
//! * `s` at or below it: `x` had its lock before the sequence was read, and it had not ended when the snapshot was
//!   taken, so it held the lock in between, when the locks were read: it is among the publishers and has a floor.
//!   That floor is the one it had, or the `seq` of the position before: at that one either `x` was no publisher
//!   yet, and its rows lie above, or it had a floor. So `s` lies above the floor, and the window in which `x` becomes
//!   visible looks from there.
//!
//! Rows count only once, since a window takes a row if and only if the later snapshot sees it and the earlier does not.

use crate::position::{Floor, Position, Snapshot};

/// What is read from a database, in this order, to make a position.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The era that the database is in.
    pub era: i32,
    /// First: the last sequence number given out (0 before the very first).
    pub seq: i64,
    /// Second: top-level ids of the transactions that hold a publisher's lock on the log and have an id.
    pub publishers: Vec<u64>,
    /// Third: a snapshot.
    pub snapshot: Snapshot,
    /// Fourth: the last sequence number given out by then. Rows that the snapshot sees lie at or below it.
    pub top: i64,
    /// The transaction that reads the position, if it has an id: it is never visible to its own position.
    pub own: Option<u64>,
}

/// The position that a reading gives. `base` is any earlier position, the later the better: it tells how far back the
/// rows of running publishers can lie. Without one, or with one of another era, that is the start of the log.
pub fn advance(base: Option<&Position>, reading: Reading) -> Position {
    let Reading { era, seq, publishers, mut snapshot, top, own } = reading;
    if let Some(own) = own {
        snapshot.hide(own);
    }
    let base = base.filter(|base| base.era == era);
    let mut floors: Vec<Floor> = publishers
        .into_iter()
        .filter(|&xid| !snapshot.sees(xid))
        .map(|xid| Floor { xid, seq: base.map_or(0, |base| floor_of(base, xid)).min(seq) })
        .collect();
    floors.sort_unstable_by_key(|floor| floor.xid);
    floors.dedup_by_key(|floor| floor.xid);
    Position { era, seq, top, snapshot, floors }
}

fn floor_of(base: &Position, xid: u64) -> i64 {
    base.floors.iter().find(|floor| floor.xid == xid).map_or(base.seq, |floor| floor.seq)
}

/// What lies between two positions of one era.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    from: &'a Position,
    to: &'a Position,
}

impl<'a> Window<'a> {
    /// The window from one position to a later one; `None` if they are of different eras.
    pub fn new(from: &'a Position, to: &'a Position) -> Option<Self> {
        (from.era == to.era).then_some(Window { from, to })
    }

    /// All rows of the window have a sequence number above this. Publishers that were running before and still are
    /// cost nothing here: only one that has ended since makes the window look back to its floor.
    pub fn low(&self) -> i64 {
        let ended = self.from.floors.iter().filter(|floor| self.to.snapshot.sees(floor.xid));
        ended.map(|floor| floor.seq).fold(self.from.seq, i64::min)
    }

    /// No row of the window has a sequence number above this: the end of the log is not looked at in vain.
    pub fn top(&self) -> i64 {
        self.to.top
    }

    /// Whether the rows of this transaction belong to the window.
    pub fn contains(&self, xid: u64) -> bool {
        self.to.snapshot.sees(xid) && !self.from.snapshot.sees(xid)
    }
}

#[cfg(test)]
#[path = "window_model.rs"]
mod model;
