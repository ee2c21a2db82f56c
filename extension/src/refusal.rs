// SPDX-License-Identifier: PostgreSQL
//! What a user gets who passed something wrong: an SQLSTATE, a message, a detail and a hint.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::varlena;

/// An error that a user can mend.
#[derive(Debug)]
pub struct Refusal {
    /// The SQLSTATE.
    pub code: PgSqlErrorCode,
    /// Lower-case start, no full stop.
    pub message: String,
    /// A full sentence: what was found.
    pub detail: String,
    /// A full sentence: what to do.
    pub hint: String,
}

impl Refusal {
    /// A wrong argument (22023).
    pub fn argument(message: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Refusal::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, detail, hint)
    }

    /// Something over a limit (54000).
    pub fn limit(message: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Refusal::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, message, detail, hint)
    }

    /// An error of any class.
    pub fn new(
        code: PgSqlErrorCode,
        message: impl Into<String>,
        detail: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Refusal { code, message: message.into(), detail: detail.into(), hint: hint.into() }
    }

    /// Raises the error: does not return.
    pub fn raise(self) -> ! {
        ErrorReport::from(self).report(PgLogLevel::ERROR);
        unreachable!("an error report at level ERROR does not return")
    }
}

impl From<Refusal> for ErrorReport {
    fn from(refusal: Refusal) -> Self {
        ErrorReport::new(refusal.code, shown(refusal.message), "pg_dtm")
            .set_detail(shown(refusal.detail))
            .set_hint(shown(refusal.hint))
    }
}

/// A text as PostgreSQL takes it for a message: in the database's encoding.
fn shown(text: String) -> String {
    if text.is_ascii() || varlena::database_is_utf8() {
        return text;
    }
    let escaped = |c: char| if c.is_ascii() { c.to_string() } else { c.escape_unicode().to_string() };
    text.chars().map(escaped).collect()
}

/// A text in a message: quoted, and cut where it is long.
pub fn quoted(text: &str) -> String {
    const SHOWN_CHARS: usize = 100;
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{:?}… ({} bytes)", &text[..at], text.len()),
        None => format!("{text:?}"),
    }
}
