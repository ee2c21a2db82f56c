// SPDX-License-Identifier: PostgreSQL
//! `dtm.relay_parked_events`: events that wait to be tried again, as a page.

use dtm_core::page::{EventRef, PageWriter};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::spi::{self, Spi, SpiHeapTupleData};

use crate::refusal::Refusal;

/// Texts as they go into a page: in UTF-8, whatever the database's encoding.
const ROWS: &str = "SELECT r.seq, (extract(epoch FROM r.published_at) * 1000000)::bigint, uuid_send(r.id), \
     convert_to(r.topic, 'UTF8'), convert_to(r.key, 'UTF8'), convert_to(r.content_type, 'UTF8'), \
     convert_to(r.headers, 'UTF8'), r.payload \
     FROM dtm.retry r WHERE r.subscription = $1 AND r.seq = ANY ($2) ORDER BY r.n";

#[pg_extern]
fn relay_parked_events(subscription: i64, seqs: Vec<i64>) -> Result<Vec<u8>, ErrorReport> {
    let mut page = PageWriter::default();
    Spi::connect(|client| {
        for row in client.select(ROWS, None, &[subscription.into(), seqs.into()])? {
            add(&row, &mut page)?;
        }
        Ok(())
    })
    .map_err(unreadable)?;
    Ok(page.finish(0, true))
}

fn add(row: &SpiHeapTupleData<'_>, page: &mut PageWriter) -> spi::Result<()> {
    let id = row.get::<&[u8]>(3)?.and_then(|id| id.try_into().ok());
    if let (Some(seq), Some(published_at_us), Some(id), Some(topic)) =
        (row.get(1)?, row.get(2)?, id, row.get(4)?)
    {
        page.push(EventRef {
            seq,
            published_at_us,
            id,
            topic,
            key: row.get(5)?,
            content_type: row.get(6)?,
            headers: row.get(7)?,
            payload: row.get(8)?,
        });
    }
    Ok(())
}

/// PostgreSQL's own errors pass by this: it is for a table that is not as 08-retries.sql makes it.
fn unreadable(error: spi::Error) -> ErrorReport {
    let code = PgSqlErrorCode::ERRCODE_DATA_CORRUPTED;
    let hint = "Restore it from a backup, or drop the extension and create it anew.";
    Refusal::new(code, "dtm.retry cannot be read", format!("{error}."), hint).into()
}
