// SPDX-License-Identifier: PostgreSQL
//! A pipeline without its I/O: which events wait, which may go, whose fault a failure is, what is parked and what is dead,
//! and how far all are settled.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::{OnDead, Options, Ordering, Retry};
use dtm_core::page::{Event, Page};
use tokio::time::Instant;

use super::budget::Held;
use super::delivery::{Delivery, LaneName, Place, Row};
use super::lanes::{Lanes, Stage};
use super::reader::{FlowProgress, Piece, Reader, UnknownEra};
use super::windows::{Ahead, Frontier, Progress};
use crate::calls::circuit::{Blame, Circuit};
use crate::calls::outcome::{Class, Outcome};
use crate::calls::pace::Pace;
use crate::calls::schedule::Schedule;
use crate::source::mark::Mark;
use crate::source::pages::StoredCursor;
use crate::source::settlement::{Attempt, Leave, Parked, Settlement};

/// While an endpoint is down it is asked again at least this often.
const PROBE_EVERY_MAX: Duration = Duration::from_secs(30);
/// Lanes that are to be in memory when probes go: an endpoint is judged by events of different keys.
const PROBED_LANES: usize = 3;
/// Lanes whose parked events are read at once.
const LOADED_LANES: usize = 32;

/// What may be parked.
#[derive(Clone, Copy, Debug)]
pub struct ParkingBounds {
    /// Events, in all.
    pub events: usize,
    /// Bytes, in all.
    pub bytes: usize,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The event is delivered.
    Delivered,
    /// It goes again, not before this time.
    Again(Instant),
    /// The endpoint is to blame: the event goes again when that works.
    Waits,
    /// The endpoint is to blame, and with this attempt it counts as down.
    Down,
    /// There are no more attempts.
    Dead,
    /// The endpoint is gone for good.
    Gone,
}

/// The state of a pipeline.
pub struct Flow {
    reader: Reader,
    progress: FlowProgress,
    eras: Arc<[i32]>,
    lanes: Lanes,
    circuit: Circuit<LaneName>,
    pace: Pace,
    schedule: Schedule,
    ordering: Ordering,
    on_dead: OnDead,
    bounds: ParkingBounds,
    parked: ParkingBounds,
    in_flight: usize,
    /// Parked when the pipeline began: after the number of shards was changed the log can bring some of them once more.
    known: HashSet<i64>,
    /// Lanes whose head has failed since the last success.
    suspects: Vec<LaneName>,
    settlements: Vec<Settlement>,
}

impl Flow {
    /// Goes on from a cursor, and from what is parked in dtm.retry.
    pub fn new(
        cursor: StoredCursor,
        parked: Vec<Parked>,
        eras: Arc<[i32]>,
        options: &Options,
        bounds: ParkingBounds,
        now: Instant,
    ) -> Result<Self, UnknownEra> {
        let ahead = Ahead::delivered(cursor.ahead.iter().copied());
        let (reader, progress) = Reader::new(cursor, ahead, eras.clone())?;
        let probes = |base, cap: Duration| Schedule::exponential(base, cap.min(PROBE_EVERY_MAX), None);
        let (schedule, probes) = match &options.retry {
            Retry::Exponential { base, cap, attempts } => {
                (Schedule::exponential(*base, *cap, Some(*attempts)), probes(*base, *cap))
            }
            Retry::Schedule(delays) => {
                (Schedule::listed(delays.clone()), probes(Duration::from_secs(1), PROBE_EVERY_MAX))
            }
        };
        let mut flow = Flow {
            reader,
            progress,
            eras,
            lanes: Lanes::default(),
            circuit: Circuit::new(probes),
            pace: Pace::new(options.max_in_flight as usize, options.rate_limit),
            schedule,
            ordering: options.ordering,
            on_dead: options.on_dead,
            bounds,
            parked: ParkingBounds { events: 0, bytes: 0 },
            in_flight: 0,
            known: parked.iter().map(|parked| parked.seq).collect(),
            suspects: Vec::new(),
            settlements: Vec::new(),
        };
        parked.into_iter().for_each(|parked| flow.remember(parked, now));
        Ok(flow)
    }

    fn remember(&mut self, parked: Parked, now: Instant) {
        let Parked { key, seq, bytes, attempts, next_in, blocks } = parked;
        let name = LaneName::of(seq, key.as_ref(), self.ordering);
        if blocks {
            return self.lanes.block(name);
        }
        self.parked.events += 1;
        self.parked.bytes += bytes;
        let next = next_in.map(|next_in| now + next_in);
        self.lanes.push_row(name, Row { seq, bytes, attempts, next });
    }

    /// Whether it wants to read on. While the endpoint is down nothing is read but what probes need, and what is `small`.
    pub fn wants_page(&self, small: bool, now: Instant) -> bool {
        !self.circuit.is_open() || small || self.circuit.may_probe(now) && self.lanes.waiting() < PROBED_LANES
    }

    /// The piece of the log to read next, see [`Reader::next`].
    pub fn piece(&mut self, head: Option<&Arc<Mark>>) -> Option<Piece> {
        self.reader.next(head, &mut self.progress)
    }

    /// Where it stands in the log, if it is between two windows.
    pub fn stands_at(&self) -> Option<&Arc<Mark>> {
        self.reader.stands_at()
    }

    /// A whole window has been read by somebody else, from where the pipeline stands.
    pub fn read_window(&mut self, to: Arc<Mark>, events: Vec<Event>, held: &Arc<Held>) {
        let scanned = to.position().top;
        self.reader.open(to, &mut self.progress);
        self.read(Page { scanned, done: true, events }, held);
    }

    /// The piece has been read.
    pub fn read(&mut self, page: Page, held: &Arc<Held>) {
        for event in page.events {
            let lane = LaneName::of(event.seq, event.key.as_ref(), self.ordering);
            let Some(ticket) = self.progress.push(event.seq, lane.clone()) else { continue };
            if self.known.contains(&event.seq) {
                self.progress.ack(ticket);
                continue;
            }
            let (place, held) = (Place::Log(ticket), held.clone());
            self.lanes.push(Delivery { event, lane, place, attempts: 0, held });
        }
        self.progress.scanned(page.scanned, page.done);
        self.reader.read(page.scanned, page.done);
        self.advance();
    }

    /// Whether parked events are due and may be read now. While the endpoint is down only as many are as probes need.
    pub fn has_due(&mut self, now: Instant) -> bool {
        self.lanes.wake(now);
        self.lanes.has_due() && self.loadable(now) > 0
    }

    fn loadable(&self, now: Instant) -> usize {
        match self.circuit.is_open() {
            false => LOADED_LANES,
            true if self.circuit.may_probe(now) => PROBED_LANES.saturating_sub(self.lanes.ready()),
            true => 0,
        }
    }

    /// Parked events that are due, to be read now: their sequence numbers.
    pub fn load(&mut self, bytes_max: usize, now: Instant) -> Vec<i64> {
        self.lanes.load(self.loadable(now), bytes_max)
    }

    /// The parked events that were asked for; those that are missing have been discarded.
    pub fn loaded(&mut self, asked: &[i64], events: Vec<Event>, held: &Arc<Held>) {
        let delivery = |event: Event| {
            let lane = LaneName::of(event.seq, event.key.as_ref(), self.ordering);
            Delivery { event, lane, place: Place::Row, attempts: 0, held: held.clone() }
        };
        let (gone, bytes) = self.lanes.loaded(asked, events.into_iter().map(delivery).collect());
        self.unpark(gone, bytes);
    }

    /// The parked events that were asked for could not be read: they will be asked for again.
    pub fn not_loaded(&mut self) {
        self.lanes.not_loaded();
    }

    /// The next event to send, if one may go now.
    pub fn next(&mut self, now: Instant) -> Option<Delivery> {
        self.lanes.wake(now);
        self.pace.free(self.in_flight, now).ok()?;
        let (circuit, in_flight) = (&self.circuit, self.in_flight);
        let delivery = self.lanes.take(|lane| circuit.admits(lane, in_flight, now))?;
        self.in_flight += 1;
        self.pace.made(now);
        Some(delivery)
    }

    /// When there may be something to do that no answer and no page brings.
    pub fn next_timer(&self, now: Instant) -> Option<Instant> {
        let paced = match self.pace.free(self.in_flight, now) {
            Err(at) if self.lanes.ready() > 0 => at,
            _ => None,
        };
        let later = |at: &Instant| *at > now;
        let probe = self.circuit.next_probe().filter(later);
        paced.into_iter().chain(probe).chain(self.lanes.next_timer()).min()
    }

    /// An attempt has ended; `attempt` tells of it, if it failed. `random` is drawn evenly from `[0, 1)`.
    pub fn settle(
        &mut self,
        delivery: Delivery,
        outcome: &Outcome,
        attempt: impl FnOnce() -> Attempt,
        now: Instant,
        random: f64,
    ) -> Verdict {
        self.in_flight -= 1;
        let verdict = match outcome.class {
            Class::Accepted => self.delivered(delivery),
            Class::Gone => {
                self.lanes.again(delivery);
                Verdict::Gone
            }
            Class::Throttled => {
                self.pace.slow_down(outcome.retry_after, now);
                self.lanes.again(delivery);
                Verdict::Waits
            }
            Class::Unsent => {
                let blame = self.circuit.trip(&delivery.lane, now, random);
                self.endpoints_fault(delivery, blame)
            }
            Class::Unsendable => self.dies(delivery, attempt()),
            Class::Refused if !self.circuit.is_open() && self.circuit.vouches_against(&delivery.lane) => {
                self.circuit.failed(&delivery.lane, self.lanes.waiting(), now, random);
                self.dies(delivery, attempt())
            }
            Class::Refused | Class::Failed => self.failed(delivery, attempt(), now, random),
            Class::Overloaded => {
                self.pace.slow_down(outcome.retry_after, now);
                self.failed(delivery, attempt(), now, random)
            }
        };
        self.advance();
        verdict
    }

    fn delivered(&mut self, delivery: Delivery) -> Verdict {
        self.circuit.succeeded(&delivery.lane);
        self.pace.succeeded();
        self.lanes.finish(&delivery.lane);
        match delivery.place {
            Place::Log(ticket) => self.progress.ack(ticket),
            Place::Row => {
                self.unpark(1, delivery.size());
                self.settlements.push(settlement(delivery.event.seq, Leave::Done));
            }
        }
        self.confirm(&delivery.lane);
        Verdict::Delivered
    }

    fn endpoints_fault(&mut self, delivery: Delivery, blame: Blame) -> Verdict {
        self.lanes.again(delivery);
        if blame != Blame::Opened {
            return Verdict::Waits;
        }
        // What was charged since the last success was not the events' fault.
        for name in std::mem::take(&mut self.suspects) {
            let Some(lane) = self.lanes.get_mut(&name) else { continue };
            lane.charges.suspected.clear();
            if matches!(lane.stage, Stage::Resting(_)) {
                self.lanes.make_ready(&name);
            }
        }
        Verdict::Down
    }

    fn failed(&mut self, delivery: Delivery, attempt: Attempt, now: Instant, random: f64) -> Verdict {
        let blame = self.circuit.failed(&delivery.lane, self.lanes.waiting(), now, random);
        if blame != Blame::Call {
            return self.endpoints_fault(delivery, blame);
        }
        let name = delivery.lane.clone();
        let Some(lane) = self.lanes.get_mut(&name) else { return Verdict::Waits };
        lane.charges.suspected.push(attempt);
        let attempts = lane.charges.attempts + lane.charges.suspected.len() as u32;
        let until = now + self.schedule.delay(attempts, random);
        if !self.suspects.contains(&name) {
            self.suspects.push(name);
        }
        self.lanes.rest(delivery, until);
        Verdict::Again(until)
    }

    /// Somebody else had a success: what failed since the last one has itself to blame.
    fn confirm(&mut self, by: &LaneName) {
        for name in std::mem::take(&mut self.suspects) {
            let Some(lane) = self.lanes.get_mut(&name).filter(|_| name != *by) else { continue };
            lane.charges.confirm();
            let Stage::Resting(until) = lane.stage else { continue };
            if self.schedule.is_over(lane.charges.attempts) {
                if let Some(head) = lane.front.pop_front() {
                    self.bury(head);
                }
            } else if lane.front.front().is_some_and(|head| head.place == Place::Row) {
                let attempts = lane.charges.attempts;
                let history = std::mem::take(&mut lane.charges.history);
                lane.put_back(attempts, Some(until));
                let seq = lane.rows.front().map_or(0, |row| row.seq);
                self.settlements.push(Settlement {
                    seq,
                    what: Leave::Again,
                    attempts,
                    history,
                    next: Some(until),
                });
                self.lanes.park_until(&name, Some(until));
            }
        }
    }

    /// The attempt was its own fault beyond doubt, and the last.
    fn dies(&mut self, delivery: Delivery, attempt: Attempt) -> Verdict {
        if let Some(lane) = self.lanes.get_mut(&delivery.lane) {
            lane.charges.suspected.push(attempt);
            lane.charges.confirm();
        }
        self.suspects.retain(|name| *name != delivery.lane);
        self.bury(delivery);
        Verdict::Dead
    }

    /// The head of a lane, taken out of it, becomes a dead letter.
    fn bury(&mut self, delivery: Delivery) {
        let Delivery { event, lane: name, place, .. } = &delivery;
        let charges =
            self.lanes.get_mut(name).map(|lane| std::mem::take(&mut lane.charges)).unwrap_or_default();
        let what = if *place == Place::Row { Leave::Die } else { Leave::Bury };
        let (attempts, history) = (charges.attempts, charges.history);
        let settlement = Settlement { seq: event.seq, what, attempts, history, next: None };
        match *place {
            Place::Log(ticket) => self.progress.leave(ticket, settlement),
            Place::Row => {
                self.unpark(1, delivery.size());
                self.settlements.push(settlement);
            }
        }
        match name {
            LaneName::Key(_) if self.on_dead == OnDead::Block => self.lanes.block(name.clone()),
            _ => self.lanes.finish(name),
        }
    }

    /// Moves the frontier as far as it goes: over what is settled, and over what may be parked.
    fn advance(&mut self) {
        while let Some((ticket, seq, name)) = self.progress.advance(&mut self.settlements) {
            let full = self.parked.events >= self.bounds.events || self.parked.bytes >= self.bounds.bytes;
            if full || self.circuit.is_open() {
                return;
            }
            let name = name.clone();
            let Some(lane) = self.lanes.get_mut(&name) else { return };
            let Some(row) = lane.park(ticket).cloned() else { return };
            let history =
                if row.next.is_some() { std::mem::take(&mut lane.charges.history) } else { Vec::new() };
            let Row { bytes, attempts, next, .. } = row;
            if next.is_some() {
                self.lanes.park_until(&name, next);
            }
            self.parked.events += 1;
            self.parked.bytes += bytes;
            self.progress.leave(ticket, Settlement { seq, what: Leave::Park, attempts, history, next });
        }
    }

    fn unpark(&mut self, events: usize, bytes: usize) {
        self.parked.events = self.parked.events.saturating_sub(events);
        self.parked.bytes = self.parked.bytes.saturating_sub(bytes);
    }

    /// Whether the endpoint is down, nothing is in flight and no probe is due: then nothing of the log needs to be held.
    pub fn may_unload(&self, now: Instant) -> bool {
        self.circuit.is_open()
            && self.in_flight == 0
            && !self.circuit.may_probe(now)
            && self.progress.held() > 0
    }

    /// When the endpoint is tried again, if it is down.
    pub fn next_probe(&self) -> Option<Instant> {
        self.circuit.next_probe()
    }

    /// Forgets what is read from the log and not settled; it is read again when it is needed.
    pub fn unload(&mut self) -> Result<(), UnknownEra> {
        let Frontier { position, target, acked, .. } = self.progress.frontier();
        let progress =
            std::mem::replace(&mut self.progress, Progress::new(position.clone(), Ahead::delivered([])));
        let cursor = StoredCursor { position, target, acked, ahead: Vec::new() };
        (self.reader, self.progress) = Reader::new(cursor, progress.into_ahead(), self.eras.clone())?;
        self.suspects.clear();
        self.lanes.unload();
        Ok(())
    }

    /// How many events are held in memory, about.
    pub fn held(&self) -> usize {
        self.progress.held()
    }

    /// How far everything is settled, and what has to be stored with it.
    pub fn take_settled(&mut self) -> (Frontier<Arc<Mark>>, Vec<Settlement>) {
        (self.progress.frontier(), std::mem::take(&mut self.settlements))
    }

    /// The sequence numbers of what is delivered beyond the frontier.
    pub fn delivered_ahead(&self) -> Vec<i64> {
        self.progress.delivered_ahead()
    }
}

fn settlement(seq: i64, what: Leave) -> Settlement {
    Settlement { seq, what, attempts: 0, history: Vec::new(), next: None }
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
