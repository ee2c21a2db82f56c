// SPDX-License-Identifier: PostgreSQL
//! The task of one pipeline: reads pages, sends events, leaves what is settled to be stored.

use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::{Guarantee, Options};
use dtm_core::page::{Event, Page};
use futures_util::future::{BoxFuture, FutureExt as _, OptionFuture};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::budget::{Room, Share};
use super::delivery::Delivery;
use super::flow::{Flow, ParkingBounds};
use super::verdict::{Judged, Verdict};
use super::windows::Frontier;
use super::writers;
use crate::calls::outcome::Outcome;
use crate::sink::Sink;
use crate::source::cursors::{Cursor, Cursors, Owner};
use crate::source::error::SourceError;
use crate::source::head::Head;
use crate::source::mark::Mark;
use crate::source::pages::{PageRequest, Pages, Resumed, Wanted};
use crate::source::settlement::{Attempt, Leave, Settlement};
use crate::source::tail::Tail;

/// After something that could not be read.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// After there was no room: others may have made some meanwhile.
const ROOM_AGAIN: Duration = Duration::from_millis(100);

/// Before a subscription that somebody else has locked is disabled.
const DISABLE_AGAIN: Duration = Duration::from_secs(1);

/// How often it is told that a subscription cannot be delivered.
pub const TELL_EVERY: Duration = Duration::from_secs(60);

/// A pipeline whose endpoint is down may hold so much of the log; more is forgotten and read again.
const HELD_WHILE_DOWN: usize = 64 * 1024;

/// The bounds of a pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Events that it holds at the most.
    pub events: usize,
    /// Events of a page at the most.
    pub page_events: usize,
    /// Bytes of a page, about.
    pub page_bytes: usize,
    /// What may be parked.
    pub parking: ParkingBounds,
    /// How long it waits for requests in flight when it stops.
    pub drain: Duration,
}

/// What a pipeline works with.
pub struct Pipeline {
    /// The subscription's name, for the log.
    pub name: String,
    /// By which right it moves its cursor.
    pub owner: Owner,
    /// Which events it wants.
    pub wanted: Arc<Wanted>,
    /// The subscription's options.
    pub options: Options,
    /// Where events go.
    pub sink: Sink,
    /// Where pages come from.
    pub pages: Arc<Pages>,
    /// Where they come from at the end of the log.
    pub tail: Arc<Tail>,
    /// The newest head.
    pub heads: watch::Receiver<Head>,
    /// Where what is settled is left.
    pub cursors: Arc<Cursors>,
    /// Until when it may send.
    pub valid_until: watch::Receiver<Instant>,
    /// The memory that it may use.
    pub share: Share,
    /// Its bounds.
    pub bounds: Bounds,
    /// Asks it to stop: nothing new is sent, what is in flight is waited for.
    pub drain: CancellationToken,
}

/// Something that is being read, and the room for it.
struct Reading<T> {
    read: BoxFuture<'static, Result<(T, usize), SourceError>>,
    room: Room,
}

/// What is being read.
#[derive(Default)]
struct Reads {
    page: Option<Reading<Page>>,
    /// Parked events, and which were asked for.
    parked: Option<(Reading<Vec<Event>>, Vec<i64>)>,
    /// Not before this time.
    not_before: Option<Instant>,
    /// Nothing tells when there is room again: it is looked for at this time, if nothing else happens before.
    look_again: Option<Instant>,
    /// There is nothing to read before the head moves.
    at_head: bool,
}

impl Pipeline {
    /// Delivers until it is asked to stop or is fenced. What keeps it from delivering is told again and again, for as long
    /// as it is so. An error is one of the database connection.
    pub async fn run(self) -> Result<(), SourceError> {
        if let (Sink::Kafka(sink), Guarantee::ExactlyOnce) = (&self.sink, self.options.delivery) {
            let sink = sink.clone();
            return writers::run(self, sink).await;
        }
        loop {
            let again_at = match self.pages.resume(self.wanted.unit, self.owner.epoch).await {
                Ok(Some(Resumed { cursor, eras, parked })) => {
                    let (parking, depth) = (self.bounds.parking, self.sink.depth());
                    match Flow::new(cursor, parked, eras, &self.options, parking, depth, Instant::now()) {
                        Ok(flow) => return self.work(flow).await,
                        Err(error) => {
                            let hint = "dtm.rewind gives it a cursor that the database knows";
                            tracing::error!(subscription = self.name, hint, "it is not delivered: {error}");
                            Instant::now() + TELL_EVERY
                        }
                    }
                }
                Ok(None) => {
                    let hint = "dtm.rewind sets one: to 'now', to 'earliest', or to a time";
                    tracing::error!(subscription = self.name, hint, "it has no cursor and is not delivered");
                    Instant::now() + TELL_EVERY
                }
                Err(error) => self.unreadable(error)?,
            };
            tokio::select! {
                () = tokio::time::sleep_until(again_at) => {}
                () = self.drain.cancelled() => return Ok(()),
            }
        }
    }

    async fn work(mut self, mut flow: Flow) -> Result<(), SourceError> {
        let mut in_flight = self.sink.sender();
        let mut reads = Reads::default();
        let mut report = Report::default();
        let mut stop_at: Option<Instant> = None;
        loop {
            // Before anything parked is read: its row has to be on its way.
            self.leave(&mut flow, &mut report, Vec::new());
            let valid_until = *self.valid_until.borrow_and_update();
            in_flight.hold(Instant::now() >= valid_until);
            if stop_at.is_none() {
                self.read_on(&mut flow, &mut reads)?;
                while in_flight.has_room() && Instant::now() < valid_until {
                    let Some(delivery) = flow.next(Instant::now()) else { break };
                    in_flight.send(delivery);
                }
            } else if in_flight.is_empty() {
                break;
            }
            self.leave(&mut flow, &mut report, Vec::new());
            let now = Instant::now();
            let without_lease = now >= valid_until;
            let timer = match stop_at {
                Some(stop_at) => Some(stop_at),
                None => {
                    let due = flow.next_timer(now).filter(|_| !without_lease);
                    let reads = reads.not_before.into_iter().chain(reads.look_again).filter(|at| *at > now);
                    // What waits in a sink must not go when the lease is over.
                    let lease = Some(valid_until).filter(|_| !without_lease && !in_flight.is_empty());
                    due.into_iter().chain(reads).chain(lease).min()
                }
            };
            tokio::select! {
                answers = in_flight.answers(), if !in_flight.is_empty() => {
                    for (delivery, outcome) in answers {
                        if self.settle(&mut flow, delivery, outcome) {
                            return self.disable(&mut flow, &mut report).await;
                        }
                    }
                }
                Some(read) = OptionFuture::from(reads.page.as_mut().map(|reading| &mut reading.read)) => {
                    match (read, reads.page.take()) {
                        (Ok((page, bytes)), Some(reading)) => {
                            flow.read(page, &self.share.hold(reading.room, bytes));
                        }
                        (Ok(_), None) => {}
                        (Err(error), _) => reads.not_before = Some(self.unreadable(error)?),
                    }
                }
                Some(read) = OptionFuture::from(reads.parked.as_mut().map(|(reading, _)| &mut reading.read)) => {
                    match (read, reads.parked.take()) {
                        (Ok((events, bytes)), Some((reading, asked))) => {
                            flow.loaded(&asked, events, &self.share.hold(reading.room, bytes));
                        }
                        (Ok(_), None) => {}
                        (Err(error), _) => {
                            reads.not_before = Some(self.unreadable(error)?);
                            flow.not_loaded();
                        }
                    }
                }
                changed = self.heads.changed(), if reads.at_head => changed.map_err(|_| session_over())?,
                changed = self.valid_until.changed(), if without_lease => changed.map_err(|_| session_over())?,
                () = until(timer), if timer.is_some() => {
                    if stop_at.is_some() {
                        tracing::warn!(subscription = self.name, "{} events on their way are given up", in_flight.len());
                        break;
                    }
                }
                () = self.drain.cancelled(), if stop_at.is_none() => {
                    reads = Reads::default();
                    stop_at = Some(Instant::now() + self.bounds.drain);
                }
                () = self.owner.fenced.cancelled() => {
                    tracing::warn!(subscription = self.name, "its cursor is moved by another relay or was rewound: stopping");
                    return Ok(());
                }
            }
        }
        let ahead = flow.delivered_ahead();
        self.leave(&mut flow, &mut report, ahead);
        self.cursors.barrier(&self.owner).await;
        Ok(())
    }

    /// Begins to read what comes next, if there is room for it and something to read.
    fn read_on(&mut self, flow: &mut Flow, reads: &mut Reads) -> Result<(), SourceError> {
        let now = Instant::now();
        reads.look_again = None;
        let small = self.share.held() <= HELD_WHILE_DOWN;
        if reads.page.is_none() && reads.parked.is_none() && !small && flow.may_unload(now) {
            // The cursor is that of the same pipeline, whose era is known.
            flow.unload(now).map_err(|error| SourceError::Unreachable(error.to_string()))?;
        }
        if reads.not_before.is_some_and(|at| at > now) {
            return Ok(());
        }
        reads.not_before = None;
        if reads.parked.is_none()
            && flow.has_due(now)
            && let Some(room) = self.share.room_in_any_case(self.bounds.page_bytes)
        {
            let asked = flow.load(room.bytes(), now);
            if !asked.is_empty() {
                let (pages, unit, seqs) = (self.pages.clone(), self.wanted.unit, asked.clone());
                let (cursors, owner) = (self.cursors.clone(), self.owner.clone());
                let read = async move {
                    // A row that is not there counts as discarded: it must not be one that is not there yet.
                    cursors.barrier(&owner).await;
                    pages.parked_events(unit, &seqs).await
                }
                .boxed();
                reads.parked = Some((Reading { read, room }, asked));
            }
        }
        if reads.page.is_none() && flow.wants_page(small, now) {
            reads.page = self.next_page(flow, reads, now);
        }
        if reads.page.is_none() {
            flow.has_all_it_gets(now);
        }
        Ok(())
    }

    fn next_page(&mut self, flow: &mut Flow, reads: &mut Reads, now: Instant) -> Option<Reading<Page>> {
        reads.at_head = false;
        let unit = self.wanted.unit;
        loop {
            // What is delivered and not stored comes again after a crash: where storing is held up, that is bounded, too.
            let held_up = self.cursors.held_up(&self.owner, now);
            let free = self.bounds.events.saturating_sub(flow.held() + held_up);
            // While answers come, room is waited for that is worth a page: pages of a few events cost as much as whole ones, and are
            // sent in batches of a few.
            let worth = self.bounds.page_events.min(self.bounds.events / 4).max(1);
            if free < if flow.has_in_flight() { worth } else { 1 } {
                reads.look_again = Some(now + ROOM_AGAIN).filter(|_| held_up > 0);
                return None;
            }
            let Some(room) = self.share.room(self.bounds.page_bytes) else {
                reads.look_again = Some(now + ROOM_AGAIN);
                return None;
            };
            let shared = flow.stands_at().and_then(|position| self.tail.after(position, unit));
            if let Some(shared) = shared {
                let held = self.share.hold(room, shared.bytes);
                flow.read_window(shared.to, shared.events, &held);
                continue;
            }
            let head = self.heads.borrow_and_update().clone();
            let Some(piece) = flow.piece(head.as_ref()) else {
                reads.at_head = true;
                self.tail.waits(unit);
                return None;
            };
            let max_rows = i32::try_from(free.min(self.bounds.page_events)).unwrap_or(i32::MAX);
            let max_bytes = i32::try_from(room.bytes()).unwrap_or(i32::MAX);
            let (from, to, after) = (piece.from, piece.to, piece.after);
            let request = PageRequest { from, to, after, max_rows, max_bytes };
            return Some(Reading { read: self.pages.read(request, &self.wanted), room });
        }
    }

    pub(super) fn unreadable(&self, error: SourceError) -> Result<Instant, SourceError> {
        if !error.spares_connection() {
            return Err(error);
        }
        let seconds = READ_AGAIN.as_secs();
        tracing::error!(subscription = self.name, hint = error.hint(), "{error}; next try in {seconds} s");
        Ok(Instant::now() + READ_AGAIN)
    }

    /// Answers whether the endpoint is gone for good.
    fn settle(&self, flow: &mut Flow, delivery: Delivery, outcome: Outcome) -> bool {
        let (now, attempt) =
            (Instant::now(), |outcome: &Outcome| Attempt::new(jiff::Timestamp::now(), outcome));
        let Some(judged) = flow.settle(delivery, outcome, attempt, now, rand::random()) else { return false };
        let Judged { id, topic, outcome, verdict } = judged;
        let (name, topic) = (self.name.as_str(), &*topic);
        match verdict {
            Verdict::Again(at) => {
                let next_retry_s = (at - now).as_secs_f64();
                tracing::warn!(subscription = name, %id, topic, next_retry_s, "not delivered: {outcome}");
            }
            Verdict::Waits => {
                tracing::debug!(subscription = name, %id, topic, "not delivered, the endpoint is to blame: {outcome}");
            }
            Verdict::Down => {
                tracing::error!(
                    subscription = name,
                    "the endpoint is down, and is tried again until it works: {outcome}"
                );
            }
            Verdict::Dead => tracing::warn!(subscription = name, %id, topic, "not delivered: {outcome}"),
            Verdict::Gone => {
                tracing::error!(
                    subscription = name,
                    "the endpoint is gone for good, the subscription is disabled: {outcome}"
                );
            }
        }
        verdict == Verdict::Gone
    }

    /// The endpoint says that it is gone: what is settled is stored, and nothing more is sent.
    async fn disable(&mut self, flow: &mut Flow, report: &mut Report) -> Result<(), SourceError> {
        let ahead = flow.delivered_ahead();
        self.leave(flow, report, ahead);
        self.cursors.barrier(&self.owner).await;
        // Not while somebody else changes the subscription; if that was it, the relay is told with the next heartbeat.
        while !self.pages.disable(&self.owner, "the endpoint answered 410 Gone").await? {
            tokio::select! {
                () = tokio::time::sleep(DISABLE_AGAIN) => {}
                () = self.drain.cancelled() => break,
            }
        }
        Ok(())
    }

    fn leave(&self, flow: &mut Flow, report: &mut Report, ahead: Vec<i64>) {
        let (frontier, settlements) = flow.take_settled();
        if report.is(&frontier) && settlements.is_empty() && ahead.is_empty() {
            return;
        }
        let is_dead = |settlement: &&Settlement| matches!(settlement.what, Leave::Bury | Leave::Die);
        for Settlement { seq, attempts, .. } in settlements.iter().filter(is_dead) {
            tracing::error!(subscription = self.name, seq, attempts, "an event is a dead letter");
        }
        let before = report.0.as_ref().map_or(frontier.covered, |before| before.covered);
        let covers = usize::try_from(frontier.covered - before).unwrap_or(usize::MAX);
        // The first one is where the pipeline began: it is stored already.
        if report.0.is_some() || !settlements.is_empty() || !ahead.is_empty() {
            let Frontier { position, target, acked, .. } = frontier.clone();
            let cursor = Cursor { position, target, acked, ahead, windows: Vec::new() };
            self.cursors.moved(&self.owner, cursor, settlements, covers);
        }
        report.0 = Some(frontier);
    }
}

/// What was last left to be stored.
#[derive(Default)]
struct Report(Option<Frontier<Arc<Mark>>>);

impl Report {
    fn is(&self, frontier: &Frontier<Arc<Mark>>) -> bool {
        let same = |before: &Frontier<Arc<Mark>>| {
            before.acked == frontier.acked && Arc::ptr_eq(&before.position, &frontier.position)
        };
        self.0.as_ref().is_some_and(same)
    }
}

async fn until(at: Option<Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
}

pub(super) fn session_over() -> SourceError {
    SourceError::Unreachable("the session has ended".into())
}
