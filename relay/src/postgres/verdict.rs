// SPDX-License-Identifier: PostgreSQL
//! What an SQLSTATE means to whoever sent something.

use crate::calls::outcome::{Class, Outcome};
use crate::source::error::SourceError;

/// What a function raises that will never do this: as HTTP's 409.
pub const FAILURE: &str = "DTM09";
/// What a function raises that is at it: as HTTP's 425.
pub const ONGOING: &str = "DTM25";

/// By what the database has answered.
pub fn of_state(state: &str, message: &str) -> Outcome {
    let (class, status) = match state {
        FAILURE => (Class::Failed, Some(409)),
        ONGOING => (Class::Failed, Some(425)),
        // Data exceptions: it is what was sent, and will be wrong the next time.
        _ if state.starts_with("22") => (Class::Refused, None),
        // Connection, resources, operator intervention, system: nothing was done, whatever was sent.
        _ if ["08", "53", "58"].contains(&&state[..state.len().min(2)]) || state.starts_with("57P") => {
            (Class::Unsent, None)
        }
        _ => (Class::Failed, None),
    };
    Outcome { status, ..Outcome::without_answer(class, format!("SQLSTATE {state}: {message}")) }
}

/// By an error; `was_sent`: the statement may have been done before its answer was lost. Then its receipt tells the next time.
pub fn of_error(error: &SourceError, was_sent: bool) -> Outcome {
    match error {
        SourceError::Database { sqlstate, message, .. } => of_state(sqlstate, message),
        _ if was_sent => Outcome::without_answer(Class::Failed, error.to_string()),
        _ => Outcome::without_answer(Class::Unsent, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_classed() {
        let found = |state| {
            let outcome = of_state(state, "m");
            (outcome.class, outcome.status)
        };
        for (state, expected) in [
            ("DTM09", (Class::Failed, Some(409))),
            ("DTM25", (Class::Failed, Some(425))),
            ("P0001", (Class::Failed, None)),
            ("23505", (Class::Failed, None)),
            ("22P02", (Class::Refused, None)),
            ("42883", (Class::Failed, None)),
            ("40P01", (Class::Failed, None)),
            ("57014", (Class::Failed, None)),
            ("57P01", (Class::Unsent, None)),
            ("53300", (Class::Unsent, None)),
        ] {
            assert_eq!(found(state), expected, "{state}");
        }
        let away = SourceError::Unreachable("gone".into());
        assert_eq!(
            (of_error(&away, false).class, of_error(&away, true).class),
            (Class::Unsent, Class::Failed)
        );
    }
}
