// SPDX-License-Identifier: PostgreSQL
//! The coordinator: drives global transactions to their end.
//!
//! A submitted transaction comes as an event of the log, through a pipeline like any other, whose sink is [`Coordinator`]; one
//! that was prepared, delayed, or failed comes from dtm.due when its time has come ([`due`]). Either way [`drive`] makes a pass
//! over it: the pure [`machine`] says what is called next ([`message`] is what it knows of 2-phase messages), [`branch`] makes
//! the calls, [`endpoints`] keeps them from services that are down, and the store (`source::transactions`) writes what came of
//! it.

pub mod branch;
pub mod drive;
pub mod due;
pub mod endpoints;
pub mod machine;
mod message;
pub mod settlement;
pub mod shards;

pub use drive::Coordinator;
