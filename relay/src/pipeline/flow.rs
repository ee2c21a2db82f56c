// SPDX-License-Identifier: PostgreSQL
//! A pipeline without its I/O: which events wait, which may go, whose fault a failure is, what is parked and what is dead,
//! and how far all are settled.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::{OnDead, Options, Ordering, Retry};
use dtm_core::page::{Event, Page};
use tokio::time::Instant;

use super::budget::Held;
use super::delivery::{Delivery, LaneName, Place, Row};
use super::lane::{Charges, Returned, Unloaded};
use super::lanes::Lanes;
use super::reader::{FlowProgress, Piece, Reader, UnknownEra};
use super::straight::Straight;
use super::verdict::{Judged, Verdict};
use super::windows::{Ahead, Frontier, Progress};
use crate::calls::circuit::Circuit;
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
/// A pipeline that stands still since no more may be parked looks again after this, if nothing has been unparked before.
const STALLED: Duration = Duration::from_secs(30);

/// What may be parked.
#[derive(Clone, Copy, Debug)]
pub struct ParkingBounds {
    /// Events, in all.
    pub events: usize,
    /// Bytes, in all.
    pub bytes: usize,
}

/// The state of a pipeline.
pub struct Flow {
    reader: Reader,
    progress: FlowProgress,
    eras: Arc<[i32]>,
    lanes: Lanes,
    /// Events that go in the order of the log; see [`Straight`].
    straight: Straight,
    circuit: Circuit<LaneName>,
    pace: Pace,
    schedule: Schedule,
    ordering: Ordering,
    on_dead: OnDead,
    bounds: ParkingBounds,
    parked: ParkingBounds,
    in_flight: usize,
    /// Attempts so far.
    sent: u64,
    /// Deliveries so far.
    successes: u64,
    /// Parked when the pipeline began: after the number of shards was changed the log can bring some of them once more.
    known: HashSet<i64>,
    /// Lanes whose head has failed since the last success, or has no attempts left: it dies with the next one.
    suspects: HashSet<LaneName>,
    settlements: Vec<Settlement>,
    /// By sequence number, heads that were forgotten and that something is charged to; they are read again.
    unloaded: HashMap<i64, (Charges, Option<Instant>)>,
    /// The log is not read before this time.
    read_after: Option<Instant>,
}

impl Flow {
    /// Goes on from a cursor, and from what is parked in dtm.retry. `depth`: how many events of one key may be on their way at
    /// once.
    pub fn new(
        cursor: StoredCursor,
        parked: Vec<Parked>,
        eras: Arc<[i32]>,
        options: &Options,
        bounds: ParkingBounds,
        depth: usize,
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
            lanes: Lanes::new(depth),
            straight: Straight::new(depth > 1),
            circuit: Circuit::new(probes),
            pace: Pace::new(options.max_in_flight as usize, options.rate_limit),
            schedule,
            ordering: options.ordering,
            on_dead: options.on_dead,
            bounds,
            parked: ParkingBounds { events: 0, bytes: 0 },
            in_flight: 0,
            sent: 0,
            successes: 0,
            known: parked.iter().map(|parked| parked.seq).collect(),
            suspects: HashSet::new(),
            settlements: Vec::new(),
            unloaded: HashMap::new(),
            read_after: None,
        };
        parked.into_iter().for_each(|parked| flow.remember(parked, now));
        Ok(flow)
    }

    fn remember(&mut self, parked: Parked, now: Instant) {
        let Parked { key, seq, bytes, attempts, next_in, blocks } = parked;
        let name = LaneName::of(seq, key.as_deref(), self.ordering);
        if blocks {
            return self.lanes.push_row(name, Row::blocking(seq));
        }
        self.parked.events += 1;
        self.parked.bytes += bytes;
        let next = next_in.map(|next_in| now + next_in);
        self.suspect_if_over(&name, attempts);
        self.lanes.push_row(name, Row { seq, bytes, attempts, next, blocks });
    }

    /// Whether it wants to read on. While the endpoint is down nothing is read but what probes need, and what is `small`.
    pub fn wants_page(&self, small: bool, now: Instant) -> bool {
        let may_read = self.read_after.is_none_or(|at| at <= now);
        may_read && (!self.circuit.is_open() || small || self.lacking_probes(now) > 0)
    }

    /// How many lanes that have not had their turn are to be in memory yet, if probes may go.
    fn lacking_probes(&self, now: Instant) -> usize {
        if !self.circuit.may_probe(now) {
            return 0;
        }
        let waiting = self.lanes.ready().filter(|lane| self.circuit.has_turn(lane));
        PROBED_LANES.saturating_sub(waiting.take(PROBED_LANES).count())
    }

    /// Nothing can be read just now, because there is nothing or no room for it: if probes may go and all that is in memory
    /// has had its turn, the turns begin anew.
    pub fn has_all_it_gets(&mut self, now: Instant) {
        let has_turn = |lane: &LaneName| self.circuit.has_turn(lane);
        if self.circuit.may_probe(now)
            && self.in_flight == 0
            && !self.lanes.ready().chain(self.lanes.due()).any(has_turn)
        {
            self.circuit.begin_turns();
        }
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
        let all_well = self.lanes.is_empty() && self.suspects.is_empty() && self.unloaded.is_empty();
        self.straight.may_begin(all_well && !self.circuit.is_open());
        for event in page.events {
            let lane = match self.straight.is_on() {
                true => LaneName::Own(event.seq),
                false => LaneName::of(event.seq, event.key.as_deref(), self.ordering),
            };
            let Some(ticket) = self.progress.push(event.seq, lane.clone()) else { continue };
            if self.known.contains(&event.seq) {
                self.progress.ack(ticket);
                continue;
            }
            let (place, held) = (Place::Log(ticket), held.clone());
            let delivery = Delivery { event, lane, place, attempts: 0, turn: 0, held };
            if self.straight.is_on() {
                self.straight.push(delivery);
            } else {
                self.push(delivery);
            }
        }
        self.progress.scanned(page.scanned, page.done);
        self.reader.read(page.scanned, page.done);
        self.advance();
    }

    fn push(&mut self, delivery: Delivery) {
        let lane = &delivery.lane;
        match self.unloaded.remove(&delivery.event.seq).filter(|_| !self.lanes.has(lane)) {
            Some((charges, until)) => {
                self.suspect_if_over(&delivery.lane, charges.attempts);
                self.lanes.push_head(delivery, charges, until);
            }
            None => self.lanes.push(delivery),
        }
    }

    /// Something has failed: from here on each key goes its own way.
    fn go_by_lanes(&mut self) {
        for mut delivery in self.straight.end() {
            let Event { seq, key, .. } = &delivery.event;
            let name = LaneName::of(*seq, key.as_deref(), self.ordering);
            if let Place::Log(ticket) = delivery.place {
                self.progress.tag(ticket, name.clone());
            }
            delivery.lane = name;
            self.push(delivery);
        }
    }

    /// Whether parked events are due and may be read now. While the endpoint is down only as many are as probes need.
    pub fn has_due(&mut self, now: Instant) -> bool {
        self.lanes.wake(now);
        self.loadable(now) > 0 && self.lanes.due().any(|lane| self.circuit.has_turn(lane))
    }

    fn loadable(&self, now: Instant) -> usize {
        if self.circuit.is_open() { self.lacking_probes(now) } else { LOADED_LANES }
    }

    /// Parked events that are due, to be read now: their sequence numbers.
    pub fn load(&mut self, bytes_max: usize, now: Instant) -> Vec<i64> {
        let (lanes_max, circuit) = (self.loadable(now), &self.circuit);
        self.lanes.load(lanes_max, bytes_max, |lane| circuit.has_turn(lane))
    }

    /// The parked events that were asked for; those that are missing have been discarded.
    pub fn loaded(&mut self, asked: &[i64], events: Vec<Event>, held: &Arc<Held>) {
        let delivery = |event: Event| {
            let lane = LaneName::of(event.seq, event.key.as_deref(), self.ordering);
            Delivery { event, lane, place: Place::Row, attempts: 0, turn: 0, held: held.clone() }
        };
        let (gone, bytes) = self.lanes.loaded(asked, events.into_iter().map(delivery).collect());
        self.unpark(gone, bytes);
        self.advance();
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
        let mut delivery = match self.straight.is_on() {
            true => self.straight.next()?,
            false => self.lanes.take(|lane| circuit.admits(lane, in_flight, now))?,
        };
        self.sent += 1;
        delivery.turn = self.sent;
        self.in_flight += 1;
        self.pace.made(now);
        Some(delivery)
    }

    /// When there may be something to do that no answer and no page brings.
    pub fn next_timer(&self, now: Instant) -> Option<Instant> {
        let paced = match self.pace.free(self.in_flight, now) {
            Err(at) if self.lanes.ready().next().is_some() || self.straight.has_next() => at,
            _ => None,
        };
        let waits = self.circuit.next_probe().into_iter().chain(self.read_after).filter(|at| *at > now);
        paced.into_iter().chain(waits).chain(self.lanes.next_timer()).min()
    }

    /// An attempt has ended; `attempt` tells of it, where it failed. `random` is drawn evenly from `[0, 1)`. Answers what is
    /// judged by it: a failed attempt, as soon as nothing else of its key is on its way.
    pub fn settle(
        &mut self,
        delivery: Delivery,
        outcome: Outcome,
        attempt: impl FnOnce(&Outcome) -> Attempt,
        now: Instant,
        random: f64,
    ) -> Option<Judged> {
        self.in_flight -= 1;
        if self.straight.is_on() {
            self.settle_straight(delivery, outcome.class);
            self.advance();
            return None;
        }
        let judged = match outcome.class {
            Class::Accepted => self.delivered(delivery, now),
            _ => {
                let attempt = attempt(&outcome);
                self.lanes.came_back(Returned { delivery, outcome, attempt })
            }
        };
        let verdict = judged.map(|first| self.judge(first, now, random));
        self.advance();
        verdict
    }

    /// What fails is judged when it goes again, as the first of its key.
    fn settle_straight(&mut self, delivery: Delivery, class: Class) {
        if class != Class::Accepted {
            self.straight.failed(delivery);
        } else if let Place::Log(ticket) = delivery.place {
            self.successes += 1;
            self.circuit.succeeded(&delivery.lane);
            self.pace.succeeded();
            self.progress.ack(ticket);
        }
        if self.in_flight == 0 && self.straight.has_failed() {
            self.go_by_lanes();
        }
    }

    /// An attempt that failed, of an event whose lane has nothing else on its way.
    fn judge(&mut self, first: Returned, now: Instant, random: f64) -> Judged {
        let Returned { delivery, outcome, attempt } = first;
        let (id, topic) = (delivery.event.id, delivery.event.topic.clone());
        let verdict = match outcome.class {
            Class::Accepted | Class::Withdrawn => {
                self.lanes.again(delivery);
                Verdict::Waits
            }
            Class::Gone => {
                self.lanes.again(delivery);
                Verdict::Gone
            }
            Class::Throttled => self.throttled(delivery, outcome.retry_after, now),
            Class::Unsent => {
                let blame = self.circuit.trip(&delivery.lane, now, random);
                self.endpoints_fault(delivery, blame)
            }
            Class::Unsendable => self.dies(delivery, attempt),
            Class::Refused if !self.circuit.is_open() && self.circuit.vouches_against(&delivery.lane) => {
                self.circuit.failed(&delivery.lane, self.lanes.waiting(), now, random);
                self.dies(delivery, attempt)
            }
            Class::Refused | Class::Failed => self.failed(delivery, attempt, now, random),
            Class::Overloaded => {
                self.pace.slow_down(outcome.retry_after, now);
                self.failed(delivery, attempt, now, random)
            }
        };
        Judged { id, topic, outcome, verdict }
    }

    /// Answers what of its lane is to be judged now.
    fn delivered(&mut self, delivery: Delivery, now: Instant) -> Option<Returned> {
        self.successes += 1;
        self.circuit.succeeded(&delivery.lane);
        self.pace.succeeded();
        self.lanes.arrived(&delivery.lane);
        match delivery.place {
            Place::Log(ticket) => self.progress.ack(ticket),
            Place::Row => {
                self.unpark(1, delivery.event.size());
                let (seq, what, history) = (delivery.event.seq, Leave::Done, Vec::new());
                self.settlements.push(Settlement { seq, what, attempts: 0, history, next: None });
            }
        }
        self.confirm(&delivery.lane, now);
        self.lanes.all_back(&delivery.lane)
    }

    /// Moves the frontier as far as it goes: over what is settled, and over what may be parked.
    fn advance(&mut self) {
        while let Some((ticket, seq, name)) = self.progress.advance(&mut self.settlements) {
            let name = name.clone();
            if self.is_full() || self.circuit.is_open() {
                return;
            }
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

    /// Whether no more may be parked.
    fn is_full(&self) -> bool {
        self.parked.events >= self.bounds.events || self.parked.bytes >= self.bounds.bytes
    }

    fn unpark(&mut self, events: usize, bytes: usize) {
        if events > 0 && !self.circuit.is_open() {
            self.read_after = None;
        }
        self.parked.events = self.parked.events.saturating_sub(events);
        self.parked.bytes = self.parked.bytes.saturating_sub(bytes);
    }

    /// Whether nothing is in flight and nothing can go: the endpoint is down and no probe is due, or no more may be parked. Then
    /// nothing of the log needs to be held.
    pub fn may_unload(&self, now: Instant) -> bool {
        let is_down = self.circuit.is_open() && !self.circuit.may_probe(now);
        let is_stalled =
            || self.is_full() && self.lanes.ready().next().is_none() && self.lanes.due().next().is_none();
        self.in_flight == 0
            && !self.straight.has_next()
            && self.progress.held() > 0
            && (is_down || is_stalled())
    }

    /// Forgets what is read from the log and not settled; it is read again when it may help. No parked events may be being
    /// read.
    pub fn unload(&mut self, now: Instant) -> Result<(), UnknownEra> {
        let Frontier { position, target, acked, .. } = self.progress.frontier();
        let progress =
            std::mem::replace(&mut self.progress, Progress::new(position.clone(), Ahead::delivered([])));
        let cursor = StoredCursor { position, target, acked, ahead: Vec::new(), windows: Vec::new() };
        (self.reader, self.progress) = Reader::new(cursor, progress.into_ahead(), self.eras.clone())?;
        for Unloaded { seq, place, charges, until } in self.lanes.unload() {
            if place != Place::Row {
                self.unloaded.insert(seq, (charges, until));
            } else if !charges.history.is_empty() {
                let Charges { attempts, history, .. } = charges;
                let (what, next) = (Leave::Again, until.or(Some(now)));
                self.settlements.push(Settlement { seq, what, attempts, history, next });
            }
        }
        let (lanes, schedule) = (&mut self.lanes, &self.schedule);
        self.suspects
            .retain(|name| lanes.get_mut(name).is_some_and(|lane| schedule.is_over(lane.charges.attempts)));
        self.read_after = self.circuit.next_probe().or(Some(now + STALLED));
        Ok(())
    }

    /// Whether answers are to come.
    pub fn has_in_flight(&self) -> bool {
        self.in_flight > 0
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

mod blame;

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
