// SPDX-License-Identifier: PostgreSQL
//! Reading transactions that have not ended, with their payloads, within what memory there is for those.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_postgres::Row;

use super::asking::{Asked, BATCH, next, persist, prepared};
use super::error::SourceError;
use super::link::Link;

/// Bytes of payloads that are held at a time, beside one message whatever its size.
const ROOM: usize = 32 << 20;
/// A transaction that has not ended, as it is stored.
#[derive(Debug)]
pub struct Found {
    /// See there.
    pub gid: String,
    /// DTM's name of its kind.
    pub trans_type: String,
    /// See `Status`.
    pub status: String,
    /// A JSON array.
    pub branches: String,
    /// Of each branch.
    pub payloads: Vec<Option<Vec<u8>>>,
    /// Who is asked whether it is committed.
    pub query_prepared: Option<String>,
    /// A JSON object.
    pub options: String,
    /// In seconds, since it was made.
    pub age: f64,
    /// Passes that failed since it last got ahead.
    pub failures: u32,
    /// It was prepared too long ago for anybody to be asked.
    pub undecidable: bool,
    /// It has a row in dtm.due.
    pub waits: bool,
    /// What dtm.branch has of it: a JSON array.
    pub known: Option<String>,
    /// The room that its payloads take, for as long as they are held.
    pub room: OwnedSemaphorePermit,
}

/// Answers who asks for a transaction. `None`: it has ended, or waits for a decision.
pub async fn find(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<String, Option<Found>>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "reading transactions";
    let columns = "gid, trans_type, status, branches, payloads, payload_bytes, query_prepared, options, age, failures, undecidable, waits, known";
    let sql = format!("SELECT {columns} FROM dtm.relay_transactions($1, $2)");
    let mut statement = None;
    let room = Room::default();
    // Those for whose payloads there was no room.
    let mut waiting = Vec::new();
    loop {
        let mut questions = std::mem::take(&mut waiting);
        if questions.is_empty() {
            questions = next(&mut asked).await;
        }
        // Whoever asks for little does not wait for those who wait for much.
        while questions.len() < BATCH
            && let Ok(question) = asked.try_recv()
        {
            questions.push(question);
        }
        let gids: Vec<&str> = questions.iter().map(|(gid, _)| gid.as_str()).collect();
        let statement = prepared(link, WHAT, &sql, &mut statement).await?;
        let rows = persist(link, WHAT, statement, &[&gids, &room.free()]).await?;
        let mut found: HashMap<&str, &Row> = rows.iter().map(|row| (row.get(0), row)).collect();
        let (count, mut least) = (questions.len(), i32::MAX);
        for (gid, answers) in questions {
            let Some(row) = found.remove(gid.as_str()) else {
                let _ = answers.send(None);
                continue;
            };
            let bytes: i32 = row.get("payload_bytes");
            let taken = row.get::<_, Option<_>>("payloads").zip(room.take(bytes));
            match taken {
                Some((payloads, room)) => drop(answers.send(Some(read(gid, row, payloads, room)))),
                None => {
                    least = least.min(bytes);
                    waiting.push((gid, answers));
                }
            }
        }
        if waiting.len() == count {
            tokio::select! {
                () = room.wait_for(least) => {}
                question = asked.recv(), if waiting.len() < BATCH => waiting.extend(question),
            }
        }
    }
}

/// What payloads may take, and a place for one that is greater.
struct Room {
    bytes: Arc<Semaphore>,
    beside: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Self {
        Room { bytes: Arc::new(Semaphore::new(ROOM)), beside: Arc::new(Semaphore::new(1)) }
    }
}

impl Room {
    fn free(&self) -> i32 {
        i32::try_from(self.bytes.available_permits()).unwrap_or(i32::MAX)
    }

    fn take(&self, bytes: i32) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(0);
        let taken = self.bytes.clone().try_acquire_many_owned(bytes);
        taken.or_else(|_| self.beside.clone().try_acquire_owned()).ok()
    }

    /// Waits until there may be room for so much.
    async fn wait_for(&self, bytes: i32) {
        let bytes = u32::try_from(bytes).unwrap_or(0).min(ROOM as u32);
        tokio::select! {
            taken = self.bytes.acquire_many(bytes) => drop(taken),
            taken = self.beside.acquire() => drop(taken),
        }
    }
}

fn read(gid: String, row: &Row, payloads: Vec<Option<Vec<u8>>>, room: OwnedSemaphorePermit) -> Found {
    Found {
        gid,
        trans_type: row.get("trans_type"),
        status: row.get("status"),
        branches: row.get("branches"),
        payloads,
        query_prepared: row.get("query_prepared"),
        options: row.get("options"),
        age: row.get("age"),
        failures: u32::try_from(row.get::<_, i32>("failures")).unwrap_or(0),
        undecidable: row.get("undecidable"),
        waits: row.get("waits"),
        known: row.get("known"),
        room,
    }
}
