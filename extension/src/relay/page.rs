// SPDX-License-Identifier: PostgreSQL
//! `dtm.relay_page`: the next events of a window.

use dtm_core::page::{EventRef, PageWriter};
use dtm_core::position::Position;
use dtm_core::shard::shard_of;
use dtm_core::topic::Matcher;
use dtm_core::window::Window;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::log::scan::{Row, Scan, column};
use crate::log::state;
use crate::refusal::Refusal;
use crate::varlena;

/// Rows that one call looks at at the most: it answers in bounded time also where nothing matches.
const SCANNED_ROWS_MAX: u32 = 50_000;

const UNIX_TO_POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// What a row must be to go into the page.
struct Wanted<'a> {
    era: i32,
    window: Window<'a>,
    topics: Matcher<()>,
    since: Option<i64>,
    shard: i32,
    shards: i32,
}

#[pg_extern]
fn relay_page(
    from: &str,
    to: &str,
    after: i64,
    topics: Vec<String>,
    since: Option<TimestampWithTimeZone>,
    max_rows: i32,
    max_bytes: i32,
) -> Result<Vec<u8>, ErrorReport> {
    relay_page_of_shard(from, to, after, topics, since, max_rows, max_bytes, 0, 1)
}

#[pg_extern]
#[allow(clippy::too_many_arguments)] // they are SQL's
fn relay_page_of_shard(
    from: &str,
    to: &str,
    after: i64,
    topics: Vec<String>,
    since: Option<TimestampWithTimeZone>,
    max_rows: i32,
    max_bytes: i32,
    shard: i32,
    shards: i32,
) -> Result<Vec<u8>, ErrorReport> {
    let malformed = |detail: String| -> ErrorReport {
        Refusal::argument("malformed request for a page", detail, "Use a relay of a matching version.").into()
    };
    let from = Position::parse(from).map_err(|error| malformed(format!("{error}.")))?;
    let to = Position::parse(to).map_err(|error| malformed(format!("{error}.")))?;
    let window =
        Window::new(&from, &to).ok_or_else(|| malformed("The positions are of different eras.".into()))?;
    let mut matcher = Matcher::default();
    for topic in &topics {
        matcher.insert(topic, ()).map_err(|error| malformed(format!("A topic pattern: {error}.")))?;
    }
    if !(0..shards).contains(&shard) {
        return Err(malformed(format!("There is no shard {shard} of {shards}.")));
    }
    if max_rows < 1 || max_bytes < 1 {
        return Err(malformed("max_rows and max_bytes must be positive.".into()));
    }
    let since = since.map(pg_sys::TimestampTz::from);
    let wanted = Wanted { era: from.era, window, topics: matcher, since, shard, shards };
    Ok(read(&wanted, after, max_rows as usize, max_bytes as usize))
}

fn read(wanted: &Wanted<'_>, after: i64, rows_max: usize, bytes_max: usize) -> Vec<u8> {
    let mut page = PageWriter::default();
    let mut scanned = after.max(wanted.window.low());
    let mut done = false;
    let mut scan = Scan::above(scanned, &state::get());
    for _ in 0..SCANNED_ROWS_MAX {
        match scan.next() {
            Some((seq, row)) if seq <= wanted.window.top() => {
                scanned = seq;
                // SAFETY: the scan stands on this row.
                unsafe { wanted.add(seq, row, &mut page) };
            }
            _ => {
                done = true;
                break;
            }
        }
        if page.len() >= rows_max || page.len_bytes() >= bytes_max {
            break;
        }
    }
    scan.end();
    page.finish(scanned, done)
}

impl Wanted<'_> {
    /// Adds a row to the page if it belongs there. Cheap tests first: most of what is passed over is never unpacked.
    ///
    /// # Safety
    /// The scan that answered the row still stands on it.
    unsafe fn add(&self, seq: i64, row: Row, page: &mut PageWriter) {
        // SAFETY: by this function's contract; the columns have the types of 02-log.sql, and those up to the topic are
        // never null.
        unsafe {
            let not_null = |column| row.get(column).map_or(0, |datum| datum.value());
            if !self.window.contains(not_null(column::XID) as u64) || not_null(column::ERA) as i32 != self.era
            {
                return;
            }
            let published_at = not_null(column::PUBLISHED_AT) as i64;
            if self.since.is_some_and(|since| published_at < since) {
                return;
            }
            let Some(topic) = row.get(column::TOPIC).map(|topic| varlena::bytes(topic)) else { return };
            let topic_text = str::from_utf8(topic).unwrap_or_default();
            if !self.topics.is_match(topic_text) {
                return;
            }
            let text = |column| row.get(column).map(|datum| varlena::to_utf8(varlena::bytes(datum)));
            let key = text(column::KEY);
            if shard_of(key, seq, self.shards) != self.shard {
                return;
            }
            let Some(id) = row.get(column::ID) else { return };
            page.push(EventRef {
                seq,
                published_at_us: published_at + UNIX_TO_POSTGRES_EPOCH_US,
                id: &*id.cast_mut_ptr::<[u8; 16]>(),
                topic,
                key,
                content_type: text(column::CONTENT_TYPE),
                headers: text(column::HEADERS),
                payload: row.get(column::PAYLOAD).map(|payload| varlena::bytes(payload)),
            });
        }
    }
}
