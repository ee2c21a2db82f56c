// SPDX-License-Identifier: PostgreSQL
//! Events that reach Kafka exactly once: what one writer of a subscription does.
//!
//! A window is first stored in PostgreSQL, under an id that is drawn at random. Each batch of its events is a transaction of
//! Kafka, which also writes the window's id and how far in it the batch comes. PostgreSQL's cursor follows; where the two
//! differ when a relay begins, Kafka knows better, as long as it speaks of a window that PostgreSQL knows. What Kafka refuses
//! is a dead letter before the others of its batch go on without it.

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use dtm_core::page::{Event, Page};
use futures_util::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use super::budget::Room;
use super::delivery::LaneName;
use super::reader::{FlowProgress, Piece, Reader};
use super::reconcile::reconcile;
use super::run::{Pipeline, session_over};
use super::windows::{Ahead, Ticket};
use super::writers::{Ended, Next};
use crate::calls::outcome::Outcome;
use crate::kafka::position::Position;
use crate::kafka::transactions::NotCommitted;
use crate::sink::kafka::KafkaSink;
use crate::sink::kafka_once::OnceWriter;
use crate::source::cursors::Cursor;
use crate::source::error::SourceError;
use crate::source::mark::Mark;
use crate::source::pages::{PageRequest, Resumed};
use crate::source::settlement::{Attempt, Leave, Parked, Settlement};

/// Events of a transaction at the most.
const BATCH_EVENTS: i32 = 10_000;
/// While each record is a request of its own.
const SINGLE_EVENTS: i32 = 200;
/// Their bytes, about.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Parked events of a transaction at the most.
const PARKED_AT_ONCE: usize = 100;
/// After there was no room for a page.
const ROOM_AGAIN: Duration = Duration::from_millis(20);

/// A page that is being read.
struct Reading {
    piece: Piece,
    room: Room,
    page: BoxFuture<'static, Result<(Page, usize), SourceError>>,
}

/// Waits until something may be written.
async fn leased(pipeline: &mut Pipeline) -> Result<(), Ended> {
    loop {
        if Instant::now() < *pipeline.valid_until.borrow_and_update() {
            return Ok(());
        }
        tokio::select! {
            changed = pipeline.valid_until.changed() => changed.map_err(|_| session_over())?,
            () = pipeline.drain.cancelled() => return Err(Ended::Stopped),
            () = pipeline.owner.fenced.cancelled() => return Err(Ended::Stopped),
        }
    }
}

fn settlement(seq: i64, what: Leave, outcome: Option<&Outcome>) -> Settlement {
    let history: Vec<Attempt> =
        outcome.map(|outcome| Attempt::new(jiff::Timestamp::now(), outcome)).into_iter().collect();
    Settlement { seq, what, attempts: history.len() as u32, history, next: None }
}

/// One writer's time.
pub(super) struct Once<'a> {
    pipeline: &'a mut Pipeline,
    writer: OnceWriter,
    /// So many transactions are to be of records in batches of their own; none: not so.
    singles: usize,
    reader: Reader,
    progress: FlowProgress,
    /// The window before the last, and the last; see [`Cursor`].
    windows: Vec<Uuid>,
    /// Something may have been committed in the last one.
    is_used: bool,
    /// Events beyond the cursor that are settled in another way: the log still brings them.
    settled: BTreeSet<i64>,
    /// Parked when it began: after the number of shards was changed the log can bring some of them once more.
    known: HashSet<i64>,
    /// The end of the last one, while it is being delivered.
    open: Option<Arc<Mark>>,
    parked: Vec<Parked>,
    /// Transactions so far.
    pub(super) committed: usize,
    /// A broker has refused a record: the producer's numbers have a gap, and it is of no more use.
    is_spent: bool,
}

impl<'a> Once<'a> {
    /// `singles`: so many transactions are to be of records in batches of their own.
    pub(super) async fn begin(
        pipeline: &'a mut Pipeline,
        sink: Arc<KafkaSink>,
        singles: usize,
    ) -> Result<Self, Ended> {
        leased(pipeline).await?;
        let (unit, epoch) = (pipeline.wanted.unit, pipeline.owner.epoch);
        let no_cursor = || Ended::again("it has no cursor; dtm.rewind sets one");
        let before = pipeline.pages.resume(unit, epoch).await?.ok_or_else(no_cursor)?;
        let era = before.eras.last().copied().unwrap_or_default();
        let name = format!("dtm-{:08x}-{}-{}", era.cast_unsigned(), unit.subscription, unit.shard);
        let begun = tokio::select! {
            begun = OnceWriter::begin(sink, &name, singles > 0) => begun,
            () = pipeline.drain.cancelled() => return Err(Ended::Stopped),
            () = pipeline.owner.fenced.cancelled() => return Err(Ended::Stopped),
        };
        let (writer, position) = begun.map_err(Ended::again)?;
        // After the writer has begun: what an earlier one has moved is stored or never will be.
        let stored = pipeline.pages.resume(unit, epoch).await?;
        let Resumed { mut cursor, eras, parked } = stored.ok_or_else(no_cursor)?;
        let done = reconcile(&mut cursor, position, epoch, &pipeline.name);
        let windows = cursor.windows.clone();
        let open = cursor.target.clone().filter(|_| !windows.is_empty());
        let settled: BTreeSet<i64> = std::mem::take(&mut cursor.ahead).into_iter().collect();
        let known = parked.iter().map(|row| row.seq).collect();
        let (reader, progress) = Reader::new(cursor, Ahead::delivered([]), eras)
            .map_err(|error| Ended::again(error.to_string()))?;
        let (done, parked): (Vec<Parked>, Vec<Parked>) =
            parked.into_iter().filter(|row| !row.blocks).partition(|row| done.contains(&row.seq));
        let once = Once {
            pipeline,
            writer,
            singles,
            reader,
            progress,
            windows,
            is_used: true,
            settled,
            known,
            open,
            parked,
            committed: 0,
            is_spent: false,
        };
        once.store(done.iter().map(|row| settlement(row.seq, Leave::Done, None)).collect()).await?;
        Ok(once)
    }

    /// Delivers until the writer is given up.
    pub(super) async fn deliver(&mut self) -> Result<Infallible, Ended> {
        let mut parked = std::mem::take(&mut self.parked).into_iter().peekable();
        while let Some(first) = parked.next() {
            let (mut seqs, mut bytes) = (vec![first.seq], first.bytes);
            while seqs.len() < PARKED_AT_ONCE
                && let Some(next) = parked.next_if(|next| bytes + next.bytes <= BATCH_BYTES)
            {
                seqs.push(next.seq);
                bytes += next.bytes;
            }
            self.deliver_parked(&seqs).await?;
        }
        let mut next: Option<Reading> = None;
        loop {
            if self.singles > 0 && self.committed >= self.singles {
                self.store(Vec::new()).await?;
                return Err(Ended::Again { why: None, next: Next::Batches });
            }
            let Some(reading) = next.take() else {
                next = self.read_on().await?;
                continue;
            };
            let Reading { piece, room, page } = reading;
            let (page, bytes) = self.read(page).await?;
            let held = self.pipeline.share.hold(room, bytes);
            let from = self.progress.frontier().position;
            let (mut tickets, mut events) = (Vec::new(), Vec::new());
            let seqs: Vec<i64> = page.events.iter().map(|event| event.seq).collect();
            for event in page.events {
                let Some(ticket) = self.progress.push(event.seq, LaneName::Own(event.seq)) else { continue };
                if self.settled.contains(&event.seq) || self.known.contains(&event.seq) {
                    self.progress.ack(ticket);
                } else {
                    tickets.push(ticket);
                    events.push(event);
                }
            }
            self.progress.scanned(page.scanned, page.done);
            self.reader.read(page.scanned, page.done);
            if !page.done {
                // The window's next page comes while this one is written.
                next = self.begin_to_read();
            }
            if !(events.is_empty() && page.done) {
                self.open(&piece, from).await?;
            }
            let covers = events.len();
            self.write(tickets, events).await?;
            drop(held);
            self.progress.advance(&mut Vec::new());
            // The cursor is past them.
            for seq in seqs {
                self.settled.remove(&seq);
            }
            if page.done {
                self.open = None;
            }
            self.pipeline.cursors.moved(&self.pipeline.owner, self.cursor(), Vec::new(), covers);
        }
    }

    /// The next piece of the log, as soon as there is one.
    async fn read_on(&mut self) -> Result<Option<Reading>, Ended> {
        leased(self.pipeline).await?;
        let reading = self.begin_to_read();
        if reading.is_some() {
            return Ok(reading);
        }
        let head = self.pipeline.heads.borrow_and_update().clone();
        let lacks_room = self.reader.next(head.as_ref(), &mut self.progress).is_some();
        tokio::select! {
            changed = self.pipeline.heads.changed(), if !lacks_room => changed.map_err(|_| session_over())?,
            () = tokio::time::sleep(ROOM_AGAIN), if lacks_room => {}
            () = self.pipeline.drain.cancelled() => return Err(self.stopped().await),
            () = self.pipeline.owner.fenced.cancelled() => return Err(Ended::Stopped),
        }
        Ok(None)
    }

    /// Begins to read the next piece, if there is one, and room for it.
    fn begin_to_read(&mut self) -> Option<Reading> {
        let head = self.pipeline.heads.borrow_and_update().clone();
        let piece = self.reader.next(head.as_ref(), &mut self.progress)?;
        let room = self.pipeline.share.room(BATCH_BYTES)?;
        let max_bytes = i32::try_from(room.bytes()).unwrap_or(i32::MAX);
        let (from, to, after) = (piece.from.clone(), piece.to.clone(), piece.after);
        let max_rows = if self.singles > 0 { SINGLE_EVENTS } else { BATCH_EVENTS };
        let request = PageRequest { from, to, after, max_rows, max_bytes };
        let page = self.pipeline.pages.read(request, &self.pipeline.wanted);
        Some(Reading { piece, room, page })
    }

    async fn read(
        &mut self,
        page: BoxFuture<'static, Result<(Page, usize), SourceError>>,
    ) -> Result<(Page, usize), Ended> {
        tokio::select! {
            read = page => Ok(read?),
            () = self.pipeline.drain.cancelled() => Err(self.stopped().await),
            () = self.pipeline.owner.fenced.cancelled() => Err(Ended::Stopped),
        }
    }

    /// Before anything of a window is written, PostgreSQL knows it.
    async fn open(&mut self, piece: &Piece, from: Arc<Mark>) -> Result<(), Ended> {
        if self.open.is_some() {
            return Ok(());
        }
        // One in which nothing was committed is not what Kafka's position speaks of.
        let known = if self.is_used { self.windows.last() } else { self.windows.first() };
        let known = known.copied().filter(|_| self.is_used || self.windows.len() > 1);
        self.windows = known.into_iter().chain([Uuid::new_v4()]).collect();
        self.is_used = false;
        self.open = Some(piece.to.clone());
        let cursor = Cursor { position: from, ..self.cursor() };
        self.store_cursor(cursor, Vec::new()).await
    }

    /// Writes a batch of the window that is open, but for what Kafka refuses.
    async fn write(&mut self, mut tickets: Vec<Ticket>, events: Vec<Event>) -> Result<(), Ended> {
        let mut events = Arc::new(events);
        while let Some(last) = events.last() {
            let position = self.position(last.seq, Vec::new());
            let Some(refused) = self.commit(&events, position).await? else {
                tickets.iter().for_each(|ticket| self.progress.ack(*ticket));
                return Ok(());
            };
            // They are dead letters before anything that comes after them is written.
            self.bury(&events, &refused, Leave::Bury).await?;
            let (gone, kept): (Vec<usize>, Vec<usize>) =
                (0..events.len()).partition(|at| refused.iter().any(|(number, _)| number == at));
            gone.iter().for_each(|&at| self.progress.ack(tickets[at]));
            tickets = kept.iter().map(|&at| tickets[at]).collect();
            events = Arc::new(kept.iter().map(|&at| events[at].clone()).collect());
        }
        Ok(())
    }

    async fn deliver_parked(&mut self, seqs: &[i64]) -> Result<(), Ended> {
        // Those that are missing have been discarded.
        let room = loop {
            leased(self.pipeline).await?;
            match self.pipeline.share.room_in_any_case(BATCH_BYTES) {
                Some(room) => break room,
                None => tokio::time::sleep(ROOM_AGAIN).await,
            }
        };
        let (events, bytes) = self.pipeline.pages.parked_events(self.pipeline.wanted.unit, seqs).await?;
        let _held = self.pipeline.share.hold(room, bytes);
        let mut events = Arc::new(events);
        while !events.is_empty() {
            let done: Vec<i64> = events.iter().map(|event| event.seq).collect();
            let position = self.position(self.progress.frontier().acked, done.clone());
            let Some(refused) = self.commit(&events, position).await? else {
                let done = done.iter().map(|&seq| settlement(seq, Leave::Done, None));
                return self.store(done.collect()).await;
            };
            self.bury(&events, &refused, Leave::Die).await?;
            let is_kept = |at: &usize| refused.iter().all(|(number, _)| number != at);
            events = Arc::new((0..events.len()).filter(is_kept).map(|at| events[at].clone()).collect());
        }
        Ok(())
    }

    /// Answers what of the batch is refused, if anything is.
    async fn commit(
        &mut self,
        events: &Arc<Vec<Event>>,
        position: Position,
    ) -> Result<Option<Vec<(usize, Outcome)>>, Ended> {
        leased(self.pipeline).await?;
        let written = tokio::select! {
            written = self.writer.write(events.clone(), position) => written,
            () = self.given_up() => {
                tracing::warn!(subscription = self.pipeline.name, "a transaction is given up; its successor finds out how it ended");
                return Err(Ended::Stopped);
            }
        };
        match written {
            Ok(()) => {
                self.committed += 1;
                self.is_used = true;
                Ok(None)
            }
            Err(NotCommitted::Unsendable(refused)) => Ok(Some(refused)),
            Err(NotCommitted::Refused(refused)) => {
                self.is_spent = true;
                Ok(Some(refused))
            }
            Err(NotCommitted::SomeRefused) => Err(Ended::Again { why: None, next: Next::Singles }),
            Err(NotCommitted::Fenced) => {
                // If it is another relay's by now, the database says so.
                self.store(Vec::new()).await?;
                Err(Ended::again("another relay has begun to write for this subscription"))
            }
            Err(NotCommitted::Unknown(why)) => Err(Ended::again(why)),
        }
    }

    /// It was asked to end, and has had the time that it may take for that.
    async fn given_up(&self) {
        self.pipeline.drain.cancelled().await;
        tokio::time::sleep(self.pipeline.bounds.drain).await;
    }

    async fn bury(
        &mut self,
        events: &[Event],
        refused: &[(usize, Outcome)],
        how: Leave,
    ) -> Result<(), Ended> {
        for (at, outcome) in refused {
            let (id, topic) = (events[*at].id, &*events[*at].topic);
            tracing::error!(subscription = self.pipeline.name, %id, topic, "an event is a dead letter: {outcome}");
        }
        if how == Leave::Bury {
            self.settled.extend(refused.iter().map(|(at, _)| events[*at].seq));
        }
        let buried = refused.iter().map(|(at, outcome)| settlement(events[*at].seq, how, Some(outcome)));
        self.store(buried.collect()).await?;
        if self.is_spent { Err(Ended::Again { why: None, next: Next::Same }) } else { Ok(()) }
    }

    fn position(&self, last_seq: i64, done: Vec<i64>) -> Position {
        let window = self.windows.last().copied().unwrap_or_default();
        Position { window, epoch: self.pipeline.owner.epoch, last_seq, done }
    }

    fn cursor(&self) -> Cursor {
        let frontier = self.progress.frontier();
        let acked = frontier.acked;
        let ahead = self.settled.iter().copied().collect();
        // A window that is open stays so in the database, also before anything of it is delivered.
        let target = self.open.clone().or(frontier.target);
        Cursor { position: frontier.position, target, acked, ahead, windows: self.windows.clone() }
    }

    /// Stores how far it has come and what became of events, and waits for it.
    async fn store(&self, settlements: Vec<Settlement>) -> Result<(), Ended> {
        self.store_cursor(self.cursor(), settlements).await
    }

    async fn store_cursor(&self, cursor: Cursor, settlements: Vec<Settlement>) -> Result<(), Ended> {
        let Pipeline { cursors, owner, .. } = &*self.pipeline;
        cursors.moved(owner, cursor, settlements, 1);
        tokio::select! {
            () = cursors.barrier(owner) => {}
            () = self.given_up() => return Err(Ended::Stopped),
        }
        if owner.fenced.is_cancelled() { Err(Ended::Stopped) } else { Ok(()) }
    }

    /// The pipeline is asked to end: its last cursor is stored.
    async fn stopped(&mut self) -> Ended {
        self.store(Vec::new()).await.err().unwrap_or(Ended::Stopped)
    }
}
