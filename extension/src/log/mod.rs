// SPDX-License-Identifier: PostgreSQL
//! The log: a ring of append-only segments.

pub mod append;
mod horizon;
pub mod position;
pub mod scan;
pub mod state;
mod table;
