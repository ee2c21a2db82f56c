// SPDX-License-Identifier: PostgreSQL
//! Reading the log in its order: an index scan of each segment, merged by sequence number. No plan is made, so none can
//! be the wrong one.

use pgrx::prelude::*;

use crate::log::state::{Segment, State};
use crate::log::table;

/// Columns of a segment, by place.
pub mod column {
    #![allow(missing_docs)]
    pub const SEQ: usize = 0;
    pub const XID: usize = 1;
    pub const PUBLISHED_AT: usize = 2;
    pub const ERA: usize = 3;
    pub const ID: usize = 4;
    pub const TOPIC: usize = 5;
    pub const KEY: usize = 6;
    pub const CONTENT_TYPE: usize = 7;
    pub const HEADERS: usize = 8;
    pub const PAYLOAD: usize = 9;
}

/// How many columns a segment has.
pub const COLUMNS: usize = 10;

struct SegmentScan {
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    scan: pg_sys::IndexScanDesc,
    slot: *mut pg_sys::TupleTableSlot,
    /// Of the row in the slot; none at the end of the segment.
    seq: Option<i64>,
}

/// A scan of the whole log above a sequence number. Ends with the transaction at the latest, where an error cuts it short.
pub struct Scan {
    segments: Vec<SegmentScan>,
    snapshot: pg_sys::Snapshot,
    current: usize,
}

/// A row that the scan stands on.
#[derive(Clone, Copy)]
pub struct Row {
    slot: *mut pg_sys::TupleTableSlot,
}

impl Row {
    /// The value of a column; none for null.
    ///
    /// # Safety
    /// The scan has not moved on since it answered this row.
    pub unsafe fn get(&self, column: usize) -> Option<pg_sys::Datum> {
        // SAFETY: the slot holds a row of the log, which has this column.
        unsafe {
            if ((*self.slot).tts_nvalid as usize) <= column {
                pg_sys::slot_getsomeattrs_int(self.slot, column as i32 + 1);
            }
            (!*(*self.slot).tts_isnull.add(column)).then(|| *(*self.slot).tts_values.add(column))
        }
    }
}

impl Scan {
    /// Begins a scan of all rows with a greater sequence number, in a snapshot of now.
    pub fn above(seq: i64, state: &State) -> Scan {
        // SAFETY: a registered snapshot lives until `end`; GetLatestSnapshot is fresh also where the transaction's own is
        // old: a row that a position sees must not be missed for the age of the statement's snapshot.
        let snapshot = unsafe { pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()) };
        let mut segments: Vec<SegmentScan> =
            state.segments.iter().map(|segment| SegmentScan::begin(segment, seq, snapshot)).collect();
        segments.iter_mut().for_each(SegmentScan::advance);
        Scan { segments, snapshot, current: usize::MAX }
    }

    /// The next row by sequence number.
    pub fn next(&mut self) -> Option<(i64, Row)> {
        if let Some(segment) = self.segments.get_mut(self.current) {
            segment.advance();
        }
        let ahead = self.segments.iter().enumerate().filter_map(|(at, segment)| Some((segment.seq?, at)));
        let (seq, at) = ahead.min()?;
        self.current = at;
        Some((seq, Row { slot: self.segments[at].slot }))
    }

    /// Ends the scan.
    pub fn end(self) {
        self.segments.into_iter().for_each(SegmentScan::end);
        // SAFETY: registered by `above`.
        unsafe { pg_sys::UnregisterSnapshot(self.snapshot) };
    }
}

impl SegmentScan {
    fn begin(segment: &Segment, above: i64, snapshot: pg_sys::Snapshot) -> SegmentScan {
        // SAFETY: opens a table of the log and its index on seq (int8) for a forward scan over seq > above; everything is
        // closed by `end`, or by PostgreSQL when the transaction fails.
        unsafe {
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let table = table::open(segment.table, pg_sys::AccessShareLock, COLUMNS);
            let index = pg_sys::index_open(segment.index, lock);
            let slot = pg_sys::table_slot_create(table, std::ptr::null_mut());
            let scan = begin_index_scan(table, index, snapshot);
            let mut key = pg_sys::ScanKeyData::default();
            pg_sys::ScanKeyInit(
                &mut key,
                1,
                pg_sys::BTGreaterStrategyNumber as u16,
                pg_sys::F_INT8GT.into(),
                above.into(),
            );
            pg_sys::index_rescan(scan, &mut key, 1, std::ptr::null_mut(), 0);
            SegmentScan { table, index, scan, slot, seq: None }
        }
    }

    fn advance(&mut self) {
        // SAFETY: the scan is open; seq is the first column, never null.
        unsafe {
            let found =
                pg_sys::index_getnext_slot(self.scan, pg_sys::ScanDirection::ForwardScanDirection, self.slot);
            let row = Row { slot: self.slot };
            self.seq = found.then(|| row.get(column::SEQ)).flatten().map(|seq| seq.value() as i64);
        }
    }

    fn end(self) {
        // SAFETY: closes what `begin` opened.
        unsafe {
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            pg_sys::index_endscan(self.scan);
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
            pg_sys::index_close(self.index, lock);
            pg_sys::table_close(self.table, lock);
        }
    }
}

#[cfg(not(feature = "pg18"))]
unsafe fn begin_index_scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
) -> pg_sys::IndexScanDesc {
    // SAFETY: by the caller: open relations and a registered snapshot.
    unsafe { pg_sys::index_beginscan(table, index, snapshot, 1, 0) }
}

#[cfg(feature = "pg18")]
unsafe fn begin_index_scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
) -> pg_sys::IndexScanDesc {
    // SAFETY: by the caller: open relations and a registered snapshot; no instrumentation.
    unsafe { pg_sys::index_beginscan(table, index, snapshot, std::ptr::null_mut(), 1, 0) }
}
