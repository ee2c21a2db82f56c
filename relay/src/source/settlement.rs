// SPDX-License-Identifier: PostgreSQL
//! What is stored of events that are not simply delivered.

use std::time::Duration;

use bytestring::ByteString;
use serde::Serialize;
use tokio::time::Instant;

use crate::calls::outcome::Outcome;

/// An attempt that failed, as the history of an event shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// When it ended, RFC 3339.
    pub at: String,
    /// The status, if one came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What went wrong.
    pub error: String,
    /// The start of the response's body.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub body: String,
}

impl Attempt {
    /// What is remembered of a failed call that ended at this time.
    pub fn new(at: jiff::Timestamp, outcome: &Outcome) -> Self {
        let Outcome { status, error, body, .. } = outcome;
        Attempt { at: at.to_string(), status: *status, error: error.clone(), body: body.clone() }
    }
}

impl Attempt {
    /// The same without what another encoding than UTF-8 may not have.
    pub(super) fn in_ascii(&self) -> Self {
        let ascii = |text: &str| text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect();
        Attempt { error: ascii(&self.error), body: ascii(&self.body), ..self.clone() }
    }
}

/// What is stored about an event together with the cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// The event's sequence number.
    pub seq: i64,
    /// What becomes of it.
    pub what: Leave,
    /// Attempts that are charged to it, in all.
    pub attempts: u32,
    /// Those that its row does not have yet.
    pub history: Vec<Attempt>,
    /// When it is tried again; `None`: when the event before it on its key is settled.
    pub next: Option<Instant>,
}

/// What becomes of an event that is not simply delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// From the log into dtm.retry.
    Park,
    /// From the log into the dead letters.
    Bury,
    /// Its row in dtm.retry has another attempt, and waits again.
    Again,
    /// From dtm.retry into the dead letters.
    Die,
    /// Its row in dtm.retry goes: it is delivered.
    Done,
}

impl Leave {
    /// As the database is told.
    pub fn as_str(self) -> &'static str {
        match self {
            Leave::Park => "park",
            Leave::Bury => "bury",
            Leave::Again => "again",
            Leave::Die => "die",
            Leave::Done => "done",
        }
    }
}

/// Adds later settlements to earlier ones that are not stored yet. Two that say of one row when it is tried again become one:
/// a statement updates a row once.
pub fn follow(earlier: &mut Vec<Settlement>, later: Vec<Settlement>) {
    for mut settlement in later {
        let replaces = |before: &Settlement| before.seq == settlement.seq && before.what == Leave::Again;
        let at = earlier.iter().position(replaces).filter(|_| settlement.what == Leave::Again);
        if let Some(at) = at {
            let mut history = earlier.remove(at).history;
            history.append(&mut settlement.history);
            settlement.history = history;
        }
        earlier.push(settlement);
    }
}

/// What is stored about a subscription's parked events when a pipeline begins.
#[derive(Clone, Debug)]
pub struct Parked {
    /// The event's key.
    pub key: Option<ByteString>,
    /// Its sequence number.
    pub seq: i64,
    /// Its size, about.
    pub bytes: usize,
    /// Attempts that are charged to it.
    pub attempts: u32,
    /// In how long it is due.
    pub next_in: Option<Duration>,
    /// It is a dead letter that its key waits for.
    pub blocks: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_words_about_one_row_the_later_counts_with_the_history_of_both() {
        let attempt = |error: &str| Attempt {
            at: String::new(),
            status: None,
            error: error.into(),
            body: String::new(),
        };
        let again = |seq: i64, attempts: u32, error: &str| Settlement {
            seq,
            what: Leave::Again,
            attempts,
            history: vec![attempt(error)],
            next: None,
        };
        let park = Settlement { what: Leave::Park, ..again(7, 1, "a") };
        let mut all = vec![park.clone(), again(7, 2, "b"), again(8, 1, "x")];
        follow(&mut all, vec![again(7, 3, "c")]);
        let expected = Settlement { history: vec![attempt("b"), attempt("c")], ..again(7, 3, "") };
        assert_eq!(all, [park, again(8, 1, "x"), expected]);
    }
}
