// SPDX-License-Identifier: PostgreSQL
//! A model of the whole pipeline: random logs, heads, page sizes, outcomes, times, crashes and orderly ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dtm_core::position::{Position, Snapshot};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;
use uuid::Uuid;

use super::super::budget::{Budget, Share};
use super::*;

const ATTEMPTS: u32 = 3;

#[derive(Clone, Debug)]
enum Act {
    /// An event is published, with this key.
    Publish(Option<u8>),
    /// The relay sees the head.
    Look,
    /// A page of so many rows is asked for, looking at so many more.
    Read(usize),
    /// Parked events that are due are read.
    /// Up to so many bytes of them.
    Load(usize),
    Send,
    Answer(Index, Class),
    /// Time passes.
    Pass(u64),
    /// What is settled is stored.
    Store,
    /// What is read is forgotten, where that is allowed.
    Unload,
    /// The relay ends in order, and begins anew.
    End,
    /// The relay begins anew from what was stored.
    Crash,
}

fn class() -> impl Strategy<Value = Class> {
    prop_oneof![
        10 => Just(Class::Accepted),
        5 => Just(Class::Failed),
        1 => Just(Class::Refused),
        1 => Just(Class::Unsent),
        1 => Just(Class::Throttled),
        1 => Just(Class::Overloaded),
        1 => Just(Class::Unsendable),
    ]
}

fn acts(class: impl Strategy<Value = Class> + 'static) -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => prop::option::of(0..4_u8).prop_map(Act::Publish),
        4 => Just(Act::Look),
        6 => (1..4_usize).prop_map(Act::Read),
        3 => (1..2_000_usize).prop_map(Act::Load),
        8 => Just(Act::Send),
        8 => (any::<Index>(), class).prop_map(|(which, class)| Act::Answer(which, class)),
        3 => (0..5_000_u64).prop_map(Act::Pass),
        3 => Just(Act::Store),
        1 => Just(Act::Unload),
        1 => Just(Act::End),
        1 => Just(Act::Crash),
    ];
    prop::collection::vec(act, 0..600)
}

/// Of sinks that take one event of a key at once, and of those that keep their order themselves.
fn depth() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(3)]
}

/// Each event is a transaction of its own: number n has sequence number n and transaction id 2 + n.
fn position(last: i64) -> Arc<Mark> {
    let xmax = 3 + last as u64;
    let snapshot = Snapshot { xmin: xmax, xmax, xip: Vec::new() };
    Mark::new(Position { era: 1, seq: last, top: last, snapshot, floors: Vec::new() })
}

/// What the database has.
#[derive(Clone, Default)]
struct Stored {
    cursor: (i64, Option<i64>, i64),
    ahead: Vec<i64>,
    /// By the order in which they were parked.
    rows: Vec<(i64, u32, Option<Instant>)>,
    dead: BTreeMap<i64, u32>,
}

struct Model {
    /// How many events of a key the sink takes at once, whose order it keeps itself if they are more than one.
    depth: usize,
    log: Vec<Option<u8>>,
    head: Arc<Mark>,
    flow: Flow,
    now: Instant,
    out: Vec<Delivery>,
    stored: Stored,
    /// What is left to be stored.
    left: Vec<Settlement>,
    /// First arrivals, in their order.
    arrived: Vec<i64>,
    accepted: BTreeSet<i64>,
    refused: BTreeSet<i64>,
    crashed: bool,
    /// What must never be, if it was.
    wrong: Option<String>,
}

fn options() -> Options {
    let json = json!({"max_in_flight": 3, "retry_base": 1, "retry_cap": 4, "retry_attempts": ATTEMPTS});
    Options::from_json(&json).unwrap()
}

fn held() -> Arc<Held> {
    let share = Share::new(Budget::new(1_000), 1_000);
    share.hold(share.room(1).unwrap(), 1)
}

impl Model {
    fn new(depth: usize, now: Instant) -> Self {
        let stored = Stored::default();
        let flow = begin(&stored, &[], depth, now);
        Model {
            depth,
            log: Vec::new(),
            head: position(0),
            flow,
            now,
            out: Vec::new(),
            stored,
            left: Vec::new(),
            arrived: Vec::new(),
            accepted: BTreeSet::new(),
            refused: BTreeSet::new(),
            crashed: false,
            wrong: None,
        }
    }

    fn event(&self, seq: i64) -> Event {
        Event {
            seq,
            published_at_us: 0,
            id: Uuid::from_u128(seq as u128),
            topic: "t".into(),
            key: self.log[seq as usize - 1].map(|key| key.to_string().into()),
            content_type: "x".into(),
            headers: None,
            payload: None,
        }
    }

    /// The piece that would be read now.
    fn piece(&mut self) -> Option<Piece> {
        if self.flow.wants_page(false, self.now) { self.flow.piece(Some(&self.head)) } else { None }
    }

    /// Events with an even number match, and three times as many rows are looked at as are wanted.
    fn read(&mut self, rows: usize) {
        let Some(piece) = self.piece() else { return };
        let begin = piece.after.max(piece.from.position().seq);
        let end = piece.to.position().seq;
        let scanned = end.min(begin + 3 * rows as i64);
        let matching = (begin + 1..=scanned).filter(|seq| seq % 2 == 0);
        let events: Vec<Event> = matching.take(rows).map(|seq| self.event(seq)).collect();
        let scanned = if events.len() == rows { events[rows - 1].seq } else { scanned };
        self.flow.read(Page { scanned, done: scanned == end, events }, &held());
    }

    fn load(&mut self, bytes: usize) {
        if !self.flow.has_due(self.now) {
            return;
        }
        let asked = self.flow.load(bytes, self.now);
        let found = self.stored.rows.iter().map(|row| row.0).filter(|seq| asked.contains(seq));
        let found: Vec<Event> = found.map(|seq| self.event(seq)).collect();
        // What is on its way to the database is waited for: a row that is not there yet would count as discarded.
        self.store();
        let found_now = self.stored.rows.iter().map(|row| row.0).filter(|seq| asked.contains(seq));
        let events: Vec<Event> = found_now.map(|seq| self.event(seq)).collect();
        if events.len() < found.len() {
            self.wrong = Some("a row went while it was read".into());
        }
        self.flow.loaded(&asked, events, &held());
    }

    fn send(&mut self) {
        if self.piece().is_none() && !self.flow.has_due(self.now) {
            self.flow.has_all_it_gets(self.now);
        }
        let Some(delivery) = self.flow.next(self.now) else { return };
        let (seq, key) = (delivery.event.seq, &delivery.event.key);
        let others = self.out.iter().filter(|other| key.is_some() && other.event.key == *key);
        if others.clone().count() >= self.depth || others.clone().any(|other| other.event.seq > seq) {
            self.wrong = Some(format!("too many events of key {key:?} are under way, or out of order"));
        }
        if !self.crashed && self.accepted.contains(&seq) {
            self.wrong = Some(format!("{seq} is sent again after it was accepted"));
        }
        // A receiver does its work as soon as it is asked; what it answers may get lost.
        if self.depth == 1 {
            self.arrives(seq);
        }
        self.out.push(delivery);
    }

    fn answer(&mut self, at: usize, class: Class) {
        if self.depth == 1 {
            let delivery = self.out.swap_remove(at);
            return self.settle(delivery, class);
        }
        // What is sent of one key is answered in its order, and what follows a failure comes back with it.
        let (seq, key) = (self.out[at].event.seq, self.out[at].event.key.clone());
        let is_of_lane = |event: &Event| event.seq == seq || key.is_some() && event.key == key;
        let mut of_lane: Vec<Delivery> =
            self.out.extract_if(.., |delivery| is_of_lane(&delivery.event)).collect();
        of_lane.sort_by_key(|delivery| delivery.event.seq);
        let mut of_lane = of_lane.into_iter();
        let Some(first) = of_lane.next() else { return };
        // Also what fails counts: it may die, and what comes after it goes on.
        self.arrives(first.event.seq);
        if class == Class::Accepted {
            self.out.extend(of_lane);
            return self.settle(first, class);
        }
        let mut back: Vec<(Delivery, Class)> = of_lane.map(|delivery| (delivery, Class::Withdrawn)).collect();
        back.push((first, class));
        back.into_iter().for_each(|(delivery, class)| self.settle(delivery, class));
    }

    fn arrives(&mut self, seq: i64) {
        if !self.arrived.contains(&seq) {
            self.arrived.push(seq);
        }
    }

    fn settle(&mut self, delivery: Delivery, class: Class) {
        let seq = delivery.event.seq;
        let outcome = Outcome::without_answer(class, "a test");
        let attempt = |outcome: &Outcome| Attempt::new(jiff::Timestamp::UNIX_EPOCH, outcome);
        if class == Class::Accepted {
            self.accepted.insert(seq);
        }
        let Some(judged) = self.flow.settle(delivery, outcome, attempt, self.now, 0.5) else { return };
        match (judged.outcome.class, judged.verdict) {
            (Class::Refused | Class::Unsendable, Verdict::Dead) => {
                self.refused.insert(judged.id.as_u128() as i64);
            }
            (Class::Accepted, _) | (_, Verdict::Dead | Verdict::Gone) => {
                self.wrong = Some(format!("{class:?} gave {:?}", judged.verdict));
            }
            _ => {}
        }
    }

    fn store(&mut self) {
        let (frontier, settlements) = self.flow.take_settled();
        self.left.extend(settlements);
        let seq = |mark: Arc<Mark>| mark.position().seq;
        self.stored.cursor = (seq(frontier.position), frontier.target.map(seq), frontier.acked);
        self.stored.ahead.clear();
        for Settlement { seq, what, attempts, next, .. } in std::mem::take(&mut self.left) {
            let rows = &mut self.stored.rows;
            let before = rows.len();
            match what {
                Leave::Park => rows.push((seq, attempts, next)),
                Leave::Again => {
                    rows.iter_mut().filter(|row| row.0 == seq).for_each(|row| *row = (seq, attempts, next))
                }
                Leave::Bury => drop(self.stored.dead.insert(seq, attempts)),
                Leave::Die | Leave::Done => rows.retain(|row| row.0 != seq),
            }
            if what == Leave::Die {
                self.stored.dead.insert(seq, attempts);
            }
            if matches!(what, Leave::Die | Leave::Done) && before == self.stored.rows.len() {
                self.wrong = Some(format!("{seq} leaves a row that it has not"));
            }
        }
    }

    fn end(&mut self) {
        for delivery in std::mem::take(&mut self.out) {
            self.arrives(delivery.event.seq);
            self.settle(delivery, Class::Accepted);
        }
        self.store();
        self.stored.ahead = self.flow.delivered_ahead();
        self.flow = begin(&self.stored, &self.log, self.depth, self.now);
    }

    fn step(&mut self, act: &Act) {
        match act {
            Act::Publish(key) => self.log.push(*key),
            Act::Look => self.head = position(self.log.len() as i64),
            Act::Read(rows) => self.read(*rows),
            Act::Load(bytes) => self.load(*bytes),
            Act::Send => self.send(),
            Act::Answer(..) if self.out.is_empty() => {}
            Act::Answer(which, class) => self.answer(which.index(self.out.len()), *class),
            Act::Pass(ms) => self.now += Duration::from_millis(*ms),
            Act::Store => self.store(),
            Act::Unload => {
                if self.flow.may_unload(self.now) {
                    self.flow.unload(self.now).unwrap();
                }
            }
            Act::End => self.end(),
            Act::Crash => {
                // What is on its way may have arrived, and nobody will know.
                std::mem::take(&mut self.out).iter().for_each(|delivery| self.arrives(delivery.event.seq));
                self.left.clear();
                self.crashed = true;
                self.flow = begin(&self.stored, &self.log, self.depth, self.now);
            }
        }
    }

    /// Everything that the stored cursor covers has arrived, is parked, or is dead for a reason.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let (from, _, acked) = self.stored.cursor;
        for seq in matching(acked.max(from)) {
            let parked = self.stored.rows.iter().any(|row| row.0 == seq);
            if !self.accepted.contains(&seq) && !parked && !self.stored.dead.contains_key(&seq) {
                return Err(format!("the cursor covers {seq}, which is nowhere"));
            }
        }
        for (seq, attempts) in &self.stored.dead {
            if *attempts < ATTEMPTS && !self.refused.contains(seq) {
                return Err(format!("{seq} died after {attempts} attempts"));
            }
        }
        Ok(())
    }

    /// From now on the endpoint takes everything.
    fn finish(&mut self) {
        self.head = position(self.log.len() as i64);
        for _ in 0..100_000 {
            self.store();
            let (from, target, _) = self.stored.cursor;
            let all_read = from == self.log.len() as i64 && target.is_none();
            if all_read && self.out.is_empty() && self.stored.rows.is_empty() && self.flow.held() == 0 {
                break;
            }
            self.round(&[]);
        }
    }

    /// From now on the endpoint takes everything but what is of these keys, and there is new traffic without a key once in
    /// so many rounds: until everything that was published before has arrived or is dead.
    fn finish_with_poison(&mut self, keys: &[u8], every: usize, unload: bool) -> bool {
        let all = self.log.len() as i64;
        for round in 0..20_000 {
            self.store();
            let is_settled = |seq: &i64| self.accepted.contains(seq) || self.stored.dead.contains_key(seq);
            if matching(all).all(|seq| is_settled(&seq)) {
                return true;
            }
            if round % every == 0 {
                self.log.extend([None; 2]);
                self.head = position(self.log.len() as i64);
            }
            if unload && self.out.is_empty() && self.flow.may_unload(self.now) {
                self.flow.unload(self.now).unwrap();
            }
            self.round(keys);
        }
        false
    }

    fn round(&mut self, poison: &[u8]) {
        self.read(2);
        self.load(1);
        self.send();
        while !self.out.is_empty() {
            let key = self.log[self.out[0].event.seq as usize - 1];
            let is_poison = key.is_some_and(|key| poison.contains(&key));
            let class = if is_poison { Class::Failed } else { Class::Accepted };
            self.answer(0, class);
        }
        self.now += Duration::from_secs(1);
    }
}

/// The numbers of all that match.
fn matching(last: i64) -> impl Iterator<Item = i64> {
    (1..=last).filter(|seq| seq % 2 == 0)
}

fn begin(stored: &Stored, log: &[Option<u8>], depth: usize, now: Instant) -> Flow {
    let (from, target, acked) = stored.cursor;
    let (target, ahead) = (target.map(position), stored.ahead.clone());
    let cursor = StoredCursor { position: position(from), target, acked, ahead, windows: Vec::new() };
    let parked = |&(seq, attempts, next): &(i64, u32, Option<Instant>)| Parked {
        key: log[seq as usize - 1].map(|key| key.to_string().into()),
        seq,
        bytes: 1,
        attempts,
        next_in: next.map(|next| next.saturating_duration_since(now)),
        blocks: false,
    };
    let parked = stored.rows.iter().map(parked).collect();
    let bounds = ParkingBounds { events: 6, bytes: 1_000 };
    Flow::new(cursor, parked, [1].into(), &options(), bounds, depth, now).unwrap()
}

#[test]
fn a_dead_letter_that_blocks_its_key_blocks_what_comes_after_it_and_not_what_comes_before() {
    let now = Instant::now();
    let row = |seq: i64, blocks: bool| Parked {
        key: Some("0".into()),
        seq,
        bytes: 1,
        attempts: 0,
        next_in: (seq == 2).then_some(Duration::ZERO),
        blocks,
    };
    let cursor = StoredCursor {
        position: position(6),
        target: None,
        acked: 0,
        ahead: Vec::new(),
        windows: Vec::new(),
    };
    let parked = vec![row(2, false), row(4, true), row(6, false)];
    let bounds = ParkingBounds { events: 6, bytes: 1_000 };
    let flow = Flow::new(cursor, parked, [1].into(), &options(), bounds, 1, now).unwrap();
    let mut model = Model { flow, head: position(8), ..Model::new(1, now) };
    model.log = vec![Some(0); 8];
    model.stored.rows = vec![(2, 0, Some(now)), (6, 0, None)];
    (0..20).for_each(|_| model.round(&[]));
    assert_eq!(model.arrived, [2]);
    model.store();
    assert_eq!(model.stored.rows.iter().map(|row| row.0).collect::<Vec<_>>(), [6, 8], "8 is parked behind 6");
}

#[test]
fn one_that_is_throttled_while_others_go_is_parked_uncharged_and_one_of_many_is_not() {
    let mut model = Model::new(1, Instant::now());
    model.log = (0..60).map(|n| (n == 1).then_some(9)).collect();
    model.head = position(60);
    for _ in 0..60 {
        model.read(4);
        model.send();
        while let Some(delivery) = model.out.pop() {
            let class = if delivery.event.seq == 2 { Class::Throttled } else { Class::Accepted };
            model.settle(delivery, class);
        }
        model.now += Duration::from_secs(1);
    }
    model.store();
    assert_eq!(model.stored.rows.iter().map(|row| (row.0, row.1)).collect::<Vec<_>>(), [(2, 0)]);
    let (from, target, _) = model.stored.cursor;
    assert_eq!((from, target), (60, None), "the cursor passes it");
    let mut model = Model::new(1, Instant::now());
    model.log = vec![None; 20];
    model.head = position(20);
    for _ in 0..60 {
        model.read(4);
        model.send();
        while let Some(delivery) = model.out.pop() {
            model.settle(delivery, Class::Throttled);
        }
        model.now += Duration::from_secs(1);
        model.store();
        assert!(model.stored.rows.is_empty());
    }
}

fn assert_order(model: &Model) -> Result<(), TestCaseError> {
    let mut last = BTreeMap::new();
    for &seq in &model.arrived {
        if let Some(key) = model.log[seq as usize - 1] {
            let before = last.insert(key, seq).unwrap_or(0);
            prop_assert!(before < seq, "{} arrived before {} of key {}", before, seq, key);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn every_event_arrives_or_dies_for_a_reason_and_keys_keep_their_order(acts in acts(class()), depth in depth()) {
        let mut model = Model::new(depth, Instant::now());
        for act in &acts {
            model.step(act);
            model.check().map_err(|wrong| TestCaseError::fail(format!("{wrong}, after {act:?}")))?;
        }
        model.finish();
        model.check().map_err(TestCaseError::fail)?;
        let all: BTreeSet<i64> = matching(model.log.len() as i64).collect();
        let dead = model.stored.dead.keys().copied();
        prop_assert_eq!(model.accepted.iter().copied().chain(dead).collect::<BTreeSet<_>>(), all);
        prop_assert_eq!((model.flow.held(), model.stored.rows.len()), (0, 0), "what is settled is held no longer");
        prop_assert!(model.flow.lanes.is_empty());
        assert_order(&model)?;
    }

    #[test]
    fn poison_dies_and_holds_up_nobody_else(
        acts in acts(class()), depth in depth(), keys in prop::collection::vec(0..4_u8, 1..4), every in 1..40_usize,
        unload: bool,
    ) {
        let mut model = Model::new(depth, Instant::now());
        acts.iter().for_each(|act| model.step(act));
        prop_assert!(model.finish_with_poison(&keys, every, unload), "something is stuck: {:?}", model.flow.lanes);
        model.check().map_err(TestCaseError::fail)?;
        assert_order(&model)?;
    }

    #[test]
    fn among_many_that_fail_the_one_that_does_not_is_found(
        bad in 1..60_u8, at_once in 1..4_usize, depth in depth(), unload: bool,
    ) {
        let mut model = Model::new(depth, Instant::now());
        model.flow.pace = Pace::new(at_once, None);
        let keys: Vec<u8> = (1..=bad).collect();
        model.log = keys.iter().chain([&0]).flat_map(|key| [None, Some(*key)]).collect();
        model.head = position(model.log.len() as i64);
        let good = model.log.len() as i64;
        for _ in 0..10_000 {
            if unload && model.flow.may_unload(model.now) {
                model.flow.unload(model.now).unwrap();
            }
            model.round(&keys);
            if model.accepted.contains(&good) {
                break;
            }
        }
        prop_assert!(model.accepted.contains(&good), "its key never had its turn");
    }

    #[test]
    fn an_endpoint_that_takes_nothing_parks_and_kills_nothing(acts in acts(Just(Class::Failed)), depth in depth()) {
        let mut model = Model::new(depth, Instant::now());
        for act in acts.iter().filter(|act| !matches!(act, Act::End)) {
            model.step(act);
            prop_assert!(model.stored.rows.is_empty() && model.stored.dead.is_empty(), "after {:?}", act);
        }
        model.finish();
        let all: BTreeSet<i64> = matching(model.log.len() as i64).collect();
        prop_assert_eq!(model.accepted, all);
    }
}
