// SPDX-License-Identifier: PostgreSQL
//! What an SQLSTATE means to whoever sent something.

use crate::calls::outcome::{Class, Outcome};
use crate::source::error::SourceError;

/// What a function raises that will never do this: as HTTP's 409.
pub const FAILURE: &str = "DTM09";
/// What a function raises that is at it: as HTTP's 425.
pub const ONGOING: &str = "DTM25";

/// By what was raised while a function was called. It may be the function's own error, whatever its class is: one that says what a
/// server that is away would say is charged like any other, or it would hold up all others for ever.
pub fn of_state(state: &str, message: &str) -> Outcome {
    let (class, status) = match state {
        FAILURE => (Class::Failed, Some(409)),
        ONGOING => (Class::Failed, Some(425)),
        // Data exceptions: it is what was sent, and will be wrong the next time.
        _ if state.starts_with("22") => (Class::Refused, None),
        _ if state.starts_with("53") => (Class::Overloaded, None),
        _ => (Class::Failed, None),
    };
    Outcome { status, ..Outcome::without_answer(class, format!("SQLSTATE {state}: {message}")) }
}

/// Of an event that was not tried.
pub fn withdrawn() -> Outcome {
    Outcome::without_answer(Class::Withdrawn, "an earlier event of its key was not done")
}

/// By an error; `was_sent`: the statement may have been done before its answer was lost. Then its receipt tells the next time.
pub fn of_error(error: &SourceError, was_sent: bool) -> Outcome {
    match error {
        SourceError::Database { sqlstate, message, .. } if was_sent || !is_away(sqlstate) => {
            of_state(sqlstate, message)
        }
        _ if was_sent => Outcome::without_answer(Class::Failed, error.to_string()),
        _ => Outcome::without_answer(Class::Unsent, error.to_string()),
    }
}

/// Whether a server that takes no calls says so: connection, resources, operator intervention, system.
fn is_away(state: &str) -> bool {
    ["08", "53", "58"].contains(&&state[..state.len().min(2)]) || state.starts_with("57P")
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
            ("08001", (Class::Failed, None)),
            ("57P01", (Class::Failed, None)),
            ("58P01", (Class::Failed, None)),
            ("53400", (Class::Overloaded, None)),
        ] {
            assert_eq!(found(state), expected, "{state}");
        }
    }

    #[test]
    fn nothing_was_sent_where_the_server_takes_no_calls() {
        let classes = |error: &SourceError| (of_error(error, false).class, of_error(error, true).class);
        assert_eq!(classes(&SourceError::Unreachable("gone".into())), (Class::Unsent, Class::Failed));
        let database = |state: &str| {
            let (sqlstate, message) = (state.to_owned(), "m".to_owned());
            SourceError::Database { what: "x", sqlstate, message, detail: None, hint: None }
        };
        for (state, expected) in [
            ("08006", (Class::Unsent, Class::Failed)),
            ("57P03", (Class::Unsent, Class::Failed)),
            ("53300", (Class::Unsent, Class::Overloaded)),
            ("42883", (Class::Failed, Class::Failed)),
        ] {
            assert_eq!(classes(&database(state)), expected, "{state}");
        }
    }
}
