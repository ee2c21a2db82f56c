// SPDX-License-Identifier: PostgreSQL
//! The settings of the extension.

use std::ffi::CString;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::prelude::*;

static MAX_PAYLOAD: GucSetting<i32> = GucSetting::<i32>::new(1024 * 1024);
static SOURCE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static RETENTION_S: GucSetting<f64> = GucSetting::<f64>::new(3.0 * 86_400.0);
static RECEIPTS_KEPT_S: GucSetting<f64> = GucSetting::<f64>::new(30.0 * 86_400.0);
static BARRIERS_KEPT_S: GucSetting<f64> = GucSetting::<f64>::new(30.0 * 86_400.0);
static TRANSACTIONS_KEPT_S: GucSetting<f64> = GucSetting::<f64>::new(7.0 * 86_400.0);

const MAX_PAYLOAD_CEILING: i32 = 256 * 1024 * 1024;
const HUNDRED_YEARS_S: f64 = 100.0 * 365.25 * 86_400.0;

/// Makes the settings known to PostgreSQL.
pub fn define() {
    GucRegistry::define_int_guc(
        c"dtm.max_payload",
        c"The largest payload of one event.",
        c"Measured in the bytes that are delivered.",
        &MAX_PAYLOAD,
        0,
        MAX_PAYLOAD_CEILING,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
    );
    GucRegistry::define_string_guc(
        c"dtm.source",
        c"The CloudEvents source of this database's events.",
        c"Set it for the database. Empty: /pg_dtm/ and the database's name.",
        &SOURCE,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_float_guc(
        c"dtm.retention",
        c"How long events and given ids are kept.",
        c"An event is kept longer as long as a subscription has not had it.",
        &RETENTION_S,
        0.0,
        HUNDRED_YEARS_S,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_float_guc(
        c"dtm.receipts_kept",
        c"How long receipts of dtm.receive are kept.",
        c"A redelivery of an event later than this is taken for a new one.",
        &RECEIPTS_KEPT_S,
        1.0,
        HUNDRED_YEARS_S,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_float_guc(
        c"dtm.barriers_kept",
        c"How long rows of dtm_barrier.barrier are kept.",
        c"A call that is repeated later than this is taken for a new one.",
        &BARRIERS_KEPT_S,
        1.0,
        HUNDRED_YEARS_S,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_float_guc(
        c"dtm.transactions_kept",
        c"How long global transactions are kept after their end.",
        c"A gid that is used again later than this is taken for a new one.",
        &TRANSACTIONS_KEPT_S,
        1.0,
        HUNDRED_YEARS_S,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    // SAFETY: called once per process, from _PG_init, with a static string.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"dtm".as_ptr()) };
}

/// `dtm.max_payload`, in bytes.
pub fn max_payload_bytes() -> usize {
    MAX_PAYLOAD.get() as usize
}

fn seconds(seconds: f64) -> Interval {
    Interval::from_micros((seconds * 1e6) as i64)
}

#[pg_extern]
fn retention() -> Interval {
    seconds(RETENTION_S.get())
}

#[pg_extern]
fn receipts_kept() -> Interval {
    seconds(RECEIPTS_KEPT_S.get())
}

#[pg_extern]
fn barriers_kept() -> Interval {
    seconds(BARRIERS_KEPT_S.get())
}

#[pg_extern]
fn transactions_kept() -> Interval {
    seconds(TRANSACTIONS_KEPT_S.get())
}

#[pg_extern]
fn library_protocol() -> i32 {
    dtm_core::PROTOCOL
}
