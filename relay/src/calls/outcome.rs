// SPDX-License-Identifier: PostgreSQL
//! What came of a call.

use std::fmt;
use std::time::Duration;

use super::secrets::Echoes;

/// The most that is kept of a response's body, in characters.
pub const BODY_START_CHARS: usize = 256;

/// What came of a call, as far as it matters to what happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The service has taken it.
    Accepted,
    /// Nothing was sent: name, connection or TLS. The service is away, whatever was to be sent.
    Unsent,
    /// It was sent, and the answer was no success, or none came.
    Failed,
    /// The service says that it will never take this (400, 413, 415, 422). It may be wrong: a gateway can say so to all.
    Refused,
    /// It cannot be sent at all, or the service has looked at this very thing and will never take it.
    Unsendable,
    /// It was taken back since another call failed, and goes again after that. It may have arrived.
    Withdrawn,
    /// The service is gone for good (410).
    Gone,
    /// Too many calls (429, or 503 with `Retry-After`): slower, and not charged.
    Throttled,
    /// The service cannot cope (502, 503, 504): slower, and charged.
    Overloaded,
}

/// A call and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// See [`Class`].
    pub class: Class,
    /// The status, if one came.
    pub status: Option<u16>,
    /// What went wrong, in words; empty for a success.
    pub error: String,
    /// The start of the response's body, as text.
    pub body: String,
    /// How long the service asks to be left alone.
    pub retry_after: Option<Duration>,
}

impl Outcome {
    /// A success of which nothing is told.
    pub fn accepted() -> Self {
        Outcome::without_answer(Class::Accepted, "")
    }

    /// An outcome without an answer.
    pub fn without_answer(class: Class, error: impl Into<String>) -> Self {
        Outcome { class, status: None, error: error.into(), body: String::new(), retry_after: None }
    }

    /// Keeps so much of what was answered as may be stored.
    pub fn without(mut self, echoes: &Echoes) -> Self {
        echoes.blank(&mut self.error);
        echoes.blank(&mut self.body);
        if let Some((at, _)) = self.body.char_indices().nth(BODY_START_CHARS) {
            self.body.truncate(at);
        }
        self
    }

    /// By an HTTP status. Redirects are not followed: a body was signed and addressed to one endpoint.
    pub fn of_status(status: u16, reason: &str, body: String, retry_after: Option<Duration>) -> Self {
        let class = match status {
            200..=299 => Class::Accepted,
            400 | 413 | 415 | 422 => Class::Refused,
            410 => Class::Gone,
            429 => Class::Throttled,
            503 if retry_after.is_some() => Class::Throttled,
            502..=504 => Class::Overloaded,
            _ => Class::Failed,
        };
        let error = match status {
            200..=299 => String::new(),
            300..=399 => format!("{reason}: redirects are not followed"),
            _ => reason.to_owned(),
        };
        Outcome { class, status: Some(status), error, body, retry_after }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(status) => write!(f, "{status} {}", self.error),
            None => f.write_str(&self.error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::secrets::Secret;

    #[test]
    fn a_body_is_cut_and_neither_it_nor_the_error_has_a_secret_in_it() {
        let secret = Secret::from("Bearer abc".to_owned());
        let body = format!("you sent Bearer abc or abc {}", "x".repeat(500));
        let kept = Outcome::of_status(500, "not abc", body, None).without(&Echoes::of(&[secret]));
        assert!(kept.body.starts_with("you sent … or … x"), "{}", kept.body);
        assert_eq!((kept.body.chars().count(), kept.error.as_str()), (BODY_START_CHARS, "not …"));
    }

    #[test]
    fn statuses_are_classed() {
        let class = |status, after: Option<u64>| {
            Outcome::of_status(status, "", String::new(), after.map(Duration::from_secs)).class
        };
        for (status, expected) in [
            (200, Class::Accepted),
            (204, Class::Accepted),
            (301, Class::Failed),
            (400, Class::Refused),
            (401, Class::Failed),
            (404, Class::Failed),
            (408, Class::Failed),
            (409, Class::Failed),
            (410, Class::Gone),
            (413, Class::Refused),
            (422, Class::Refused),
            (429, Class::Throttled),
            (500, Class::Failed),
            (502, Class::Overloaded),
            (503, Class::Overloaded),
            (504, Class::Overloaded),
        ] {
            assert_eq!(class(status, None), expected, "{status}");
        }
        assert_eq!(class(503, Some(1)), Class::Throttled);
        assert_eq!(class(500, Some(1)), Class::Failed);
    }
}
