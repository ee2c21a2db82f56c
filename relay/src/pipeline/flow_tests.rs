// SPDX-License-Identifier: PostgreSQL
//! A model of the whole pipeline: random logs, heads, page sizes, outcomes, times and crashes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dtm_core::options::Ordering;
use dtm_core::position::{Position, Snapshot};
use proptest::prelude::*;
use proptest::sample::Index;
use uuid::Uuid;

use super::super::budget::{Budget, Share};
use super::*;

#[derive(Clone, Debug)]
enum Act {
    /// An event is published, with this key.
    Publish(Option<u8>),
    /// The relay sees the head.
    Look,
    /// A page of so many rows is asked for, looking at so many more.
    Read(usize),
    Send,
    Answer(Index, bool),
    /// Time passes.
    Pass(u64),
    /// The cursor is stored.
    Store,
    /// The relay starts anew from what was stored.
    Crash,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => prop::option::of(0..4_u8).prop_map(Act::Publish),
        4 => Just(Act::Look),
        6 => (1..4_usize).prop_map(Act::Read),
        8 => Just(Act::Send),
        8 => (any::<Index>(), prop::bool::weighted(0.7)).prop_map(|(which, arrived)| Act::Answer(which, arrived)),
        3 => (0..5_000_u64).prop_map(Act::Pass),
        3 => Just(Act::Store),
        1 => Just(Act::Crash),
    ];
    prop::collection::vec(act, 0..500)
}

/// Each event is a transaction of its own: number n has sequence number n and transaction id 2 + n.
fn position(last: i64) -> Arc<Mark> {
    let xmax = 3 + last as u64;
    let snapshot = Snapshot { xmin: xmax, xmax, xip: Vec::new() };
    Mark::new(Position { era: 1, seq: last, top: last, snapshot, floors: Vec::new() })
}

struct Model {
    log: Vec<Option<u8>>,
    head: Arc<Mark>,
    flow: Flow,
    now: Instant,
    out: Vec<Delivery>,
    stored: (i64, Option<i64>, i64),
    /// First arrivals, in their order.
    arrived: Vec<i64>,
    /// Two events of one key were under way at once.
    overtaken: bool,
}

fn flow(stored: (i64, Option<i64>, i64)) -> Flow {
    let (from, target, acked) = stored;
    let cursor = StoredCursor { position: position(from), target: target.map(position), acked };
    let options = Options { ordering: Ordering::Key, max_in_flight: 3, ..Options::default() };
    Flow::new(cursor, [1].into(), &options).unwrap()
}

impl Model {
    fn new(now: Instant) -> Self {
        let stored = (0, None, 0);
        let (log, out, arrived) = (Vec::new(), Vec::new(), Vec::new());
        Model { log, head: position(0), flow: flow(stored), now, out, stored, arrived, overtaken: false }
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

    /// Events with an even number match, and three times as many rows are looked at as are wanted.
    fn read(&mut self, rows: usize) {
        let Some((from, to, after)) = self.flow.piece(Some(&self.head)) else { return };
        let begin = after.max(from.position().seq);
        let end = to.position().seq;
        let scanned = end.min(begin + 3 * rows as i64);
        let matching = (begin + 1..=scanned).filter(|seq| seq % 2 == 0);
        let events: Vec<Event> = matching.take(rows).map(|seq| self.event(seq)).collect();
        let scanned = if events.len() == rows { events[rows - 1].seq } else { scanned };
        let share = Share::new(Budget::new(1_000), 1_000);
        let held = share.hold(share.room(1).unwrap(), 1);
        self.flow.read(Page { scanned, done: scanned == end, events }, &held);
    }

    fn send(&mut self) {
        let Some(delivery) = self.flow.next(self.now) else { return };
        let key = &delivery.event.key;
        self.overtaken |= key.is_some() && self.out.iter().any(|other| other.event.key == *key);
        // The receiver does its work as soon as it is asked; what it answers may get lost.
        if !self.arrived.contains(&delivery.event.seq) {
            self.arrived.push(delivery.event.seq);
        }
        self.out.push(delivery);
    }

    fn answer(&mut self, which: &Index, arrived: bool) {
        if self.out.is_empty() {
            return;
        }
        let delivery = self.out.swap_remove(which.index(self.out.len()));
        if arrived {
            self.flow.delivered(delivery);
        } else {
            let at = self.flow.failed(delivery, self.now, 0.5);
            assert!(at > self.now && self.flow.next_retry().is_some_and(|next| next <= at));
        }
    }

    fn step(&mut self, act: &Act) {
        match act {
            Act::Publish(key) => self.log.push(*key),
            Act::Look => self.head = position(self.log.len() as i64),
            Act::Read(rows) => self.read(*rows),
            Act::Send => self.send(),
            Act::Answer(which, arrived) => self.answer(which, *arrived),
            Act::Pass(ms) => self.now += Duration::from_millis(*ms),
            Act::Store => {
                let Frontier { position, target, acked, .. } = self.flow.frontier();
                let seq = |mark: Arc<Mark>| mark.position().seq;
                self.stored = (seq(position), target.map(seq), acked);
            }
            Act::Crash => {
                self.out.clear();
                self.flow = flow(self.stored);
            }
        }
    }

    /// Everything that the frontier covers has arrived.
    fn covered_is_arrived(&self) -> bool {
        let Frontier { position, acked, .. } = self.flow.frontier();
        let covered = acked.max(position.position().seq);
        (1..=covered).filter(|seq| seq % 2 == 0).all(|seq| self.arrived.contains(&seq))
    }

    fn finish(&mut self) {
        self.head = position(self.log.len() as i64);
        let quiet = |model: &Self| model.flow.frontier().position.position().seq == model.log.len() as i64;
        for _ in 0..100_000 {
            if quiet(self) && self.out.is_empty() {
                break;
            }
            self.read(2);
            self.send();
            while let Some(delivery) = self.out.pop() {
                self.flow.delivered(delivery);
            }
            self.now += Duration::from_secs(1);
        }
    }
}

proptest! {
    #[test]
    fn every_event_arrives_and_keys_keep_their_order(acts in acts()) {
        let mut model = Model::new(Instant::now());
        for act in &acts {
            model.step(act);
            prop_assert!(model.covered_is_arrived(), "after {:?} the cursor covers what did not arrive", act);
        }
        model.finish();
        prop_assert!(!model.overtaken);
        let expected: BTreeSet<i64> = (1..=model.log.len() as i64).filter(|seq| seq % 2 == 0).collect();
        prop_assert_eq!(model.arrived.iter().copied().collect::<BTreeSet<_>>(), expected);
        let mut last = BTreeMap::new();
        for &seq in &model.arrived {
            if let Some(key) = model.log[seq as usize - 1] {
                let before = last.insert(key, seq).unwrap_or(0);
                prop_assert!(before < seq, "{} arrived before {} of key {}", before, seq, key);
            }
        }
        prop_assert_eq!(model.flow.held(), 0, "what is delivered is held no longer");
    }
}
