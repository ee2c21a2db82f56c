// SPDX-License-Identifier: PostgreSQL
//! One lane: events that go one after the other, and what is charged to the first of them.
//!
//! A lane is a queue: its head, then what is in memory and goes next, then what is parked in dtm.retry, then what was read
//! from the log since and waits behind that.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::delivery::{Delivery, Place, Row};
use super::windows::Ticket;
use crate::calls::outcome::Outcome;
use crate::source::settlement::Attempt;

/// What the head of a lane is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// May go as soon as there is room.
    Ready,
    /// On its way, alone or with as many others as may be; not in the queue.
    InFlight,
    /// In memory, not before this time.
    Resting(Instant),
    /// In dtm.retry, not before this time.
    Parked(Instant),
    /// In dtm.retry, to be read now.
    Due,
    /// In dtm.retry, being read.
    Loading,
    /// A dead letter: the lane waits until that is redriven or discarded.
    Blocked,
}

/// An endpoint that asks for less so often when an event is sent, and takes others meanwhile, does not want that one now.
const THROTTLED: u32 = 3;

/// What is charged to the head of a lane.
#[derive(Debug, Default)]
pub struct Charges {
    /// Attempts that are its own fault, in all.
    pub attempts: u32,
    /// Attempts since the last success of anybody: whose fault they are is not known yet.
    pub suspected: Vec<Attempt>,
    /// Attempts that are its own fault and that its row does not have.
    pub history: Vec<Attempt>,
    /// It failed when the endpoint counted as down. If it fails once more while that works, it has itself to blame.
    pub doubted: bool,
    /// How often the endpoint has asked for less when it was sent, with successes of others between.
    pub throttled: u32,
    /// How many successes there had been by the last time.
    pub throttled_at: u64,
}

impl Charges {
    /// Whether the head has never failed.
    pub fn is_clean(&self) -> bool {
        self.attempts == 0 && self.suspected.is_empty() && !self.doubted && self.throttled == 0
    }

    /// Whether the endpoint takes others and not this one: it asks for less whenever this one comes.
    pub fn is_throttled(&self) -> bool {
        self.throttled >= THROTTLED
    }

    /// The suspicion was right. All attempts between two successes count as one: the service may have been away for a while.
    pub fn confirm(&mut self) {
        if !self.suspected.is_empty() {
            self.attempts = self.attempts.saturating_add(1);
            self.history.append(&mut self.suspected);
        }
    }
}

/// An event that came back undelivered.
#[derive(Debug)]
pub struct Returned {
    /// The event.
    pub delivery: Delivery,
    /// What came of it.
    pub outcome: Outcome,
    /// The same, to be kept.
    pub attempt: Attempt,
}

/// One lane.
#[derive(Debug)]
pub struct Lane {
    /// See [`Stage`].
    pub stage: Stage,
    /// How many of its events are on their way: more than one where the sink keeps their order itself.
    pub out: usize,
    /// What came back undelivered while others were on their way still.
    pub returned: Vec<Returned>,
    /// Of the head.
    pub charges: Charges,
    /// In memory, the next ones to go.
    pub front: VecDeque<Delivery>,
    /// Behind them, in dtm.retry.
    pub rows: VecDeque<Row>,
    /// Behind those, read from the log.
    pub back: VecDeque<Delivery>,
}

impl Lane {
    pub(super) fn new(stage: Stage) -> Self {
        let (front, rows, back) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Lane { stage, out: 0, returned: Vec::new(), charges: Charges::default(), front, rows, back }
    }

    /// Whether one more of its events may go while others are on their way: none has failed, and none stands behind parked ones.
    pub(super) fn may_follow(&self, depth: usize) -> bool {
        self.out < depth
            && !self.front.is_empty()
            && self.rows.is_empty()
            && self.returned.is_empty()
            && self.charges.is_clean()
    }

    /// Whether what is read from the log has to wait for a poisoned event, or for one that is parked or dead.
    fn is_poisoned(&self) -> bool {
        self.charges.attempts > 0 || self.charges.is_throttled() || !self.rows.is_empty()
    }

    /// Takes an event of the log out of the lane, to be parked: the next one in the lane that is not parked yet, unless it is
    /// about to go. The row takes its place.
    pub fn park(&mut self, ticket: Ticket) -> Option<&Row> {
        if !self.is_poisoned() {
            return None;
        }
        let place = Place::Log(ticket);
        if self.back.front().is_some_and(|delivery| delivery.place == place) {
            let delivery = self.back.pop_front()?;
            self.rows.push_back(Row::of(&delivery, 0, None));
            return self.rows.back();
        }
        if !self.rows.is_empty() {
            return None;
        }
        let at = self.front.iter().position(|delivery| delivery.place == place)?;
        let (attempts, next) = match self.stage {
            Stage::Resting(until) if at == 0 => (self.charges.attempts, Some(until)),
            Stage::InFlight => (0, None),
            _ if at > 0 => (0, None),
            _ => return None,
        };
        let behind = self.front.split_off(at + 1);
        let delivery = self.front.pop_back()?;
        self.back = behind;
        self.rows.push_back(Row::of(&delivery, attempts, next));
        if let Some(until) = next {
            self.stage = Stage::Parked(until);
        }
        self.rows.back()
    }

    /// Puts the head, which is in memory and has a row, back into its row.
    pub fn put_back(&mut self, attempts: u32, next: Option<Instant>) {
        self.stow();
        if let Some(row) = self.rows.front_mut() {
            (row.attempts, row.next) = (attempts, next);
        }
    }

    /// Puts all that is in memory and not in flight behind what comes next, or where it came from.
    pub(super) fn stow(&mut self) {
        while let Some(last) = self.front.pop_back() {
            match last.place {
                Place::Row => self.rows.push_front(Row::of(&last, last.attempts, None)),
                Place::Log(_) => self.back.push_front(last),
            }
        }
    }
}

/// A head that was in memory, and is there no longer.
#[derive(Debug)]
pub struct Unloaded {
    /// Its sequence number.
    pub seq: i64,
    /// Where it stands.
    pub place: Place,
    /// What is charged to it.
    pub charges: Charges,
    /// It rests until then.
    pub until: Option<Instant>,
}
