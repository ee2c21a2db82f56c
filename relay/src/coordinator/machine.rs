// SPDX-License-Identifier: PostgreSQL
//! One pass over a global transaction, as a state machine: what is to be done next, and what came of it. Pure: calls, clocks and
//! chance are its driver's.
//!
//! A pass goes on for as long as calls succeed. The first that does not ends it; then the transaction waits, or has ended, or
//! somebody has to decide. Nothing is called after a terminal status, and none is ever left.

use std::fmt;
use std::time::Duration;

use super::message;
use super::settlement::{BranchResult, Settlement, Then};

/// The statuses of a global transaction: DTM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Whether it is committed is not known yet.
    Prepared,
    /// It is: what is left to do is done until it succeeds.
    Submitted,
    /// It is to be taken back.
    Aborting,
    /// Terminal: everything was done.
    Succeed,
    /// Terminal: nothing was done, or it was taken back, or somebody has stopped it.
    Failed,
}

impl Status {
    const ALL: [Status; 5] =
        [Status::Prepared, Status::Submitted, Status::Aborting, Status::Succeed, Status::Failed];

    /// By its name in tables and protocols.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Status::Prepared => "prepared",
            Status::Submitted => "submitted",
            Status::Aborting => "aborting",
            Status::Succeed => "succeed",
            Status::Failed => "failed",
        }
    }

    /// Whether nothing leads out of it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Status::Succeed | Status::Failed)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far one call of a transaction is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch {
    /// It has succeeded.
    pub is_done: bool,
    /// How often it was called.
    pub attempts: u32,
    /// There is a row about it in dtm.branch.
    pub has_row: bool,
}

/// Which kind of global transaction it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A 2-phase message.
    Message,
}

impl Kind {
    /// By DTM's `trans_type`.
    pub fn parse(name: &str) -> Option<Self> {
        (name == "msg").then_some(Kind::Message)
    }
}

/// A transaction as a pass finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// See there.
    pub kind: Kind,
    /// See there.
    pub status: Status,
    /// In the order of their calls.
    pub branches: Vec<Branch>,
    /// Branches are called side by side.
    pub concurrent: bool,
    /// After so many failed attempts a branch stands still.
    pub retry_limit: Option<u32>,
    /// Passes that failed since it last got ahead.
    pub failures: u32,
    /// It was prepared, or a call of it that has not succeeded was first made, so long ago that barriers may be gone: nobody can
    /// tell any more what has become of it.
    pub undecidable: bool,
    /// It has a row in dtm.due.
    pub waits: bool,
}

/// What came of a call, as DTM tells outcomes apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Success,
    /// It will never be done.
    Failure,
    /// It is being done: ask again, as soon as before.
    Ongoing,
    /// Not known: try again, later and later.
    Unknown,
}

/// A call and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// See there.
    pub answer: Answer,
    /// False: it was not made, for its endpoint is down or has enough to do.
    pub was_called: bool,
    /// Of HTTP.
    pub status: Option<u16>,
    /// What went wrong, in words.
    pub error: String,
    /// Its endpoint, if the transaction has to wait for that.
    pub endpoint: Option<String>,
    /// The service asks not to be called sooner.
    pub not_before: Option<Duration>,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask whether it is committed.
    AskWhetherCommitted,
    /// Store that it is submitted, before any call.
    StoreSubmitted,
    /// Call these branches, side by side.
    Call(Vec<usize>),
    /// Store what came of the pass.
    Settle,
}

/// A pass.
#[derive(Clone, Debug)]
pub struct Machine {
    state: State,
    /// The status that the tables have.
    stored: Status,
    /// It got ahead in this pass.
    ahead: bool,
    /// What came of branches in this pass.
    results: Vec<BranchResult>,
    /// What has ended the pass before its end.
    halt: Option<Halt>,
}

#[derive(Clone, Debug)]
enum Halt {
    /// An answer that was no success, of a call or of whoever was asked.
    Report(Report),
    /// Nobody can tell any more.
    Undecidable,
}

impl Machine {
    /// Begins a pass.
    pub fn new(state: State) -> Self {
        let stored = state.status;
        Machine { state, stored, ahead: false, results: Vec::new(), halt: None }
    }

    /// What is to be done now. The driver does it, and says what came of it.
    pub fn step(&mut self) -> Next {
        if self.halt.is_some() || self.state.status.is_terminal() {
            return Next::Settle;
        }
        if self.state.undecidable {
            self.halt = Some(Halt::Undecidable);
            return Next::Settle;
        }
        if self.state.status != self.stored {
            return Next::StoreSubmitted;
        }
        match self.state.kind {
            Kind::Message => message::next(&mut self.state),
        }
    }

    /// What whoever knows says.
    pub fn told_whether_committed(&mut self, report: Report) {
        if self.state.status != Status::Prepared {
            return;
        }
        match report.answer {
            Answer::Success => {
                self.state.status = Status::Submitted;
                self.ahead = true;
            }
            Answer::Failure => self.state.status = Status::Failed,
            Answer::Ongoing | Answer::Unknown => self.halt = Some(Halt::Report(report)),
        }
    }

    /// The status is stored.
    pub fn stored(&mut self) {
        self.stored = self.state.status;
        self.state.waits = true;
    }

    /// What came of the call of a branch.
    pub fn answered(&mut self, branch: usize, report: Report) {
        let Some(known) = self.state.branches.get_mut(branch) else { return };
        known.attempts = known.attempts.saturating_add(u32::from(report.was_called));
        known.is_done = report.answer == Answer::Success;
        self.ahead |= known.is_done;
        if report.was_called {
            self.results.push(BranchResult {
                branch,
                is_done: known.is_done,
                attempts: known.attempts,
                status: report.status,
                error: (!known.is_done).then(|| report.error.clone()),
            });
        }
        // Of several the first decides, unless a later one is known to be worse than "not yet" and "not called".
        let decides = match &self.halt {
            None => report.answer != Answer::Success,
            Some(Halt::Report(first)) => {
                let is_mild = first.answer == Answer::Ongoing || !first.was_called;
                is_mild && report.was_called && matches!(report.answer, Answer::Failure | Answer::Unknown)
            }
            Some(Halt::Undecidable) => false,
        };
        if decides {
            self.halt = Some(Halt::Report(report));
        }
    }

    /// What is to be stored when the pass is over.
    pub fn settle(self) -> Settlement {
        let from = self.stored;
        let is_over = self.state.status.is_terminal();
        // Nothing is told of branches that succeed at once: their transaction's end says it.
        let is_clean = self.state.status == Status::Succeed
            && !self.state.waits
            && self.state.branches.iter().all(|branch| !branch.has_row && branch.attempts == 1);
        let has_failed = |branch: &Branch| !branch.is_done && branch.attempts > 0;
        let failed_before = self.state.failures > 0 || self.state.branches.iter().any(has_failed);
        let results = if is_clean { Vec::new() } else { self.results };
        let mut settlement = Settlement {
            from,
            to: self.state.status,
            then: Then::End,
            is_clean,
            waits_its_turn: false,
            failed_before,
            not_before: None,
            error: None,
            failures: 0,
            results,
        };
        if is_over {
            if self.state.status == Status::Failed {
                settlement.error = Some("its business transaction is rolled back".into());
            }
            return settlement;
        }
        let before = if self.ahead { 0 } else { self.state.failures };
        settlement.failures = before;
        settlement.then = match self.halt {
            Some(Halt::Undecidable) => {
                let (what, then) = match self.stored {
                    Status::Prepared => ("it was prepared", "nobody is asked any more"),
                    _ => ("its call was first made", "it could be done a second time"),
                };
                settlement.error = Some(format!("{what} so long ago that its barrier may be gone: {then}"));
                Then::Decide
            }
            None => Then::Again { endpoint: None },
            Some(Halt::Report(report)) => {
                settlement.waits_its_turn = !report.was_called;
                settlement.not_before = report.not_before;
                // While its endpoint is down a failure says nothing of the transaction, and its pauses shall not have grown.
                let is_charged = report.was_called && report.endpoint.is_none();
                if is_charged && report.answer != Answer::Ongoing {
                    settlement.failures = before.saturating_add(1);
                }
                let limit = self.state.retry_limit.unwrap_or(u32::MAX);
                let is_exhausted =
                    settlement.results.iter().any(|result| !result.is_done && result.attempts >= limit);
                settlement.error = Some(report.error);
                if is_exhausted { Then::Decide } else { Then::Again { endpoint: report.endpoint } }
            }
        };
        settlement
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
