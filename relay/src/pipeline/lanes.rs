// SPDX-License-Identifier: PostgreSQL
//! Who may go next: the events of one lane one after the other, lanes side by side.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::delivery::{Delivery, LaneName, Place, Row};
use super::lane::{Charges, Lane, Returned, Stage, Unloaded};
use crate::calls::outcome::Class;

/// Rows of one lane that are read at once.
const ROWS_AT_ONCE: usize = 16;

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
    /// So many events of one lane may be on their way at once.
    depth: usize,
    lanes: HashMap<LaneName, Lane, RandomState>,
    ready: VecDeque<LaneName>,
    due: VecDeque<LaneName>,
    timers: BinaryHeap<Timer>,
    timers_made: u64,
}

impl Lanes {
    /// No lanes yet. `depth`: so many events of one lane may be on their way at once; more than one only where the sink keeps
    /// their order itself.
    pub fn new(depth: usize) -> Self {
        Lanes { depth, ..Lanes::default() }
    }

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
            Some(lane) if lane.rows.is_empty() => {
                lane.front.push_back(delivery);
                if lane.stage == Stage::InFlight && lane.may_follow(self.depth) {
                    lane.stage = Stage::Ready;
                    let name = lane.front.back().map(|delivery| delivery.lane.clone());
                    self.ready.extend(name);
                }
            }
            Some(lane) => lane.back.push_back(delivery),
        }
    }

    /// Adds an event of the log that was the head of its lane before it was unloaded, and is again.
    pub fn push_head(&mut self, delivery: Delivery, charges: Charges, until: Option<Instant>) {
        let name = delivery.lane.clone();
        let mut lane = Lane { charges, ..Lane::new(Stage::Ready) };
        lane.front.push_back(delivery);
        self.lanes.insert(name.clone(), lane);
        match until {
            Some(until) => self.rest_until(&name, until),
            None => self.ready.push_back(name),
        }
    }

    /// Adds a parked event behind all others of its lane, before anything of the log is read.
    pub fn push_row(&mut self, name: LaneName, row: Row) {
        let lane = self.lanes.entry(name.clone()).or_insert_with(|| Lane::new(Stage::Loading));
        lane.rows.push_back(row);
        if lane.rows.len() == 1 {
            self.go_on(&name);
        }
    }

    /// The head is gone, and as a dead letter it stands in the way of all that follows on its lane.
    pub fn block(&mut self, name: &LaneName, seq: i64) {
        let Some(lane) = self.lanes.get_mut(name) else { return };
        lane.charges = Charges::default();
        lane.stow();
        lane.rows.push_front(Row::blocking(seq));
        self.go_on(name);
    }

    /// A lane.
    pub fn get_mut(&mut self, name: &LaneName) -> Option<&mut Lane> {
        self.lanes.get_mut(name)
    }

    /// Whether there is such a lane.
    pub fn has(&self, name: &LaneName) -> bool {
        self.lanes.contains_key(name)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// How many lanes have something in memory that goes next.
    pub fn waiting(&self) -> usize {
        let waits = |lane: &&Lane| matches!(lane.stage, Stage::Ready | Stage::InFlight | Stage::Resting(_));
        self.lanes.values().filter(waits).count()
    }

    /// The lanes that may go as soon as there is room.
    pub fn ready(&self) -> impl Iterator<Item = &LaneName> {
        self.ready.iter().filter(|name| self.is_ready(name))
    }

    /// A lane of which something came back is no longer what it was when it was put into the queue.
    fn is_ready(&self, name: &LaneName) -> bool {
        self.depth == 1 || self.lanes.get(name).is_some_and(|lane| lane.stage == Stage::Ready)
    }

    /// The lanes whose parked events are to be read.
    pub fn due(&self) -> impl Iterator<Item = &LaneName> {
        self.due.iter().filter(|name| self.lanes.get(name).is_some_and(|lane| lane.stage == Stage::Due))
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

    /// Takes the head of the first ready lane that `admits` lets go.
    pub fn take(&mut self, admits: impl Fn(&LaneName) -> bool) -> Option<Delivery> {
        while self.ready.front().is_some_and(|name| !self.is_ready(name)) {
            self.ready.pop_front();
        }
        let at = self.ready.iter().position(|name| self.is_ready(name) && admits(name))?;
        let name = self.ready.remove(at)?;
        let lane = self.lanes.get_mut(&name)?;
        let head = lane.front.pop_front()?;
        lane.out += 1;
        if lane.may_follow(self.depth) {
            self.ready.push_back(name);
        } else {
            lane.stage = Stage::InFlight;
        }
        Some(head)
    }

    /// Something came back undelivered. Answers what of the lane is to be judged, once all of it is back: the first one, unless
    /// it came back only because another failed. All others go again after it.
    pub fn came_back(&mut self, returned: Returned) -> Option<Returned> {
        let name = returned.delivery.lane.clone();
        let lane = self.lanes.get_mut(&name)?;
        lane.out -= 1;
        lane.stage = Stage::InFlight;
        lane.returned.push(returned);
        self.all_back(&name)
    }

    /// See [`Lanes::came_back`]; also when the last that was on its way has arrived.
    pub fn all_back(&mut self, name: &LaneName) -> Option<Returned> {
        let lane = self.lanes.get_mut(name)?;
        if lane.out > 0 || lane.returned.is_empty() {
            return None;
        }
        let mut returned = std::mem::take(&mut lane.returned);
        returned.sort_unstable_by_key(|returned| Reverse(returned.delivery.turn));
        let first = returned.pop_if(|first| first.outcome.class != Class::Withdrawn);
        for Returned { delivery, .. } in returned {
            lane.front.push_front(delivery);
        }
        if first.is_none() {
            self.make_ready(name);
        }
        first
    }

    /// Takes the head of a lane that is not in flight out of it.
    pub fn remove_head(&mut self, name: &LaneName) -> Option<Delivery> {
        self.ready.retain(|ready| ready != name);
        self.lanes.get_mut(name)?.front.pop_front()
    }

    /// An event on its way has arrived: the next one becomes the head, if nothing else is on its way.
    pub fn arrived(&mut self, name: &LaneName) {
        let Some(lane) = self.lanes.get_mut(name) else { return };
        lane.out -= 1;
        if self.depth == 1 {
            return self.finish(name);
        }
        if lane.stage != Stage::InFlight || !lane.returned.is_empty() {
            return;
        }
        if lane.out == 0 {
            self.finish(name);
        } else if lane.may_follow(self.depth) {
            self.make_ready(name);
        }
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
        self.rest_until(&name, until);
    }

    fn rest_until(&mut self, name: &LaneName, until: Instant) {
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.stage = Stage::Resting(until);
            self.set_timer(name, until);
        }
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

    /// Parked events to be read now: of lanes that are due and that `admits` lets go, and the rows that come first in each, up
    /// to so many bytes but one row at least.
    pub fn load(
        &mut self,
        lanes_max: usize,
        bytes_max: usize,
        admits: impl Fn(&LaneName) -> bool,
    ) -> Vec<i64> {
        let (mut seqs, mut bytes) = (Vec::new(), 0);
        for _ in 0..lanes_max {
            if bytes >= bytes_max {
                break;
            }
            let Some(at) = self.due.iter().position(&admits) else { break };
            let lane = self.due.remove(at).and_then(|name| self.lanes.get_mut(&name));
            let Some(lane) = lane.filter(|lane| lane.stage == Stage::Due) else { continue };
            lane.stage = Stage::Loading;
            for row in lane.rows.iter().take_while(|row| !row.blocks).take(ROWS_AT_ONCE) {
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
        let asked: HashSet<i64> = asked.iter().copied().collect();
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

    /// Forgets what was read from the log: it is read again when it is needed. Answers what is to be remembered of heads
    /// that something is charged to. Nothing may be in flight.
    pub fn unload(&mut self) -> Vec<Unloaded> {
        self.ready.clear();
        self.due.clear();
        self.timers.clear();
        let mut unloaded = Vec::new();
        self.lanes.retain(|_, lane| {
            // Whose fault they are will not be known any more.
            lane.charges.suspected.clear();
            let until = match lane.stage {
                Stage::Resting(until) => Some(until),
                _ => None,
            };
            let head = lane.front.front().map(|head| (head.event.seq, head.place));
            let Charges { attempts, doubted, .. } = lane.charges;
            if let Some((seq, place)) = head.filter(|_| attempts > 0 || doubted) {
                let history = std::mem::take(&mut lane.charges.history);
                let charges = Charges { attempts, doubted, history, ..Charges::default() };
                unloaded.push(Unloaded { seq, place, charges, until });
            }
            if head.is_some_and(|(_, place)| place == Place::Row) {
                lane.put_back(attempts, until);
            }
            lane.front.clear();
            lane.back.clear();
            !lane.rows.is_empty()
        });
        let names: Vec<LaneName> = self.lanes.keys().cloned().collect();
        names.iter().for_each(|name| self.go_on(name));
        unloaded
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
            lane.charges.attempts = row.attempts;
            match (row.blocks, row.next) {
                (true, _) => lane.stage = Stage::Blocked,
                (false, next) => self.park_until(name, next),
            }
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
