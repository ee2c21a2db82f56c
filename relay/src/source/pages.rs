// SPDX-License-Identifier: PostgreSQL
//! Reading the log: cursors to begin at, and pages of events.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use dtm_core::page::Page;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_postgres::Statement;

use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;

/// Where a subscription goes on.
#[derive(Debug)]
pub struct StoredCursor {
    /// Everything before it is delivered.
    pub position: Arc<Mark>,
    /// The end of the window that was being delivered.
    pub target: Option<Arc<Mark>>,
    /// Up to this sequence number that window is delivered.
    pub acked: i64,
}

/// Which events are wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Patterns.
    pub topics: Vec<String>,
    /// Events published before are passed over.
    pub since: Option<SystemTime>,
}

/// A piece of a window.
#[derive(Clone, Debug)]
pub struct PageRequest {
    /// The window's beginning.
    pub from: Arc<Mark>,
    /// The window's end.
    pub to: Arc<Mark>,
    /// The page begins after this sequence number.
    pub after: i64,
    /// The most events that it may have.
    pub max_rows: i32,
    /// When it has this many bytes it ends; the last event may go beyond.
    pub max_bytes: i32,
}

struct Reader {
    link: Link,
    page: Statement,
    cursor: Statement,
}

/// Some connections that read for all pipelines of a database: a long look back holds up one of them only.
pub struct Pages {
    idle: Mutex<Vec<Reader>>,
    places: Semaphore,
}

impl Pages {
    /// Prepares the connections.
    pub async fn new(links: Vec<Link>) -> Result<Self, SourceError> {
        let places = Semaphore::new(links.len());
        let mut readers = Vec::with_capacity(links.len());
        for link in links {
            let page = "SELECT dtm.relay_page($1, $2, $3, $4, $5, $6, $7)";
            let page = link.prepare("preparing to read pages", page).await?;
            let cursor = "SELECT \"position\", target, acked FROM dtm.relay_cursor($1, $2, $3)";
            let cursor = link.prepare("preparing to read cursors", cursor).await?;
            readers.push(Reader { link, page, cursor });
        }
        Ok(Pages { idle: Mutex::new(readers), places })
    }

    /// Where a subscription goes on; `None` if it has no cursor, which must not be.
    pub async fn cursor(
        &self,
        subscription: i64,
        shard: i32,
        epoch: i64,
    ) -> Result<Option<StoredCursor>, SourceError> {
        let what = "reading a cursor";
        let reader = self.take().await?;
        let rows = reader.link.query(what, &reader.cursor, &[&subscription, &shard, &epoch]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let target = row.get::<_, Option<String>>(1).map(|text| Mark::parse(what, text)).transpose()?;
        Ok(Some(StoredCursor { position: Mark::parse(what, row.get(0))?, target, acked: row.get(2) }))
    }

    /// Reads a page. Answers how many bytes of memory its events share, too.
    pub async fn read(&self, request: &PageRequest, wanted: &Wanted) -> Result<(Page, usize), SourceError> {
        let what = "reading a page";
        let PageRequest { from, to, after, max_rows, max_bytes } = request;
        let row = {
            let reader = self.take().await?;
            let Wanted { topics, since } = wanted;
            reader
                .link
                .query_one(
                    what,
                    &reader.page,
                    &[&from.text(), &to.text(), after, topics, since, max_rows, max_bytes],
                )
                .await?
        };
        let bytes = Bytes::copy_from_slice(row.get(0));
        let size = bytes.len();
        let page =
            Page::decode(bytes).map_err(|error| SourceError::Answer { what, problem: error.to_string() })?;
        Ok((page, size))
    }

    async fn take(&self) -> Result<Taken<'_>, SourceError> {
        let closed = || SourceError::Unreachable("the session has ended".into());
        let place = self.places.acquire().await.map_err(|_| closed())?;
        let reader = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or_else(closed)?;
        Ok(Taken { pages: self, reader: Some(reader), _place: place })
    }
}

/// A connection in use; it goes back when dropped, also by a pipeline that stops while it waits. An answer that nobody
/// waits for any more is passed over by the driver.
struct Taken<'a> {
    pages: &'a Pages,
    reader: Option<Reader>,
    _place: SemaphorePermit<'a>,
}

impl std::ops::Deref for Taken<'_> {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        self.reader.as_ref().expect("it is there until dropped")
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let idle = self.pages.idle.lock();
        idle.unwrap_or_else(PoisonError::into_inner).extend(self.reader.take());
    }
}
