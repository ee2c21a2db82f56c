// SPDX-License-Identifier: PostgreSQL
//! Who may go next: the events of one lane one after the other, lanes side by side.
//!
//! A lane is a queue: its head, then what is in memory and goes next, then what is parked in dtm.retry, then what was read
//! from the log since and waits behind that.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, VecDeque};

use tokio::time::Instant;

use super::delivery::{Delivery, LaneName, Place, Row};
use super::windows::Ticket;
use crate::source::settlement::Attempt;

/// Rows of one lane that are read at once.
const ROWS_AT_ONCE: usize = 16;

/// What the head of a lane is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// May go as soon as there is room.
    Ready,
    /// On its way; not in the queue.
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

/// What is charged to the head of a lane.
#[derive(Debug, Default)]
pub struct Charges {
    /// Attempts that are its own fault, in all.
    pub attempts: u32,
    /// Attempts since the last success of anybody: whose fault they are is not known yet.
    pub suspected: Vec<Attempt>,
    /// Attempts that are its own fault and that its row does not have.
    pub history: Vec<Attempt>,
}

impl Charges {
    /// The suspicion was right. All attempts between two successes count as one: the service may have been away for a while.
    pub fn confirm(&mut self) {
        if !self.suspected.is_empty() {
            self.attempts = self.attempts.saturating_add(1);
            self.history.append(&mut self.suspected);
        }
    }
}

/// One lane.
#[derive(Debug)]
pub struct Lane {
    /// See [`Stage`].
    pub stage: Stage,
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
    fn new(stage: Stage) -> Self {
        let (front, rows, back) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Lane { stage, charges: Charges::default(), front, rows, back }
    }

    /// Whether what is read from the log has to wait for a poisoned event, or for one that is parked.
    pub fn is_poisoned(&self) -> bool {
        self.charges.attempts > 0 || !self.rows.is_empty() || self.stage == Stage::Blocked
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
        let is_head = at == 0 && self.stage != Stage::InFlight;
        let (attempts, next) = match (is_head, self.stage) {
            (false, _) => (0, None),
            (true, Stage::Resting(until)) => (self.charges.attempts, Some(until)),
            (true, Stage::Blocked) => (0, None),
            (true, _) => return None,
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
        let Some(head) = self.front.pop_front() else { return };
        self.rows.push_front(Row::of(&head, attempts, next));
        // What is in memory behind it has a row too, or came from the log when there were no rows.
        while let Some(last) = self.front.pop_back() {
            match last.place {
                Place::Row => self.rows.insert(1, Row::of(&last, last.attempts, None)),
                Place::Log(_) => self.back.push_front(last),
            }
        }
    }
}

/// A lane that has something to do at a time. The earlier, the greater it is: a heap has its greatest on top.
#[derive(Debug)]
struct Timer {
    at: Reverse<Instant>,
    number: Reverse<u64>,
    lane: LaneName,
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timer {}

/// All lanes of a pipeline.
#[derive(Debug, Default)]
pub struct Lanes {
    lanes: HashMap<LaneName, Lane>,
    ready: VecDeque<LaneName>,
    due: VecDeque<LaneName>,
    timers: BinaryHeap<Timer>,
    timers_made: u64,
}

impl Lanes {
    /// Adds an event of the log behind all others of its lane.
    pub fn push(&mut self, delivery: Delivery) {
        match self.lanes.get_mut(&delivery.lane) {
            None => {
                let name = delivery.lane.clone();
                let mut lane = Lane::new(Stage::Ready);
                lane.front.push_back(delivery);
                self.lanes.insert(name.clone(), lane);
                self.ready.push_back(name);
            }
            Some(lane) if lane.rows.is_empty() => lane.front.push_back(delivery),
            Some(lane) => lane.back.push_back(delivery),
        }
    }

    /// Adds a parked event behind all others of its lane, before anything of the log is read.
    pub fn push_row(&mut self, name: LaneName, row: Row) {
        let next = row.next;
        let lane = self.lanes.entry(name.clone()).or_insert_with(|| Lane::new(Stage::Loading));
        lane.rows.push_back(row);
        if lane.rows.len() == 1 && lane.stage != Stage::Blocked {
            self.park_until(&name, next);
        }
    }

    /// A dead letter stands in the way of all that follows on its lane.
    pub fn block(&mut self, name: LaneName) {
        let lane = self.lanes.entry(name).or_insert_with(|| Lane::new(Stage::Blocked));
        lane.stage = Stage::Blocked;
    }

    /// A lane.
    pub fn get_mut(&mut self, name: &LaneName) -> Option<&mut Lane> {
        self.lanes.get_mut(name)
    }

    /// Whether there are none.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// How many lanes have something in memory that goes next.
    pub fn waiting(&self) -> usize {
        let waits = |lane: &&Lane| matches!(lane.stage, Stage::Ready | Stage::InFlight | Stage::Resting(_));
        self.lanes.values().filter(waits).count()
    }

    /// How many lanes may go as soon as there is room.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Whether parked events are to be read.
    pub fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// When the next lane that rests has something to do.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|timer| timer.at.0)
    }

    /// Lanes whose rest is over go on.
    pub fn wake(&mut self, now: Instant) {
        while self.timers.peek().is_some_and(|timer| timer.at.0 <= now) {
            let Some(Timer { at: Reverse(at), lane: name, .. }) = self.timers.pop() else { return };
            // A timer of what the lane no longer waits for says nothing.
            match self.lanes.get(&name).map(|lane| lane.stage) {
                Some(Stage::Resting(until)) if until == at => self.make_ready(&name),
                Some(Stage::Parked(until)) if until == at => self.make_due(&name),
                _ => {}
            }
        }
    }

    /// Takes the head of the first ready lane that `admits` lets go. Looks at a bounded number of them.
    pub fn take(&mut self, admits: impl Fn(&LaneName) -> bool) -> Option<Delivery> {
        const LOOKED_AT_MAX: usize = 64;
        let at = self.ready.iter().take(LOOKED_AT_MAX).position(admits)?;
        let name = self.ready.remove(at)?;
        let lane = self.lanes.get_mut(&name)?;
        let head = lane.front.pop_front()?;
        lane.stage = Stage::InFlight;
        Some(head)
    }

    /// The head is settled and gone: the next one becomes it.
    pub fn finish(&mut self, name: &LaneName) {
        let Some(lane) = self.lanes.get_mut(name) else { return };
        lane.charges = Charges::default();
        self.go_on(name);
    }

    /// The head comes back, and may go again at once, behind all others.
    pub fn again(&mut self, delivery: Delivery) {
        let name = delivery.lane.clone();
        let Some(lane) = self.lanes.get_mut(&name) else { return };
        lane.front.push_front(delivery);
        self.make_ready(&name);
    }

    /// The head comes back, and rests.
    pub fn rest(&mut self, delivery: Delivery, until: Instant) {
        let name = delivery.lane.clone();
        let Some(lane) = self.lanes.get_mut(&name) else { return };
        lane.front.push_front(delivery);
        lane.stage = Stage::Resting(until);
        self.set_timer(&name, until);
    }

    /// The head that rests may go at once.
    pub fn make_ready(&mut self, name: &LaneName) {
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.stage = Stage::Ready;
            self.ready.push_back(name.clone());
        }
    }

    /// The head is in its row, until a time or until there is room to read it.
    pub fn park_until(&mut self, name: &LaneName, next: Option<Instant>) {
        let Some(next) = next else { return self.make_due(name) };
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.stage = Stage::Parked(next);
            self.set_timer(name, next);
        }
    }

    /// Parked events to be read now: lanes that are due, and the rows that come first in each, up to so many bytes but one
    /// row at least.
    pub fn load(&mut self, lanes_max: usize, bytes_max: usize) -> Vec<i64> {
        let (mut seqs, mut bytes) = (Vec::new(), 0);
        for _ in 0..lanes_max {
            if bytes >= bytes_max {
                break;
            }
            let Some(name) = self.due.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&name).filter(|lane| lane.stage == Stage::Due) else {
                continue;
            };
            lane.stage = Stage::Loading;
            for row in lane.rows.iter().take(ROWS_AT_ONCE) {
                if bytes >= bytes_max {
                    break;
                }
                seqs.push(row.seq);
                bytes += row.bytes;
            }
        }
        seqs
    }

    /// The rows that were asked for have been read; those that were not found are gone: somebody has discarded them. Answers
    /// how many those are, and how many bytes.
    pub fn loaded(&mut self, asked: &[i64], found: Vec<Delivery>) -> (usize, usize) {
        let mut found: HashMap<i64, Delivery> = found.into_iter().map(|d| (d.event.seq, d)).collect();
        let (mut gone, mut bytes) = (0, 0);
        let asked: std::collections::HashSet<i64> = asked.iter().copied().collect();
        for name in self.loading() {
            let Some(lane) = self.lanes.get_mut(&name) else { continue };
            while let Some(row) = lane.rows.pop_front_if(|row| asked.contains(&row.seq)) {
                match found.remove(&row.seq) {
                    Some(delivery) => {
                        lane.front.push_back(Delivery { attempts: row.attempts, ..delivery });
                    }
                    None => (gone, bytes) = (gone + 1, bytes + row.bytes),
                }
            }
            if lane.rows.is_empty() {
                lane.front.append(&mut lane.back);
            }
            self.go_on(&name);
        }
        (gone, bytes)
    }

    /// The rows that were asked for could not be read: they are due still.
    pub fn not_loaded(&mut self) {
        self.loading().iter().for_each(|name| self.make_due(name));
    }

    /// Forgets what was read from the log. What has a row is read again from there. Nothing may be in flight.
    pub fn unload(&mut self) {
        self.ready.clear();
        self.due.clear();
        self.timers.clear();
        self.lanes.retain(|_, lane| {
            lane.back.clear();
            lane.front.retain(|delivery| delivery.place == Place::Row);
            let next = match lane.stage {
                Stage::Resting(at) | Stage::Parked(at) => Some(at),
                _ => None,
            };
            let attempts = lane.charges.attempts.max(lane.front.front().map_or(0, |head| head.attempts));
            lane.put_back(attempts, next);
            lane.charges = Charges::default();
            !lane.rows.is_empty() || lane.stage == Stage::Blocked
        });
        let heads: Vec<(LaneName, Option<Instant>)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.stage != Stage::Blocked)
            .map(|(name, lane)| (name.clone(), lane.rows.front().and_then(|row| row.next)))
            .collect();
        for (name, next) in heads {
            self.park_until(&name, next);
        }
    }

    /// Lanes whose rows are being read.
    fn loading(&self) -> Vec<LaneName> {
        let loading = self.lanes.iter().filter(|(_, lane)| lane.stage == Stage::Loading);
        loading.map(|(name, _)| name.clone()).collect()
    }

    /// The next event of a lane whose head is gone.
    fn go_on(&mut self, name: &LaneName) {
        let Some(lane) = self.lanes.get_mut(name) else { return };
        if let Some(head) = lane.front.front() {
            lane.charges.attempts = head.attempts;
            self.make_ready(name);
        } else if let Some(row) = lane.rows.front() {
            let next = row.next;
            self.park_until(name, next);
        } else if lane.back.is_empty() {
            self.lanes.remove(name);
        } else {
            lane.front = std::mem::take(&mut lane.back);
            self.make_ready(name);
        }
    }

    fn make_due(&mut self, name: &LaneName) {
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.stage = Stage::Due;
            self.due.push_back(name.clone());
        }
    }

    fn set_timer(&mut self, name: &LaneName, at: Instant) {
        self.timers_made += 1;
        self.timers.push(Timer { at: Reverse(at), number: Reverse(self.timers_made), lane: name.clone() });
    }
}
