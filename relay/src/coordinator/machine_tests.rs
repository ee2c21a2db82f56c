// SPDX-License-Identifier: PostgreSQL
use proptest::prelude::*;

use super::*;

fn branches(n: usize) -> Vec<Branch> {
    vec![Branch { is_done: false, attempts: 0, has_row: false }; n]
}

fn submitted(n: usize) -> State {
    State {
        kind: Kind::Message,
        status: Status::Submitted,
        branches: branches(n),
        concurrent: false,
        retry_limit: None,
        failures: 0,
        undecidable: false,
        waits: false,
    }
}

fn report(answer: Answer) -> Report {
    Report { answer, was_called: true, status: None, error: "e".into(), endpoint: None, not_before: None }
}

#[test]
fn actions_are_called_in_order_and_a_clean_pass_stores_only_the_end() {
    let mut machine = Machine::new(submitted(2));
    for at in 0..2 {
        assert_eq!(machine.step(), Next::Call(vec![at]));
        machine.answered(at, report(Answer::Success));
    }
    assert_eq!(machine.step(), Next::Settle);
    let settlement = machine.settle();
    assert!(settlement.is_clean && settlement.results.is_empty());
    assert_eq!(
        (settlement.from, settlement.to, settlement.then),
        (Status::Submitted, Status::Succeed, Then::End)
    );
}

#[test]
fn the_first_that_fails_ends_the_pass_and_what_was_done_before_is_kept() {
    for answer in [Answer::Failure, Answer::Ongoing, Answer::Unknown] {
        let mut machine = Machine::new(State { failures: 3, ..submitted(3) });
        machine.step();
        machine.answered(0, report(Answer::Success));
        assert_eq!(machine.step(), Next::Call(vec![1]));
        machine.answered(1, report(answer.clone()));
        assert_eq!(machine.step(), Next::Settle);
        let settlement = machine.settle();
        assert_eq!((settlement.to, settlement.results.len()), (Status::Submitted, 2));
        assert_eq!(
            settlement.failures,
            u32::from(answer != Answer::Ongoing),
            "it got ahead: pauses begin anew"
        );
        assert_eq!(settlement.then, Then::Again { endpoint: None });
    }
}

#[test]
fn what_fails_while_its_endpoint_is_down_waits_for_that_and_is_not_charged() {
    let mut machine = Machine::new(State { failures: 3, ..submitted(1) });
    machine.step();
    machine.answered(0, Report { endpoint: Some("x".into()), ..report(Answer::Unknown) });
    let settlement = machine.settle();
    assert_eq!((settlement.failures, settlement.failed_before), (3, true));
    assert_eq!(settlement.then, Then::Again { endpoint: Some("x".into()) });
}

#[test]
fn concurrent_actions_are_called_at_once_and_only_those_that_are_not_done() {
    let mut state = State { concurrent: true, ..submitted(3) };
    state.branches[1].is_done = true;
    let mut machine = Machine::new(state);
    assert_eq!(machine.step(), Next::Call(vec![0, 2]));
    machine.answered(0, report(Answer::Ongoing));
    machine.answered(2, report(Answer::Unknown));
    assert_eq!(machine.settle().failures, 1);
}

#[test]
fn after_its_last_attempt_a_branch_waits_for_a_decision() {
    let mut state = State { retry_limit: Some(2), ..submitted(1) };
    state.branches[0].attempts = 1;
    let mut machine = Machine::new(state);
    machine.step();
    machine.answered(0, report(Answer::Unknown));
    assert_eq!(machine.settle().then, Then::Decide);
}

#[test]
fn what_is_prepared_is_asked_about_and_stored_as_submitted_before_anything_is_called() {
    let prepared = State { status: Status::Prepared, waits: true, ..submitted(1) };
    let mut machine = Machine::new(prepared.clone());
    assert_eq!(machine.step(), Next::AskWhetherCommitted);
    machine.told_whether_committed(report(Answer::Success));
    assert_eq!(machine.step(), Next::StoreSubmitted);
    machine.stored();
    assert_eq!(machine.step(), Next::Call(vec![0]));
    machine.answered(0, report(Answer::Success));
    assert_eq!(machine.step(), Next::Settle);
    let settlement = machine.settle();
    assert_eq!((settlement.from, settlement.to), (Status::Submitted, Status::Succeed));
    assert!(!settlement.is_clean, "its row of dtm.due goes, too");

    let mut machine = Machine::new(prepared.clone());
    machine.step();
    machine.told_whether_committed(report(Answer::Failure));
    assert_eq!(machine.step(), Next::Settle);
    assert_eq!(machine.settle().to, Status::Failed);

    let mut machine = Machine::new(State { undecidable: true, ..prepared });
    assert_eq!(machine.step(), Next::Settle, "nobody is asked");
    let settlement = machine.settle();
    assert_eq!((settlement.to, settlement.then), (Status::Prepared, Then::Decide));
}

#[test]
fn what_was_first_called_long_ago_is_not_called_again() {
    let mut machine = Machine::new(State { undecidable: true, ..submitted(2) });
    assert_eq!(machine.step(), Next::Settle);
    let settlement = machine.settle();
    assert_eq!((settlement.to, settlement.then), (Status::Submitted, Then::Decide));
}

/// What the tables have, and what others do to them between passes.
#[derive(Debug)]
struct Tables {
    state: State,
    /// How often each action was done: by its service, whatever the coordinator knows.
    done: Vec<u32>,
    /// What the business transaction has become, once somebody knows.
    committed: Option<bool>,
    ended: Option<Status>,
    stuck: bool,
}

#[derive(Clone, Debug)]
enum Act {
    /// A pass with these answers; it dies after so many steps.
    Pass(Vec<u8>, usize),
    /// A pass, and one of a relay that does not know that it has lost the transaction, which stores last.
    Overlap(Vec<u8>, Vec<u8>),
    /// Somebody does something between a pass and its storing.
    During(Vec<u8>, Box<Act>),
    Submit,
    Abort,
    ForceStop,
    RetryNow,
    /// Barriers are forgotten.
    Age,
}

fn answers() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0..7_u8, 1..8)
}

fn act() -> impl Strategy<Value = Act> {
    let during = prop_oneof![Just(Act::Submit), Just(Act::Abort), Just(Act::RetryNow), Just(Act::ForceStop)];
    prop_oneof![
        6 => (answers(), 0..12_usize).prop_map(|(answers, dies)| Act::Pass(answers, dies)),
        2 => (answers(), answers()).prop_map(|(answers, stale)| Act::Overlap(answers, stale)),
        2 => (answers(), during).prop_map(|(answers, act)| Act::During(answers, Box::new(act))),
        1 => Just(Act::Submit),
        1 => Just(Act::Abort),
        1 => Just(Act::RetryNow),
        1 => Just(Act::ForceStop),
        1 => Just(Act::Age),
    ]
}

impl Tables {
    fn become_status(&mut self, to: Status) {
        let from = self.state.status;
        let legal = match from {
            Status::Prepared => [Status::Prepared, Status::Submitted, Status::Failed].contains(&to),
            Status::Submitted => [Status::Submitted, Status::Succeed, Status::Failed].contains(&to),
            Status::Aborting | Status::Succeed | Status::Failed => from == to,
        };
        assert!(legal, "{from} became {to}");
        self.state.status = to;
        if to.is_terminal() {
            self.ended = Some(to);
        }
    }

    /// What a pass leaves to be stored, unless it dies before, or finds that it is void.
    fn pass(&mut self, answers: &[u8], dies: usize) -> Option<Settlement> {
        if self.state.status.is_terminal() || self.stuck {
            return None;
        }
        let mut machine = Machine::new(self.state.clone());
        let mut answers = answers.iter().copied().cycle();
        for _ in 0..dies {
            let drawn = answers.next().unwrap_or(0);
            let answer = match drawn {
                0 => Answer::Unknown,
                1 => Answer::Ongoing,
                6 => Answer::Unknown,
                2 => Answer::Failure,
                _ => Answer::Success,
            };
            let next = machine.step();
            let forgotten = self.state.undecidable;
            assert!(!forgotten || next == Next::Settle, "{next:?}: nobody can tell what was done");
            match next {
                Next::AskWhetherCommitted => {
                    assert_eq!(self.state.status, Status::Prepared);
                    let answer = match answer {
                        Answer::Success | Answer::Failure => {
                            let committed = *self.committed.get_or_insert(answer == Answer::Success);
                            if committed { Answer::Success } else { Answer::Failure }
                        }
                        later => later,
                    };
                    machine.told_whether_committed(report(answer));
                }
                Next::StoreSubmitted => {
                    if self.state.status != Status::Prepared {
                        return None;
                    }
                    self.become_status(Status::Submitted);
                    self.state.waits = true;
                    machine.stored();
                }
                Next::Call(calls) => {
                    assert_eq!(
                        self.state.status,
                        Status::Submitted,
                        "called before it was stored as submitted"
                    );
                    assert!(!calls.is_empty());
                    for at in calls {
                        // An answer may be lost: the service has done it all the same.
                        self.done[at] += u32::from(answer == Answer::Success || drawn == 0);
                        machine.answered(at, Report { was_called: drawn != 6, ..report(answer.clone()) });
                    }
                }
                Next::Settle => return Some(machine.settle()),
            }
        }
        None
    }

    fn store(&mut self, settlement: Settlement) {
        if settlement.from != self.state.status {
            return;
        }
        if settlement.to == Status::Succeed {
            assert!(self.done.iter().all(|&done| done > 0), "succeeded without all that was to be done");
        }
        for result in &settlement.results {
            let branch = &mut self.state.branches[result.branch];
            // As dtm.relay_settle.
            if branch.is_done || !result.is_done && result.attempts <= branch.attempts {
                continue;
            }
            *branch = Branch { is_done: result.is_done, attempts: result.attempts, has_row: true };
        }
        self.state.failures = settlement.failures;
        self.state.waits = matches!(settlement.then, Then::Again { .. });
        self.stuck = settlement.then == Then::Decide;
        let waits_or_ends = self.state.waits || self.stuck || settlement.to.is_terminal();
        assert!(waits_or_ends, "it would be forgotten");
        self.become_status(settlement.to);
    }

    fn act(&mut self, act: &Act) {
        let before = self.ended;
        match act {
            Act::Pass(answers, dies) => {
                self.pass(answers, *dies).into_iter().for_each(|settlement| self.store(settlement));
            }
            Act::Overlap(answers, stale) => {
                let was = Tables { done: self.done.clone(), state: self.state.clone(), ..*self };
                let mut elsewhere = was;
                let stale = elsewhere.pass(stale, usize::MAX);
                // Both have called, and it is one business transaction that both have asked about.
                (self.done, self.committed) = (elsewhere.done, elsewhere.committed);
                if elsewhere.state.status != self.state.status {
                    self.become_status(elsewhere.state.status);
                    self.state.waits = true;
                }
                self.pass(answers, usize::MAX).into_iter().for_each(|settlement| self.store(settlement));
                stale.into_iter().for_each(|settlement| self.store(settlement));
            }
            Act::During(answers, act) => {
                let settlement = self.pass(answers, usize::MAX);
                self.act(act);
                settlement.into_iter().for_each(|settlement| self.store(settlement));
            }
            Act::Submit if self.state.status == Status::Prepared && self.committed != Some(false) => {
                self.committed = Some(true);
                (self.stuck, self.state.undecidable) = (false, false);
                self.become_status(Status::Submitted);
            }
            Act::Abort if self.state.status == Status::Prepared && self.committed != Some(true) => {
                self.committed = Some(false);
                self.become_status(Status::Failed);
            }
            Act::RetryNow => {
                // Who decides to call again answers for it; whether it is committed cannot be decided so.
                self.state.undecidable &= !self.stuck || self.state.status == Status::Prepared;
                self.stuck = false;
            }
            Act::Age => {
                let may_be_done = self.state.branches.iter().any(|branch| branch.has_row && !branch.is_done);
                self.state.undecidable |= self.state.status == Status::Prepared || may_be_done;
            }
            Act::ForceStop if !self.state.status.is_terminal() => self.become_status(Status::Failed),
            Act::Submit | Act::Abort | Act::ForceStop => {}
        }
        assert!(before.is_none() || before == self.ended, "a terminal status was left");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// No schedule of outcomes, lost answers, deaths and double submissions reaches a state that is not legal, and with a
    /// service that works everything that is submitted succeeds in the end.
    #[test]
    fn every_schedule_is_legal_and_ends(
        prepared: bool, concurrent: bool, limited: bool, n in 1..4_usize, acts in prop::collection::vec(act(), 0..20),
    ) {
        let status = if prepared { Status::Prepared } else { Status::Submitted };
        let retry_limit = limited.then_some(3);
        let state = State { status, concurrent, retry_limit, waits: prepared, ..submitted(n) };
        let committed = (!prepared).then_some(true);
        let mut tables = Tables { state, done: vec![0; n], committed, ended: None, stuck: false };
        for one in &acts {
            tables.act(one);
        }
        if tables.state.status == Status::Prepared && tables.state.undecidable {
            let decision = if tables.committed == Some(false) { Act::Abort } else { Act::Submit };
            tables.act(&decision);
        }
        tables.act(&Act::Pass(vec![5], usize::MAX));
        tables.act(&Act::RetryNow);
        tables.act(&Act::Pass(vec![5], usize::MAX));
        prop_assert!(tables.ended.is_some());
        if tables.state.status == Status::Succeed {
            prop_assert_eq!(tables.committed, Some(true));
        }
        if tables.committed == Some(false) {
            prop_assert!(tables.done.iter().all(|&done| done == 0), "what was rolled back was sent");
        }
    }
}
