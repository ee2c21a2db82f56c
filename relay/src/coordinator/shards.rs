// SPDX-License-Identifier: PostgreSQL
//! Which transactions are a relay's: those in its shards of the coordinator's subscription.

use dtm_core::shard::shard_of;

/// The shards that a relay owns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shards {
    /// How many there are.
    pub of: i32,
    /// The relay's own.
    pub own: Vec<i32>,
}

impl Shards {
    /// Whether a transaction is in one of them.
    pub fn have(&self, gid: &str) -> bool {
        self.of > 0 && self.own.contains(&shard_of(Some(gid.as_bytes()), 0, self.of))
    }
}
