// SPDX-License-Identifier: PostgreSQL
//! `dtm.barrier`: whether the work of a branch is to be done in this transaction. In Rust since it stands before every piece of
//! work, and is to cost no more than the INSERT that it is.

use std::cell::Cell;
use std::ptr;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;

use crate::publish::argument;
use crate::refusal::{Refusal, quoted};
use crate::varlena;

/// The arguments, as 15-barrier.sql declares them, and how many characters they have at the most: those of DTM's columns.
const ARGUMENTS: [(&str, i32); 5] =
    [("trans_type", 45), ("gid", 128), ("branch_id", 128), ("op", 45), ("barrier_id", 45)];
const OP: usize = 3;

/// Ends the transaction of whoever comes second: false, and a commit, would look like success.
const MESSAGE: &[u8] = b"msg";

/// All names have their schema, and no operator is looked up: whoever calls has no part in what it means.
const INSERT: &std::ffi::CStr =
    c"INSERT INTO dtm_barrier.barrier (trans_type, gid, branch_id, op, barrier_id, reason)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT ON CONSTRAINT uniq_barrier DO NOTHING";

thread_local! {
    /// Prepared once in a session; PostgreSQL plans it anew when the table has changed.
    static PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(ptr::null_mut()) };
}

#[pg_extern]
fn barrier(fcinfo: FunctionCallInfo) -> bool {
    let mut row = [pg_sys::Datum::null(); 6];
    for (at, place) in row.iter_mut().take(ARGUMENTS.len()).enumerate() {
        // SAFETY: called with the five texts that 15-barrier.sql declares.
        let found = unsafe { argument(fcinfo, at).map(|datum| (datum, varlena::bytes(datum))) };
        match found.filter(|(_, text)| is_name(text, ARGUMENTS[at].1)) {
            Some((datum, _)) => *place = datum,
            None => wrong(at, found.map(|(_, text)| text)).raise(),
        }
    }
    row[5] = row[OP];
    // SAFETY: an argument that was looked at above.
    let op = unsafe { varlena::bytes(row[OP]) };
    // SAFETY: pairs SPI_connect with SPI_finish; after an error PostgreSQL ends what was connected.
    let (is_first, was_not_done) = unsafe {
        pg_sys::SPI_connect();
        let was_not_done = compensated(op).is_some_and(|compensated| {
            let mut row = row;
            row[OP] = varlena::from_bytes(compensated);
            insert(&row)
        });
        let is_first = insert(&row);
        pg_sys::SPI_finish();
        (is_first, was_not_done)
    };
    if !is_first && op == MESSAGE {
        decided().raise();
    }
    is_first && !was_not_done
}

/// What an op takes back: if that was not done, it takes its place, so that it never is.
fn compensated(op: &[u8]) -> Option<&'static [u8]> {
    match op {
        b"cancel" => Some(b"try"),
        b"compensate" | b"rollback" => Some(b"action"),
        _ => None,
    }
}

/// Inserts a row; false: there is one of these names. Waits for transactions that have inserted one and have not ended.
///
/// # Safety
/// SPI is connected, and `row` are six texts.
unsafe fn insert(row: &[pg_sys::Datum; 6]) -> bool {
    // SAFETY: by this function's contract. The plan takes six texts and lives as long as the session.
    unsafe {
        let mut plan = PLAN.get();
        if plan.is_null() {
            let mut types = [pg_sys::TEXTOID; 6];
            plan = pg_sys::SPI_prepare(INSERT.as_ptr(), types.len() as i32, types.as_mut_ptr());
            if plan.is_null() || pg_sys::SPI_keepplan(plan) != 0 {
                error!("the barrier's statement cannot be prepared");
            }
            PLAN.set(plan);
        }
        let mut values = *row;
        let done = pg_sys::SPI_execute_plan(plan, values.as_mut_ptr(), ptr::null(), false, 0);
        if done != pg_sys::SPI_OK_INSERT as i32 {
            error!("the barrier's statement ended with {done}");
        }
        pg_sys::SPI_processed > 0
    }
}

/// Whether a text has between one and so many characters.
fn is_name(text: &[u8], characters_max: i32) -> bool {
    // SAFETY: counts the characters of a text in the database's encoding.
    let characters = || unsafe { pg_sys::pg_mbstrlen_with_len(text.as_ptr().cast(), text.len() as i32) };
    !text.is_empty() && (text.len() <= characters_max as usize || characters() <= characters_max)
}

fn wrong(at: usize, found: Option<&[u8]>) -> Refusal {
    let (name, most) = ARGUMENTS[at];
    let found = found.map_or("null".to_owned(), |text| quoted(&String::from_utf8_lossy(text)));
    Refusal::argument(
        format!("a barrier needs a {name} of 1 to {most} characters"),
        format!("It is {found}."),
        "Pass what comes with the call, in the query of its URL.",
    )
}

fn decided() -> Refusal {
    Refusal::new(
        PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
        "the message is decided already",
        "It was committed before, or somebody asked, was told that it is not committed, and will abort it.",
        "Roll back. dtm.query_prepared says which of the two it was.",
    )
}
