// SPDX-License-Identifier: PostgreSQL
//! The task of one pipeline: reads pages, sends events, leaves cursors to be stored.

use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::Options;
use dtm_core::page::Page;
use futures_util::future::{BoxFuture, FutureExt as _, OptionFuture};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::budget::{Room, Share};
use super::flow::{Delivery, Flow};
use super::windows::Frontier;
use crate::sink::Failure;
use crate::sink::http::HttpSink;
use crate::source::cursors::{Cursor, Cursors, Owner};
use crate::source::error::SourceError;
use crate::source::head::Head;
use crate::source::mark::Mark;
use crate::source::pages::{PageRequest, Pages, Wanted};

/// After a page that could not be read.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// How often it is told that a subscription cannot be delivered.
pub const TELL_EVERY: Duration = Duration::from_secs(60);

/// The bounds of a pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Events that it holds at the most.
    pub events: usize,
    /// Events of a page at the most.
    pub page_events: usize,
    /// Bytes of a page, about.
    pub page_bytes: usize,
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
    pub sink: Arc<HttpSink>,
    /// Where pages come from.
    pub pages: Arc<Pages>,
    /// The newest head.
    pub heads: watch::Receiver<Head>,
    /// Where cursors are left.
    pub cursors: Arc<Cursors>,
    /// Until when it may send.
    pub valid_until: watch::Receiver<Instant>,
    /// The memory that it may use.
    pub share: Share,
    /// All eras of the log.
    pub eras: Arc<[i32]>,
    /// Its bounds.
    pub bounds: Bounds,
    /// Asks it to stop: nothing new is sent, what is in flight is waited for.
    pub drain: CancellationToken,
}

type PageRead = Result<(Page, usize), SourceError>;

/// A page that is being read, and the room for it.
struct Reading {
    page: BoxFuture<'static, PageRead>,
    room: Room,
}

impl Pipeline {
    /// Delivers until it is asked to stop or is fenced. What keeps it from delivering is told again and again, for as long
    /// as it is so. An error is one of the database connection.
    pub async fn run(self) -> Result<(), SourceError> {
        let Owner { subscription, shard, epoch, .. } = self.owner;
        loop {
            let again_at = match self.pages.cursor(subscription, shard, epoch).await {
                Ok(Some(cursor)) => match Flow::new(cursor, self.eras.clone(), &self.options) {
                    Ok(flow) => return self.work(flow).await,
                    Err(error) => {
                        let hint = "dtm.rewind gives it a cursor that the database knows";
                        tracing::error!(subscription = self.name, hint, "it is not delivered: {error}");
                        Instant::now() + TELL_EVERY
                    }
                },
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
        let mut in_flight = FuturesUnordered::new();
        let mut reading: Option<Reading> = None;
        let mut read_at = Instant::now();
        let mut report = Report::default();
        let mut stop_at: Option<Instant> = None;
        loop {
            let mut waits_for_head = false;
            let valid_until = *self.valid_until.borrow_and_update();
            if stop_at.is_none() {
                if reading.is_none() && Instant::now() >= read_at {
                    reading = self.next_page(&mut flow, &mut waits_for_head);
                }
                while Instant::now() < valid_until {
                    let Some(delivery) = flow.next(Instant::now()) else { break };
                    in_flight.push(attempt(self.sink.clone(), delivery));
                }
            } else if in_flight.is_empty() {
                break;
            }
            self.leave_cursor(&flow, &mut report);
            let now = Instant::now();
            let without_lease = now >= valid_until;
            let timer = match stop_at {
                Some(stop_at) => Some(stop_at),
                None => {
                    let retry = flow.next_retry().filter(|_| !without_lease);
                    retry.into_iter().chain((read_at > now).then_some(read_at)).min()
                }
            };
            tokio::select! {
                Some(answer) = in_flight.next(), if !in_flight.is_empty() => {
                    self.settle(&mut flow, answer);
                    while let Some(Some(answer)) = in_flight.next().now_or_never() {
                        self.settle(&mut flow, answer);
                    }
                }
                Some(page) = OptionFuture::from(reading.as_mut().map(|reading| &mut reading.page)) => {
                    let room = reading.take().map(|reading| reading.room);
                    match (page, room) {
                        (Ok((page, bytes)), Some(room)) => flow.read(page, &self.share.hold(room, bytes)),
                        (Ok(_), None) => {}
                        (Err(error), _) => read_at = self.unreadable(error)?,
                    }
                }
                changed = self.heads.changed(), if waits_for_head => changed.map_err(|_| session_over())?,
                changed = self.valid_until.changed(), if without_lease => changed.map_err(|_| session_over())?,
                () = until(timer), if timer.is_some() => {
                    if stop_at.is_some() {
                        tracing::warn!(subscription = self.name, "{} requests are given up", in_flight.len());
                        break;
                    }
                }
                () = self.drain.cancelled(), if stop_at.is_none() => {
                    reading = None;
                    stop_at = Some(Instant::now() + self.bounds.drain);
                }
                () = self.owner.fenced.cancelled() => {
                    tracing::warn!(subscription = self.name, "its cursor is moved by another relay or was rewound: stopping");
                    return Ok(());
                }
            }
        }
        self.leave_cursor(&flow, &mut report);
        self.cursors.barrier().await;
        Ok(())
    }

    /// Begins to read the next page, if there is room for it and something to read.
    fn next_page(&mut self, flow: &mut Flow, waits_for_head: &mut bool) -> Option<Reading> {
        let free = self.bounds.events.saturating_sub(flow.held());
        if free == 0 {
            return None;
        }
        let head = self.heads.borrow_and_update().clone();
        let Some((from, to, after)) = flow.piece(head.as_ref()) else {
            *waits_for_head = true;
            return None;
        };
        let room = self.share.room(self.bounds.page_bytes)?;
        let max_rows = i32::try_from(free.min(self.bounds.page_events)).unwrap_or(i32::MAX);
        let max_bytes = i32::try_from(room.bytes()).unwrap_or(i32::MAX);
        let request = PageRequest { from, to, after, max_rows, max_bytes };
        let (pages, wanted) = (self.pages.clone(), self.wanted.clone());
        Some(Reading { page: async move { pages.read(&request, &wanted).await }.boxed(), room })
    }

    fn unreadable(&self, error: SourceError) -> Result<Instant, SourceError> {
        if !error.spares_connection() {
            return Err(error);
        }
        tracing::error!(
            subscription = self.name,
            hint = error.hint(),
            "{error}; next try in {} s",
            READ_AGAIN.as_secs()
        );
        Ok(Instant::now() + READ_AGAIN)
    }

    fn settle(&self, flow: &mut Flow, (delivery, outcome): (Delivery, Result<(), Failure>)) {
        let Err(failure) = outcome else { return flow.delivered(delivery) };
        let (id, topic) = (delivery.event.id, delivery.event.topic.clone());
        let attempt = delivery.failed_attempts + 1;
        let now = Instant::now();
        let next = flow.failed(delivery, now, rand::random());
        tracing::warn!(
            subscription = self.name,
            %id,
            topic = &*topic,
            attempt,
            failure = %failure.kind,
            next_retry_s = (next - now).as_secs_f64(),
            "not delivered: {}",
            failure.detail
        );
    }

    fn leave_cursor(&self, flow: &Flow, report: &mut Report) {
        let frontier = flow.frontier();
        if report.is(&frontier) {
            return;
        }
        let delivered = report.0.as_ref().is_some_and(|before| frontier.covered > before.covered);
        // The first one is where the pipeline began: it is stored already.
        if report.0.is_some() {
            let Frontier { position, target, acked, .. } = frontier.clone();
            self.cursors.moved(&self.owner, Cursor { position, target, acked }, delivered);
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

async fn attempt(sink: Arc<HttpSink>, delivery: Delivery) -> (Delivery, Result<(), Failure>) {
    let outcome = sink.send(&delivery.event).await;
    (delivery, outcome)
}

async fn until(at: Option<Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
}

fn session_over() -> SourceError {
    SourceError::Unreachable("the session has ended".into())
}
