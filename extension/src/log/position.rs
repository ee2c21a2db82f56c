// SPDX-License-Identifier: PostgreSQL
//! Reading positions: the sequence, the publishers' locks, a snapshot, the sequence again, in this order.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use dtm_core::position::{Position, Snapshot};
use dtm_core::window::{self, Reading};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::log::state::{self, State};
use crate::refusal::Refusal;

/// The last sequence number given out; 0 before the first (PostgreSQL says null there).
pub fn last_seq(state: &State) -> i64 {
    // SAFETY: a sequence of the extension; the function may answer null, which direct_function_call turns into none.
    unsafe {
        pgrx::direct_function_call::<i64>(pg_sys::pg_sequence_last_value, &[Some(state.event_seq.into())])
            .unwrap_or(0)
    }
}

/// Whether there is anything past a position: a number was given out, or a publisher that it has a floor for has ended.
pub fn is_behind(position: &Position, state: &State) -> bool {
    let ended = |xid: u64| {
        // SAFETY: looks at shared memory; floors are of transactions that ran when the position was read, which is long
        // before their 32-bit id comes round.
        !unsafe { pg_sys::TransactionIdIsInProgress(pg_sys::TransactionId::from_inner(xid as u32)) }
    };
    position.era != state.era
        || last_seq(state) != position.seq
        || position.floors.iter().any(|floor| ended(floor.xid))
}

/// Reads a position; `base` is an earlier one, if any is known.
fn read(base: Option<&Position>, state: &State) -> Position {
    // SAFETY: inside a transaction. The transaction's own id, if it has one, is not seen by its own position.
    let own = unsafe { pg_sys::GetTopFullTransactionIdIfAny() }.value;
    let seq = last_seq(state);
    let publishers = publishers(state);
    let snapshot = snapshot();
    let top = last_seq(state);
    let own = (own != 0).then_some(own);
    window::advance(base, Reading { era: state.era, seq, publishers, snapshot, top, own })
}

/// Widens a transaction id that is running or was lately: it lies at most half the 32-bit circle behind the next one.
pub(super) fn widen(xid: u32) -> u64 {
    // SAFETY: looks at shared memory.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
    let candidate = (next & !0xffff_ffff) | u64::from(xid);
    if candidate > next { candidate - (1 << 32) } else { candidate }
}

/// A fresh snapshot, whatever the isolation level of the transaction.
fn snapshot() -> Snapshot {
    // SAFETY: the snapshot is PostgreSQL's static one, read before anything can take another.
    unsafe {
        let snapshot = pg_sys::GetLatestSnapshot();
        let running = std::slice::from_raw_parts((*snapshot).xip, (*snapshot).xcnt as usize);
        let mut xip: Vec<u64> = running.iter().map(|xid| widen(xid.into_inner())).collect();
        // A transaction that is being prepared can stand there twice.
        xip.sort_unstable();
        xip.dedup();
        Snapshot {
            xmin: widen((*snapshot).xmin.into_inner()),
            xmax: widen((*snapshot).xmax.into_inner()),
            xip,
        }
    }
}

/// The top-level ids of all transactions that hold a publisher's lock on a segment, prepared ones included.
///
/// Lock entries of one transaction share its virtual id, also while it is being prepared: joined by it, the lock on a
/// segment and the locks on the transaction's own ids tell the id. Of these the least is the top-level one.
fn publishers(state: &State) -> Vec<u64> {
    // SAFETY: GetLockStatusData answers a palloc'd copy of the lock table, with `nelements` entries.
    let locks = unsafe {
        let data = pg_sys::GetLockStatusData();
        std::slice::from_raw_parts((*data).locks, (*data).nelements as usize)
    };
    let row_exclusive = 1 << pg_sys::RowExclusiveLock;
    // SAFETY: reads a variable of the backend.
    let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
    let mut publishers: HashMap<(i64, u32), Option<u64>> = HashMap::new();
    for lock in locks {
        let is_relation = u32::from(lock.locktag.locktag_type) == pg_sys::LockTagType::LOCKTAG_RELATION;
        if is_relation
            && lock.holdMask & row_exclusive != 0
            && lock.locktag.locktag_field1 == database
            && state.is_segment(lock.locktag.locktag_field2.into())
        {
            publishers.insert(virtual_id(lock), None);
        }
    }
    for lock in locks {
        let is_own = u32::from(lock.locktag.locktag_type) == pg_sys::LockTagType::LOCKTAG_TRANSACTION
            && lock.holdMask & (1 << pg_sys::ExclusiveLock) != 0;
        if is_own && let Some(top) = publishers.get_mut(&virtual_id(lock)) {
            let xid = widen(lock.locktag.locktag_field1);
            *top = Some(top.map_or(xid, |top| top.min(xid)));
        }
    }
    publishers.into_values().flatten().collect()
}

#[cfg(not(any(feature = "pg17", feature = "pg18")))]
fn virtual_id(lock: &pg_sys::LockInstanceData) -> (i64, u32) {
    (i64::from(lock.backend), lock.lxid)
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
fn virtual_id(lock: &pg_sys::LockInstanceData) -> (i64, u32) {
    (i64::from(lock.vxid.procNumber), lock.vxid.localTransactionId)
}

/// How long a position waits for others to flush, and how often it looks.
const FLUSH_PATIENCE: Duration = Duration::from_millis(2);
const FLUSH_LOOK_EVERY: Duration = Duration::from_micros(100);

/// Waits until all WAL written so far is on disk. A position rests on transactions that ended without a flush (rolled back,
/// or with synchronous_commit = off): after a crash their ids would be given out again.
///
/// Under traffic the next commit flushes what is missing. To flush it from here would keep that commit waiting for the disk
/// twice: publishers would pay for being read.
fn flush() {
    let end = end_of_wal();
    let begun = Instant::now();
    // SAFETY: reads shared memory.
    while unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) } < end {
        if begun.elapsed() >= FLUSH_PATIENCE {
            // SAFETY: `end` is the end of a record that has been inserted.
            unsafe { pg_sys::XLogFlush(end) };
            return;
        }
        std::thread::sleep(FLUSH_LOOK_EVERY);
    }
}

/// What was seen is on disk, whatever its synchronous_commit was.
#[pg_extern]
fn flush_wal() {
    flush();
}

/// Where the last record ends that has been inserted.
fn end_of_wal() -> u64 {
    const BLOCK_BYTES: u64 = pg_sys::XLOG_BLCKSZ as u64;
    const SHORT_HEADER_BYTES: u64 = 24;
    const LONG_HEADER_BYTES: u64 = 40;
    // SAFETY: reads a position of the WAL and a constant of the cluster.
    let (insert, segment_bytes) = unsafe { (pg_sys::GetXLogInsertRecPtr(), pg_sys::wal_segment_size as u64) };
    // Where that is the end of a page, this points behind the header of the next one, which is not written yet: XLogFlush
    // would refuse it. No record ends there otherwise.
    if insert % segment_bytes == LONG_HEADER_BYTES {
        insert - LONG_HEADER_BYTES
    } else if insert % BLOCK_BYTES == SHORT_HEADER_BYTES {
        insert - SHORT_HEADER_BYTES
    } else {
        insert
    }
}

fn parse(text: &str) -> Result<Position, ErrorReport> {
    Position::parse(text).map_err(|error| {
        Refusal::argument("malformed position", format!("{error}."), "Pass a position that pg_dtm made.")
            .into()
    })
}

/// The head of the log, flushed, if there is anything past `known`.
#[pg_extern]
fn head(known: &str, always: bool) -> Result<Option<String>, ErrorReport> {
    // SAFETY: looks at shared memory.
    if unsafe { pg_sys::RecoveryInProgress() } {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        let hint = "Connect to the primary.";
        return Err(
            Refusal::new(code, "the server is a standby", "It cannot tell what has ended.", hint).into()
        );
    }
    let known = parse(known)?;
    let state = state::get();
    if !always && !is_behind(&known, &state) {
        return Ok(None);
    }
    let position = read(Some(&known), &state);
    flush();
    Ok(Some(position.to_string()))
}

/// The position of this transaction: it and everything that has not ended is not seen.
#[pg_extern]
fn current_position(base: Option<&str>) -> Result<String, ErrorReport> {
    let base = base.map(parse).transpose()?;
    // SAFETY: inside a transaction that may write. It must have its id before the position is read, or what it publishes
    // later would count as seen once others have ended. No flush: the commit of what is stored brings it.
    unsafe { pg_sys::GetTopFullTransactionId() };
    Ok(read(base.as_ref(), &state::get()).to_string())
}

#[pg_extern]
fn start_of_era(era: i32) -> String {
    Position::start_of_era(era).to_string()
}

#[pg_extern]
fn position_era(body: &str) -> Result<i32, ErrorReport> {
    Ok(parse(body)?.era)
}

#[pg_extern]
fn position_seq(body: &str) -> Result<i64, ErrorReport> {
    Ok(parse(body)?.seq)
}

#[pg_extern]
fn position_low(body: &str) -> Result<i64, ErrorReport> {
    Ok(parse(body)?.low())
}

/// What positions of one era are sorted by.
#[pg_extern]
fn position_order(body: &str) -> Result<Vec<i64>, ErrorReport> {
    Ok(parse(body)?.order().into())
}
