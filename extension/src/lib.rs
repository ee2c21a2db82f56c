// SPDX-License-Identifier: PostgreSQL
//! The extension `pg_dtm`: what has to be fast, or close to PostgreSQL, in Rust; everything else is SQL in `sql/`.
//!
//! * [`publish`] checks what a user publishes ([`event`]) and appends it ([`log::append`]).
//! * [`transaction`] checks what a global transaction is asked to do.
//! * [`barrier`] says whether a branch's work is to be done.
//! * [`log`] is the log itself: its tables, appending, positions, and reading by windows.
//! * [`relay`] are the functions that a relay calls, [`wake`] what ends its waiting.

#[cfg(not(panic = "unwind"))]
compile_error!("PostgreSQL errors unwind through Rust frames: build with panic = \"unwind\"");

mod barrier;
mod event;
mod id;
mod log;
mod publish;
mod refusal;
mod relay;
mod settings;
mod subscribe;
mod transaction;
mod varlena;
mod wake;

use pgrx::prelude::*;

pgrx::pg_module_magic!();

/// Called by PostgreSQL when it loads the library: in the postmaster if the library is preloaded, else in a session.
#[allow(non_snake_case)]
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::define();
    wake::init();
}
