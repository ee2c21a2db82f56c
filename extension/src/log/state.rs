// SPDX-License-Identifier: PostgreSQL
//! What this session knows of the log: the oids of its relations, the era, the current segment. Read once, and anew after
//! PostgreSQL has told that one of them changed.

use std::cell::Cell;
use std::ffi::CStr;

use pgrx::prelude::*;

use crate::log::table;
use crate::refusal::Refusal;

/// How many segments the ring has.
pub const SEGMENTS: usize = 3;

/// One table of the ring and its only index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The table.
    pub table: pg_sys::Oid,
    /// Its primary key, on seq.
    pub index: pg_sys::Oid,
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct State {
    installation: pg_sys::Oid,
    /// All segments, for readers.
    pub segments: [Segment; SEGMENTS],
    /// The one that publishers write, as an index of `segments`.
    pub current: usize,
    /// The sequence of the log.
    pub event_seq: pg_sys::Oid,
    /// Events that are due later.
    pub delayed: pg_sys::Oid,
    /// The sequence that keeps events of one time in order.
    pub delayed_seq: pg_sys::Oid,
    /// Ids that publishers gave.
    pub given_ids: pg_sys::Oid,
    /// The era of this database.
    pub era: i32,
}

impl State {
    /// Whether the table is a segment of the log.
    pub fn is_segment(&self, table: pg_sys::Oid) -> bool {
        self.segments.iter().any(|segment| segment.table == table)
    }

    fn rests_on(&self, relation: pg_sys::Oid) -> bool {
        let others = [self.installation, self.event_seq, self.delayed, self.delayed_seq, self.given_ids];
        others.contains(&relation) || self.is_segment(relation)
    }
}

thread_local! {
    static STATE: Cell<Option<State>> = const { Cell::new(None) };
    /// Counts what PostgreSQL told of changes. One can be told while the state is being loaded, when what it changed may have
    /// been read already.
    static CHANGES: Cell<u64> = const { Cell::new(0) };
    static LISTENING: Cell<bool> = const { Cell::new(false) };
}

/// What is known now. Take the lock on a table first and call this after it: an invalidation that was sent before the lock
/// could be had has then been heard. What is told while this loads is of changes that such a lock does not wait for; but what
/// was loaded meanwhile is not kept.
pub fn get() -> State {
    STATE.get().unwrap_or_else(|| {
        listen();
        let changes = CHANGES.get();
        let state = load();
        if CHANGES.get() == changes {
            STATE.set(Some(state));
        }
        state
    })
}

fn listen() {
    if !LISTENING.replace(true) {
        // SAFETY: registers a callback that lives as long as the library, which is never unloaded.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0)) };
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, relation: pg_sys::Oid) {
    if relation == pg_sys::InvalidOid || STATE.get().is_none_or(|state| state.rests_on(relation)) {
        CHANGES.set(CHANGES.get().wrapping_add(1));
        STATE.set(None);
    }
}

fn relation(schema: pg_sys::Oid, name: &CStr) -> pg_sys::Oid {
    // SAFETY: a catalog look-up inside a transaction.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema) };
    if oid == pg_sys::InvalidOid {
        let detail = format!("dtm.{} does not exist.", name.to_string_lossy());
        let hint = "Restore it from a backup, or drop the extension and create it anew.";
        Refusal::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "the extension pg_dtm is damaged",
            detail,
            hint,
        )
        .raise();
    }
    oid
}

fn load() -> State {
    // SAFETY: a catalog look-up inside a transaction.
    let schema = unsafe { pg_sys::get_namespace_oid(c"dtm".as_ptr(), false) };
    let segment = |table, index| Segment { table: relation(schema, table), index: relation(schema, index) };
    let installation = relation(schema, c"installation");
    let Installation { era, log_segment: current, .. } = read_installation(installation);
    State {
        installation,
        segments: [
            segment(c"log_1", c"log_1_pkey"),
            segment(c"log_2", c"log_2_pkey"),
            segment(c"log_3", c"log_3_pkey"),
        ],
        current,
        event_seq: relation(schema, c"event_seq"),
        delayed: relation(schema, c"delayed"),
        delayed_seq: relation(schema, c"delayed_seq"),
        given_ids: relation(schema, c"given_ids"),
        era,
    }
}

/// The row of dtm.installation.
struct Installation {
    era: i32,
    /// As an index.
    log_segment: usize,
    control_segment: i16,
}

/// Reads dtm.installation without rights of the caller, as a part of publishing, and as it is now: the scan's snapshot is a fresh
/// one, however old that of the transaction is.
fn read_installation(installation: pg_sys::Oid) -> Installation {
    const ERA: usize = 1;
    const LOG_SEGMENT: usize = 4;
    const CONTROL_SEGMENT: usize = 5;
    const COLUMNS: usize = 6;
    // SAFETY: the table has the columns of 01-installation.sql; values are read before the scan ends.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let table = table::open(installation, pg_sys::AccessShareLock, COLUMNS);
        let scan = pg_sys::systable_beginscan(
            table,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        let tuple = pg_sys::systable_getnext(scan);
        let row = (!tuple.is_null()).then(|| {
            let mut values = [pg_sys::Datum::from(0); COLUMNS];
            let mut nulls = [false; COLUMNS];
            pg_sys::heap_deform_tuple(tuple, (*table).rd_att, values.as_mut_ptr(), nulls.as_mut_ptr());
            Installation {
                era: values[ERA].value() as i32,
                log_segment: values[LOG_SEGMENT].value() as i16 as usize - 1,
                control_segment: values[CONTROL_SEGMENT].value() as i16,
            }
        });
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(table, lock);
        row.unwrap_or_else(|| {
            let hint = "Drop the extension and create it anew, or restore the database from a backup.";
            let code = PgSqlErrorCode::ERRCODE_DATA_CORRUPTED;
            Refusal::new(code, "the extension pg_dtm is damaged", "dtm.installation is empty.", hint).raise()
        })
    }
}

/// The segment of control data that is written, which stays so until the transaction ends: who changes it waits for the lock.
#[pg_extern]
fn control_segment() -> i16 {
    // SAFETY: a catalog look-up inside a transaction.
    let schema = unsafe { pg_sys::get_namespace_oid(c"dtm".as_ptr(), false) };
    let (installation, rotation) = (relation(schema, c"installation"), relation(schema, c"rotation"));
    // SAFETY: locks on tables that exist, let go when the transaction ends; in the order in which DROP EXTENSION locks them.
    unsafe {
        pg_sys::LockRelationOid(installation, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        pg_sys::LockRelationOid(rotation, pg_sys::RowShareLock as pg_sys::LOCKMODE);
    }
    read_installation(installation).control_segment
}

/// Tells all sessions, at commit, that dtm.installation changed.
#[pg_extern]
fn installation_changed() {
    // SAFETY: inside a transaction, with an existing relation.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(get().installation) };
}
