// SPDX-License-Identifier: PostgreSQL
//! What the extension and the relay of pg_dtm agree on.
//!
//! Everything here is pure: no I/O, no clock, no PostgreSQL. The arithmetic that delivery rests on lives in
//! [`position`] and [`window`]; [`page`] is the form in which events travel from the log to the relay; the rest says
//! what a user may write: topics and patterns, headers, destinations, options, durations.

pub mod destination;
pub mod duration;
pub mod headers;
pub mod names;
pub mod options;
pub mod page;
pub mod position;
pub mod shard;
pub mod topic;
pub mod topic_template;
pub mod transaction;
pub mod window;

/// The protocol that this build speaks between relay and extension: the SQL functions that the relay calls, the page
/// format and the text of a position. `dtm.protocol()` answers the least and the greatest that the extension knows.
pub const PROTOCOL: i32 = 2;
