// SPDX-License-Identifier: PostgreSQL
//! What follows from a failed attempt.

use bytestring::ByteString;
use tokio::time::Instant;
use uuid::Uuid;

use crate::calls::outcome::Outcome;

/// An attempt that failed, and what follows.
#[derive(Debug)]
pub struct Judged {
    /// The event's.
    pub id: Uuid,
    /// The event's.
    pub topic: ByteString,
    /// What came of it.
    pub outcome: Outcome,
    /// What follows.
    pub verdict: Verdict,
}

/// What follows from a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes again, not before this time.
    Again(Instant),
    /// The endpoint is to blame: the event goes again when that works.
    Waits,
    /// The endpoint is to blame, and with this attempt it counts as down.
    Down,
    /// There are no more attempts.
    Dead,
    /// The endpoint is gone for good.
    Gone,
}
