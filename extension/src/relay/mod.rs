// SPDX-License-Identifier: PostgreSQL
//! The functions that a relay calls and that are not SQL: reading pages and parked events, shards, and waiting.

mod page;
mod parked;
mod shard;
mod wait;
