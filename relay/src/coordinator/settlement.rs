// SPDX-License-Identifier: PostgreSQL
//! What a pass leaves behind, and when the next one comes.

use std::time::Duration;

use super::machine::Status;
use crate::calls::schedule::Schedule;

/// The longest pause between two attempts.
pub const PAUSE_MAX: Duration = Duration::from_secs(3_600);
/// The pause where it was not called, for its endpoint is down or has enough to do; after it, it waits until that takes calls.
pub const TURN: Duration = Duration::from_secs(1);

/// What is to be stored of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// The status that it leaves: if another is found, nothing is stored.
    pub from: Status,
    /// The status that it takes.
    pub to: Status,
    /// See there.
    pub then: Then,
    /// It has succeeded at once, and its status is all that there is to store.
    pub is_clean: bool,
    /// Its endpoint is down or has enough to do: it was not called, and nothing is charged to it.
    pub waits_its_turn: bool,
    /// It, or what it waits for, has failed: it may be to blame itself.
    pub failed_before: bool,
    /// The service asks not to be called sooner.
    pub not_before: Option<Duration>,
    /// What stood in its way.
    pub error: Option<String>,
    /// Passes that failed since it last got ahead.
    pub failures: u32,
    /// Of the branches that were called.
    pub results: Vec<BranchResult>,
}

/// What becomes of a transaction after a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// It has ended.
    End,
    /// It is tried again; at once, when this endpoint works again.
    Again {
        /// Whose fault it may be.
        endpoint: Option<String>,
    },
    /// Somebody has to decide.
    Decide,
}

/// What came of a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchResult {
    /// Which.
    pub branch: usize,
    /// It has succeeded.
    pub is_done: bool,
    /// How often it has been called.
    pub attempts: u32,
    /// Of the last answer, if it was HTTP's.
    pub status: Option<u16>,
    /// What went wrong.
    pub error: Option<String>,
}

/// The pause after so many failed passes in a row: `interval` doubles, with full jitter. `random` is drawn evenly from `[0, 1)`.
pub fn pause(interval: Duration, failures: u32, random: f64) -> Duration {
    let random = if failures == 0 { 0.5 + random / 2.0 } else { random };
    Schedule::exponential(interval, PAUSE_MAX.max(interval), None).delay(failures.max(1), random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_cap_and_what_goes_on_is_asked_about_as_often_as_before() {
        let second = Duration::from_secs(1);
        assert_eq!(pause(second, 3, 0.5), 2 * second);
        assert!(pause(second, 60, 0.999) <= PAUSE_MAX);
        assert_eq!(pause(second, 0, 0.0), second / 2);
        assert!(pause(2 * PAUSE_MAX, 1, 0.999) > PAUSE_MAX);
    }
}
