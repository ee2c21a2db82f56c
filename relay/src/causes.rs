// SPDX-License-Identifier: PostgreSQL
//! Errors for people: libraries say little in an error itself, and the rest in what caused it.

/// An error and what caused it in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}
