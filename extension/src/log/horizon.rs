// SPDX-License-Identifier: PostgreSQL
//! What all snapshots that are held see.

use pgrx::prelude::*;

use crate::log::{position, state};

/// Transactions with a smaller id have ended for every snapshot that is held in this database, that of a dump, of a prepared
/// transaction and of a standby that tells the primary of its own included.
#[pg_extern]
fn horizon() -> i64 {
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: a table of this database stands for all of its ordinary tables; nothing is kept of what is answered.
    let oldest = unsafe {
        let table = pg_sys::table_open(state::get().delayed, lock);
        let oldest = pg_sys::GetOldestNonRemovableTransactionId(table);
        pg_sys::table_close(table, lock);
        oldest
    };
    position::widen(oldest.into_inner()) as i64
}
