// SPDX-License-Identifier: PostgreSQL
//! Opening the tables whose columns the library knows by their places.

use pgrx::prelude::*;

use crate::refusal::Refusal;

/// Locks and opens a table of the extension. Refuses one with other columns than the library was written for: rows would be
/// taken apart, or put together, beyond the end of what was made room for.
pub fn open(table: pg_sys::Oid, lock: u32, columns: usize) -> pg_sys::Relation {
    // SAFETY: the oid of a table of the extension; waits for whoever truncates it. PostgreSQL closes it if this fails.
    unsafe {
        let relation = pg_sys::table_open(table, lock as pg_sys::LOCKMODE);
        let found = (*(*relation).rd_att).natts as usize;
        if found != columns {
            refuse(relation, found, columns);
        }
        relation
    }
}

/// # Safety
/// The relation is open.
#[cold]
unsafe fn refuse(relation: pg_sys::Relation, found: usize, columns: usize) -> ! {
    // SAFETY: an open relation has a name.
    let name = unsafe { std::ffi::CStr::from_ptr((*(*relation).rd_rel).relname.data.as_ptr()) };
    Refusal::new(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "the library and the extension's SQL are of different versions",
        format!("dtm.{} has {found} columns, the library knows {columns}.", name.to_string_lossy()),
        "After ALTER EXTENSION pg_dtm UPDATE open a new session, or restart the server if the library is preloaded; \
         if it stays so, install the library of the same version.",
    )
    .raise()
}
