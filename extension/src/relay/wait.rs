// SPDX-License-Identifier: PostgreSQL
//! `dtm.relay_wait`: a backend that sleeps on the relay's behalf until something was published.

use std::time::{Duration, Instant};

use dtm_core::position::Position;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::log::{position, state};
use crate::refusal::Refusal;
use crate::wake;

/// How often a sleeping backend looks for itself: COMMIT PREPARED wakes nobody.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The longest that one call waits: it also bounds how long the wait outlives a client that has gone without a word.
const WAIT_MAX: Duration = Duration::from_secs(10);

#[pg_extern]
fn relay_wait(known: &str, timeout_ms: i32, fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    let known = Position::parse(known).map_err(|error| {
        Refusal::argument("malformed position", format!("{error}."), "Pass a position that pg_dtm made.")
    })?;
    let timeout = Duration::from_millis(u64::from(timeout_ms.max(0).unsigned_abs())).min(WAIT_MAX);
    // SAFETY: fcinfo is what PostgreSQL called us with.
    unsafe { leave_snapshot_behind(fcinfo) }?;
    let Some(_listening) = wake::listen() else {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        let detail = "The library is not preloaded, or too many relays wait already.";
        let hint = "Set shared_preload_libraries = 'pg_dtm' and restart the server, or poll.";
        return Err(Refusal::new(code, "there is nothing to wait on", detail, hint).into());
    };
    let deadline = Instant::now() + timeout;
    loop {
        pgrx::check_for_interrupts!();
        if position::is_behind(&known, &state::get()) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        sleep(left.min(LOOK_EVERY));
    }
}

/// Ends the transaction that the CALL began, and with it its snapshot: a sleeping backend that held one would keep dead
/// rows of the whole database from being vacuumed.
///
/// # Safety
/// `fcinfo` is that of the call in progress; nothing palloc'd in the transaction is used afterwards.
unsafe fn leave_snapshot_behind(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), Refusal> {
    // SAFETY: a procedure is called with a CallContext; one that is not atomic may end its transaction.
    unsafe {
        let context = (*fcinfo).context.cast::<pg_sys::CallContext>();
        if context.is_null() || (*context).atomic {
            let code = PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION;
            let detail = "It waits without a snapshot, which a transaction block has.";
            return Err(Refusal::new(
                code,
                "dtm.relay_wait runs in a transaction",
                detail,
                "CALL it by itself.",
            ));
        }
        pg_sys::SPI_connect_ext(pg_sys::SPI_OPT_NONATOMIC as i32);
        pg_sys::SPI_commit();
        pg_sys::SPI_finish();
    }
    Ok(())
}

fn sleep(time: Duration) {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: waits on the backend's own latch. Looking at relations can have left a catalog snapshot, which goes first.
    unsafe {
        pg_sys::InvalidateCatalogSnapshot();
        let milliseconds = time.as_millis().max(1) as std::ffi::c_long;
        pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, milliseconds, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}
