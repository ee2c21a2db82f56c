// SPDX-License-Identifier: PostgreSQL
//! Appending to the log: straight into the table, without a plan, and without rights of the caller on it.
//!
//! The order is what readers rest on: *lock the log, take the transaction id, then a sequence number* (`dtm_core::window`
//! says why).

use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;

use crate::event::NewEvent;
use crate::log::state::{self, State};
use crate::log::{scan, table};
use crate::refusal::Refusal;

const DELAYED_COLUMNS: usize = 8;
const GIVEN_IDS_COLUMNS: usize = 2;

/// Rows that are formed before they are inserted together.
const BATCH_ROWS: usize = 256;

unsafe extern "C-unwind" {
    /// commands/sequence.h; nextval without the caller's rights. Not among pgrx's bindings; the same in 15 to 18.
    fn nextval_internal(sequence: pg_sys::Oid, check_permissions: bool) -> i64;
}

fn nextval(sequence: pg_sys::Oid) -> i64 {
    // SAFETY: the declaration above is that of PostgreSQL, which may raise an error: it unwinds as every other.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| nextval_internal(sequence, false)) }
}

/// Appends events in their order: what is due goes into the current segment, the rest waits in dtm.delayed.
pub fn append(events: &[NewEvent], now: pg_sys::TimestampTz) {
    if events.is_empty() {
        return;
    }
    let (segment, state) = open_current_segment();
    // SAFETY: inside a transaction that may write; assigns its id if it has none.
    let xid = unsafe { pg_sys::GetTopFullTransactionId() }.value;
    remember_given_ids(events, &state, now);
    if let [event] = events
        && event.deliver_at.is_none()
    {
        insert(segment, &mut log_row(event, nextval(state.event_seq), xid, now, state.era));
    } else {
        append_batches(segment, &state, events, xid, now);
    }
    // SAFETY: opened above; the lock stays until the transaction ends.
    unsafe { pg_sys::table_close(segment, pg_sys::NoLock as pg_sys::LOCKMODE) };
}

fn append_batches(
    segment: pg_sys::Relation,
    state: &State,
    events: &[NewEvent],
    xid: u64,
    now: pg_sys::TimestampTz,
) {
    for batch in events.chunks(BATCH_ROWS) {
        let due = batch.iter().filter(|event| event.deliver_at.is_none());
        let mut rows: Vec<_> =
            due.map(|event| log_row(event, nextval(state.event_seq), xid, now, state.era)).collect();
        insert_many(segment, &mut rows);
    }
    let mut later = events.iter().filter_map(|event| Some((event, event.deliver_at?))).peekable();
    if later.peek().is_some() {
        let table = open(state.delayed, DELAYED_COLUMNS);
        for (event, due) in later {
            insert(table, &mut delayed_row(event, due, nextval(state.delayed_seq)));
        }
        // SAFETY: opened above.
        unsafe { pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE) };
    }
}

fn open(table: pg_sys::Oid, columns: usize) -> pg_sys::Relation {
    table::open(table, pg_sys::RowExclusiveLock, columns)
}

/// Locks the segment that is current *while* the lock is held: taking it hears of a rotation or of a new era. A transaction
/// that has it already need not hear: nobody empties its segment, and no era begins, until it has ended.
fn open_current_segment() -> (pg_sys::Relation, State) {
    let mut believed = state::get();
    loop {
        let oid = believed.segments[believed.current].table;
        let table = open(oid, scan::COLUMNS);
        let state = state::get();
        if state.segments[state.current].table == oid {
            return (table, state);
        }
        // SAFETY: opened above. The lock is kept: it does no harm and spares a race.
        unsafe { pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE) };
        believed = state;
    }
}

/// A row as PostgreSQL takes it.
struct Row<const COLUMNS: usize> {
    values: [pg_sys::Datum; COLUMNS],
    nulls: [bool; COLUMNS],
}

impl<const COLUMNS: usize> Row<COLUMNS> {
    fn new(columns: [Option<pg_sys::Datum>; COLUMNS]) -> Self {
        Row {
            values: columns.map(|column| column.unwrap_or(pg_sys::Datum::from(0))),
            nulls: columns.map(|column| column.is_none()),
        }
    }

    /// # Safety
    /// The table has these columns.
    unsafe fn form(&mut self, table: pg_sys::Relation) -> pg_sys::HeapTuple {
        // SAFETY: by this function's contract.
        unsafe { pg_sys::heap_form_tuple((*table).rd_att, self.values.as_mut_ptr(), self.nulls.as_mut_ptr()) }
    }
}

fn uuid(id: &[u8; 16]) -> pg_sys::Datum {
    pg_sys::Datum::from(id.as_ptr())
}

fn log_row(
    event: &NewEvent,
    seq: i64,
    xid: u64,
    now: pg_sys::TimestampTz,
    era: i32,
) -> Row<{ scan::COLUMNS }> {
    Row::new([
        Some(seq.into()),
        Some(pg_sys::Datum::from(xid)),
        Some(now.into()),
        Some(era.into()),
        Some(uuid(&event.id)),
        Some(event.topic),
        event.key,
        event.content_type,
        event.headers,
        event.payload,
    ])
}

fn delayed_row(event: &NewEvent, due: pg_sys::TimestampTz, n: i64) -> Row<DELAYED_COLUMNS> {
    Row::new([
        Some(due.into()),
        Some(n.into()),
        Some(uuid(&event.id)),
        Some(event.topic),
        event.key,
        event.content_type,
        event.headers,
        event.payload,
    ])
}

/// Inserts a row and its index entries. The way of PostgreSQL's own catalogs: no plan, no triggers, no rules.
fn insert<const COLUMNS: usize>(table: pg_sys::Relation, row: &mut Row<COLUMNS>) {
    // SAFETY: an open table of the extension and a row of its columns.
    unsafe {
        let tuple = row.form(table);
        pg_sys::CatalogTupleInsert(table, tuple);
        pg_sys::heap_freetuple(tuple);
    }
}

/// Inserts rows together: one WAL record for as many as fit a page.
fn insert_many<const COLUMNS: usize>(table: pg_sys::Relation, rows: &mut [Row<COLUMNS>]) {
    // SAFETY: an open table of the extension and rows of its columns; slots are dropped after their use.
    unsafe {
        let mut slots: Vec<*mut pg_sys::TupleTableSlot> = rows
            .iter_mut()
            .map(|row| {
                let slot =
                    pg_sys::MakeSingleTupleTableSlot((*table).rd_att, &raw const pg_sys::TTSOpsHeapTuple);
                pg_sys::ExecStoreHeapTuple(row.form(table), slot, true)
            })
            .collect();
        if slots.is_empty() {
            return;
        }
        let indexes = pg_sys::CatalogOpenIndexes(table);
        pg_sys::CatalogTuplesMultiInsertWithInfo(table, slots.as_mut_ptr(), slots.len() as i32, indexes);
        pg_sys::CatalogCloseIndexes(indexes);
        for slot in slots {
            pg_sys::ExecDropSingleTupleTableSlot(slot);
        }
    }
}

/// A given id is an idempotency key: the unique index of its table says whether it is new.
fn remember_given_ids(events: &[NewEvent], state: &State, now: pg_sys::TimestampTz) {
    if !events.iter().any(|event| event.id_given) {
        return;
    }
    let table = open(state.given_ids, GIVEN_IDS_COLUMNS);
    for event in events.iter().filter(|event| event.id_given) {
        let kept_from = event.deliver_at.unwrap_or(now);
        let mut row: Row<GIVEN_IDS_COLUMNS> = Row::new([Some(uuid(&event.id)), Some(kept_from.into())]);
        PgTryBuilder::new(std::panic::AssertUnwindSafe(|| insert(table, &mut row)))
            .catch_when(PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION, |_error: CaughtError| {
                let detail = format!("The id is {}.", uuid::Uuid::from_bytes(event.id));
                let hint = "A given id is an idempotency key: the first publish of it counts, and this one is not needed.";
                let message = "an event with this id was published already";
                Refusal::new(PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION, message, detail, hint).raise()
            })
            .execute();
    }
    // SAFETY: opened above.
    unsafe { pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE) };
}
