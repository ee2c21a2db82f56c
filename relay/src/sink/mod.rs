// SPDX-License-Identifier: PostgreSQL
//! Where events go. A sink knows events and destinations, and nothing of PostgreSQL, cursors or retries.

use std::fmt;

pub mod cloudevents;
pub mod http;

/// Why an attempt did not deliver an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind of failure it was.
    pub kind: FailureKind,
    /// In words, for people. Never has a payload or a credential in it.
    pub detail: String,
}

/// What can be told of a failure without knowing the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Nothing was sent: name, connection or TLS.
    Unreachable,
    /// Something was sent, and the answer did not come in time.
    Timeout,
    /// Something was sent, and the connection broke before the answer.
    Broken,
    /// The answer was no success.
    Status(u16),
    /// The event cannot be put into the sink's form.
    Unsendable,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FailureKind::Unreachable => f.write_str("unreachable"),
            FailureKind::Timeout => f.write_str("timeout"),
            FailureKind::Broken => f.write_str("broken"),
            FailureKind::Status(status) => write!(f, "status {status}"),
            FailureKind::Unsendable => f.write_str("unsendable"),
        }
    }
}
