// SPDX-License-Identifier: PostgreSQL
//! A model of PostgreSQL small enough to run a schedule in microseconds: transactions take ids and sequence numbers,
//! lock the log and end in any order, between any two steps of a reader.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Begin,
    TakeXid(usize),
    Lock(usize),
    Publish(usize),
    Commit(usize),
    Rollback(usize),
    ReadSeq,
    ReadLocks,
    ReadSnapshot,
    Restart,
}

#[derive(Default, Clone)]
struct Tx {
    xid: Option<u64>,
    locked: bool,
    rows: Vec<i64>,
}

#[derive(Default)]
struct Database {
    next_xid: u64,
    latest_completed: u64,
    last_seq: i64,
    running: Vec<Tx>,
    log: Vec<(i64, u64)>,
}

impl Database {
    fn new() -> Self {
        Database { next_xid: 100, latest_completed: 99, ..Default::default() }
    }

    fn take_xid(&mut self, tx: usize) -> u64 {
        *self.running[tx].xid.get_or_insert_with(|| {
            self.next_xid += 1;
            self.next_xid - 1
        })
    }

    /// As the extension does it: lock, transaction id, sequence number.
    fn publish(&mut self, tx: usize) {
        self.running[tx].locked = true;
        self.take_xid(tx);
        self.last_seq += 1;
        let seq = self.last_seq;
        self.running[tx].rows.push(seq);
    }

    fn end(&mut self, tx: usize, commit: bool) {
        let tx = self.running.swap_remove(tx);
        let Some(xid) = tx.xid else { return };
        self.latest_completed = self.latest_completed.max(xid);
        if commit {
            self.log.extend(tx.rows.iter().map(|&seq| (seq, xid)));
        }
    }

    fn snapshot(&self) -> Snapshot {
        let xmax = self.latest_completed + 1;
        let xip: BTreeSet<u64> =
            self.running.iter().filter_map(|tx| tx.xid).filter(|&xid| xid < xmax).collect();
        Snapshot { xmin: xip.first().copied().unwrap_or(xmax), xmax, xip: xip.into_iter().collect() }
    }

    fn publishers(&self) -> Vec<u64> {
        self.running.iter().filter(|tx| tx.locked).filter_map(|tx| tx.xid).collect()
    }

    fn read(&self, window: Window<'_>) -> Vec<i64> {
        let low = window.low();
        let mut rows: Vec<i64> =
            self.log.iter().filter(|r| r.0 > low && window.contains(r.1)).map(|r| r.0).collect();
        rows.sort_unstable();
        rows
    }
}

/// How a reader makes its position of a reading: ours, or one that looks right.
type Advance = fn(Option<&Position>, Reading) -> Position;

/// "Remember the highest seq and the snapshot; what the snapshot lists as running may lie below that seq, all else lies
/// above it." A transaction at or above xmax stands in no list and may have published already.
fn naive(base: Option<&Position>, mut reading: Reading) -> Position {
    let listed = reading.snapshot.xip.clone();
    reading.publishers.retain(|xid| listed.contains(xid));
    advance(base, reading)
}

/// Runs a schedule and answers the sequence numbers that were committed and those that were read.
fn run(steps: &[Step], advance: Advance) -> (Vec<i64>, Vec<i64>) {
    let mut db = Database::new();
    let mut position = Position::start_of_era(1);
    let (mut seq, mut publishers) = (None, None);
    let mut read = Vec::new();
    let mut take = |db: &Database, seq: i64, publishers: Vec<u64>, position: &mut Position| {
        let reading =
            Reading { era: 1, seq, publishers, snapshot: db.snapshot(), top: db.last_seq, own: None };
        let next = advance(Some(position), reading);
        let text = next.to_string().parse().unwrap();
        read.extend(db.read(Window::new(position, &text).unwrap()));
        *position = text;
    };
    for step in steps {
        let pick = |i: &usize| (!db.running.is_empty()).then(|| i % db.running.len());
        match step {
            Step::Begin => db.running.push(Tx::default()),
            Step::TakeXid(i) => drop(pick(i).map(|i| db.take_xid(i))),
            Step::Lock(i) => drop(pick(i).map(|i| db.running[i].locked = true)),
            Step::Publish(i) => drop(pick(i).map(|i| db.publish(i))),
            Step::Commit(i) => drop(pick(i).map(|i| db.end(i, true))),
            Step::Rollback(i) => drop(pick(i).map(|i| db.end(i, false))),
            Step::ReadSeq => (seq, publishers) = (Some(db.last_seq), None),
            Step::ReadLocks if seq.is_some() => publishers = Some(db.publishers()),
            Step::ReadSnapshot if publishers.is_some() => {
                take(&db, seq.take().unwrap(), publishers.take().unwrap(), &mut position);
            }
            Step::Restart => (seq, publishers) = (None, None),
            Step::ReadLocks | Step::ReadSnapshot => {}
        }
    }
    while !db.running.is_empty() {
        db.end(0, true);
    }
    take(&db, db.last_seq, db.publishers(), &mut position);
    (db.log.iter().map(|row| row.0).collect(), read)
}

fn step() -> impl Strategy<Value = Step> {
    let tx = 0..8usize;
    prop_oneof![
        3 => Just(Step::Begin),
        1 => tx.clone().prop_map(Step::TakeXid),
        1 => tx.clone().prop_map(Step::Lock),
        5 => tx.clone().prop_map(Step::Publish),
        3 => tx.clone().prop_map(Step::Commit),
        1 => tx.prop_map(Step::Rollback),
        3 => Just(Step::ReadSeq),
        3 => Just(Step::ReadLocks),
        3 => Just(Step::ReadSnapshot),
        1 => Just(Step::Restart),
    ]
}

fn exactly_once((mut committed, mut read): (Vec<i64>, Vec<i64>)) -> bool {
    committed.sort_unstable();
    read.sort_unstable();
    committed == read
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, ..ProptestConfig::default() })]

    #[test]
    fn every_committed_row_is_read_exactly_once(steps in prop::collection::vec(step(), 0..80)) {
        let (mut committed, mut read) = run(&steps, advance);
        committed.sort_unstable();
        read.sort_unstable();
        prop_assert_eq!(committed, read);
    }
}

#[test]
fn the_naive_position_loses_rows_in_this_model() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let schedules = prop::collection::vec(step(), 40..80);
    let failed = (0..200)
        .filter(|_| {
            let steps = schedules.new_tree(&mut runner).unwrap().current();
            !exactly_once(run(&steps, naive))
        })
        .count();
    assert!(failed >= 10, "the model found {failed} losses in 200 schedules: it can tell nothing");
}

#[test]
fn a_long_writer_costs_one_look_back_when_it_ends() {
    let base = Position::start_of_era(1);
    let reading = |seq, publishers: &[u64], snapshot: &str| Reading {
        era: 1,
        seq,
        publishers: publishers.to_vec(),
        snapshot: snapshot.parse().unwrap(),
        top: seq,
        own: None,
    };
    let first = advance(Some(&base), reading(10, &[100], "100:105:100"));
    assert_eq!(first.floors, [Floor { xid: 100, seq: 0 }]);
    let second = advance(Some(&first), reading(20, &[100, 110], "100:112:100,110"));
    assert_eq!(second.floors, [Floor { xid: 100, seq: 0 }, Floor { xid: 110, seq: 10 }]);
    assert_eq!(Window::new(&first, &second).unwrap().low(), 10, "still running: no look back");
    let third = advance(Some(&second), reading(30, &[], "120:120:"));
    assert_eq!(Window::new(&second, &third).unwrap().low(), 0, "ended: one look back");
    let fourth = advance(Some(&third), reading(40, &[], "130:130:"));
    assert_eq!(Window::new(&third, &fourth).unwrap().low(), 30);
}

#[test]
fn a_position_inside_a_publishing_transaction_does_not_see_it() {
    let snapshot = "101:101:".parse().unwrap();
    let position =
        advance(None, Reading { era: 1, seq: 5, publishers: vec![100], snapshot, top: 5, own: Some(100) });
    assert!(!position.snapshot.sees(100));
    assert_eq!(position.floors, [Floor { xid: 100, seq: 0 }]);
}

#[test]
fn positions_of_different_eras_have_no_window() {
    let (one, two) = (Position::start_of_era(1), Position::start_of_era(2));
    assert!(Window::new(&one, &two).is_none());
    let drained = Position::end_of_era(1);
    assert!(Window::new(&one, &drained).unwrap().contains(5));
}
