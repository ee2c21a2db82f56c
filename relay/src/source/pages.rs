// SPDX-License-Identifier: PostgreSQL
//! Reading the log: cursors to begin at, pages of events, and events that are parked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dtm_core::page::{Event, Page};
use futures_util::future::{BoxFuture, FutureExt as _};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinError;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Statement};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::cursors::Owner;
use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;
use super::settlement::Parked;

/// Where a subscription goes on.
#[derive(Debug)]
pub struct StoredCursor {
    /// Everything before it is settled.
    pub position: Arc<Mark>,
    /// The end of the window that was being delivered.
    pub target: Option<Arc<Mark>>,
    /// Up to this sequence number that window is settled.
    pub acked: i64,
    /// Beyond that, the sequence numbers of what is delivered already.
    pub ahead: Vec<i64>,
    /// See [`super::cursors::Cursor`].
    pub windows: Vec<Uuid>,
}

/// What is known of a subscription when it begins.
#[derive(Debug)]
pub struct Resumed {
    /// Where it goes on.
    pub cursor: StoredCursor,
    /// All eras that the log has, oldest first. They are read with the cursor: those of a restore can come while a session lasts.
    pub eras: Arc<[i32]>,
    /// What of it is parked.
    pub parked: Vec<Parked>,
}

/// A subscription, or a shard of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// The subscription's id.
    pub subscription: i64,
    /// Which shard of it …
    pub shard: i32,
    /// … of so many.
    pub shards: i32,
}

/// Which events are wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Whose they are.
    pub unit: Unit,
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

/// The statement that reads a page.
pub(super) const PAGE: &str = "SELECT dtm.relay_page($1, $2, $3, $4, $5, $6, $7, $8, $9)";

/// Reads a page over a connection. Answers how many bytes of memory its events share, too.
pub(super) async fn read_page(
    link: &Link,
    page: &Statement,
    request: &PageRequest,
    wanted: &Wanted,
) -> Result<(Page, usize), SourceError> {
    let PageRequest { from, to, after, max_rows, max_bytes } = request;
    let Wanted { unit, topics, since } = wanted;
    let what = "reading a page";
    let row = link
        .query_one(
            what,
            page,
            &[&from.text(), &to.text(), after, topics, since, max_rows, max_bytes, &unit.shard, &unit.shards],
        )
        .await?;
    decode(what, &row)
}

fn decode(what: &'static str, row: &Row) -> Result<(Page, usize), SourceError> {
    let bytes = Bytes::copy_from_slice(row.get(0));
    let size = bytes.len();
    let page =
        Page::decode(bytes).map_err(|error| SourceError::Answer { what, problem: error.to_string() })?;
    Ok((page, size))
}

struct Reader {
    link: Link,
    page: Statement,
    cursor: Statement,
    parked: Statement,
    parked_events: Statement,
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
            let page = link.prepare("preparing to read pages", PAGE).await?;
            let cursor =
                "SELECT \"position\", target, acked, ahead, eras, windows FROM dtm.relay_resume($1, $2, $3)";
            let cursor = link.prepare("preparing to read cursors", cursor).await?;
            let what = "preparing to read parked events";
            let parked =
                "SELECT seq, key, bytes, attempts, next_in, blocks FROM dtm.relay_parked($1, $2, $3)";
            let parked = link.prepare(what, parked).await?;
            let parked_events = link.prepare(what, "SELECT dtm.relay_parked_events($1, $2)").await?;
            readers.push(Reader { link, page, cursor, parked, parked_events });
        }
        Ok(Pages { idle: Mutex::new(readers), places })
    }

    /// Where a subscription goes on; `None` if it has no cursor, which must not be.
    pub async fn resume(&self, unit: Unit, epoch: i64) -> Result<Option<Resumed>, SourceError> {
        let what = "reading a cursor";
        let Unit { subscription, shard, shards } = unit;
        let reader = self.take().await?;
        let rows = reader.link.query(what, &reader.cursor, &[&subscription, &shard, &epoch]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let target = row.get::<_, Option<String>>(1).map(|text| Mark::parse(what, text)).transpose()?;
        let position = Mark::parse(what, row.get(0))?;
        let ahead = row.get::<_, Option<Vec<i64>>>(3).unwrap_or_default();
        let windows = row.get::<_, Option<Vec<Uuid>>>(5).unwrap_or_default();
        let cursor = StoredCursor { position, target, acked: row.get(2), ahead, windows };
        let eras = row.get::<_, Vec<i32>>(4).into();
        let what = "reading what is parked";
        let rows = reader.link.query(what, &reader.parked, &[&subscription, &shard, &shards]).await?;
        Ok(Some(Resumed { cursor, eras, parked: rows.iter().map(parked).collect() }))
    }

    /// Reads a page, also while nobody waits for it: the database works while what was read before is being sent. Answers how
    /// many bytes of memory its events share, too.
    pub fn read(
        self: &Arc<Self>,
        request: PageRequest,
        wanted: &Arc<Wanted>,
    ) -> BoxFuture<'static, Result<(Page, usize), SourceError>> {
        let (this, wanted) = (self.clone(), wanted.clone());
        let task = tokio::spawn(async move {
            let reader = this.take().await?;
            read_page(&reader.link, &reader.page, &request, &wanted).await
        });
        let failed = |error: JoinError| SourceError::Unreachable(format!("reading a page failed: {error}"));
        AbortOnDropHandle::new(task).map(move |read| read.unwrap_or_else(|error| Err(failed(error)))).boxed()
    }

    /// Reads parked events, those of them that are still there; and how many bytes of memory they share.
    pub async fn parked_events(&self, unit: Unit, seqs: &[i64]) -> Result<(Vec<Event>, usize), SourceError> {
        let what = "reading parked events";
        let reader = self.take().await?;
        let row = reader.link.query_one(what, &reader.parked_events, &[&unit.subscription, &seqs]).await?;
        let (page, bytes) = decode(what, &row)?;
        Ok((page.events, bytes))
    }

    /// Nothing more is delivered of a subscription, until somebody resumes it. False: somebody has locked it, or it is not
    /// this owner's to disable, or not active.
    pub async fn disable(&self, owner: &Owner, reason: &str) -> Result<bool, SourceError> {
        let Owner { subscription, shard, epoch, token, .. } = owner;
        let reader = self.take().await?;
        let sql = "SELECT dtm.relay_disable($1, $2, $3, $4, $5)";
        let parameters: [&(dyn ToSql + Sync); 5] = [subscription, epoch, token, shard, &reason];
        Ok(reader.link.query_one("disabling a subscription", sql, &parameters).await?.get(0))
    }

    async fn take(&self) -> Result<Taken<'_>, SourceError> {
        let closed = || SourceError::Unreachable("the session has ended".into());
        let place = self.places.acquire().await.map_err(|_| closed())?;
        let reader = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or_else(closed)?;
        Ok(Taken { pages: self, reader: Some(reader), _place: place })
    }
}

fn parked(row: &Row) -> Parked {
    let next_in = row.get::<_, Option<f64>>(4);
    Parked {
        seq: row.get(0),
        key: row.get::<_, Option<String>>(1).map(Into::into),
        bytes: usize::try_from(row.get::<_, i32>(2)).unwrap_or(0),
        attempts: u32::try_from(row.get::<_, i32>(3)).unwrap_or(0),
        next_in: next_in.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()),
        blocks: row.get(5),
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
