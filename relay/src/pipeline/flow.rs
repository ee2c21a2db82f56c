// SPDX-License-Identifier: PostgreSQL
//! A pipeline without its I/O: which events wait, which may go, which go again, and how far all are acknowledged.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;

use dtm_core::options::Options;
use dtm_core::page::{Event, Page};
use tokio::time::Instant;

use super::budget::Held;
use super::lanes::Lanes;
use super::reader::{Reader, UnknownEra};
use super::retry::Schedule;
use super::windows::{Frontier, Progress, Ticket};
use crate::source::mark::Mark;
use crate::source::pages::StoredCursor;

/// An event on its way.
#[derive(Debug)]
pub struct Delivery {
    /// The event.
    pub event: Event,
    /// How many attempts have failed.
    pub failed_attempts: u32,
    ticket: Ticket,
    _page: Arc<Held>,
}

/// An event that waits to be sent again. The earlier, the greater it is: a heap has its greatest on top.
#[derive(Debug)]
struct Retry {
    at: Reverse<Instant>,
    delivery: Delivery,
}

impl Ord for Retry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, Reverse(self.delivery.ticket)).cmp(&(other.at, Reverse(other.delivery.ticket)))
    }
}

impl PartialOrd for Retry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Retry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Retry {}

/// The state of a pipeline.
pub struct Flow {
    reader: Reader,
    progress: Progress<Arc<Mark>>,
    lanes: Lanes<Delivery>,
    retries: BinaryHeap<Retry>,
    schedule: Schedule,
}

impl Flow {
    /// Goes on from a cursor.
    pub fn new(cursor: StoredCursor, eras: Arc<[i32]>, options: &Options) -> Result<Self, UnknownEra> {
        let (reader, progress) = Reader::new(cursor, eras)?;
        let lanes = Lanes::new(options.ordering, options.max_in_flight);
        let schedule = Schedule { base: options.retry_base, cap: options.retry_cap };
        Ok(Flow { reader, progress, lanes, retries: BinaryHeap::new(), schedule })
    }

    /// The piece of the log to read next, see [`Reader::next`].
    pub fn piece(&mut self, head: Option<&Arc<Mark>>) -> Option<(Arc<Mark>, Arc<Mark>, i64)> {
        self.reader.next(head, &mut self.progress)
    }

    /// The piece has been read.
    pub fn read(&mut self, page: Page, held: &Arc<Held>) {
        for event in page.events {
            let ticket = self.progress.push(event.seq);
            let key = event.key.clone();
            let delivery = Delivery { event, failed_attempts: 0, ticket, _page: held.clone() };
            self.lanes.push(key.as_ref(), delivery);
        }
        self.progress.scanned(page.scanned, page.done);
        self.reader.read(page.scanned, page.done);
    }

    /// The next event to send, if one may go now.
    pub fn next(&mut self, now: Instant) -> Option<Delivery> {
        while let Some(top) = self.retries.peek_mut()
            && top.at.0 <= now
        {
            self.lanes.again(std::collections::binary_heap::PeekMut::pop(top).delivery);
        }
        self.lanes.take()
    }

    /// An event has arrived.
    pub fn delivered(&mut self, delivery: Delivery) {
        self.lanes.finished(delivery.event.key.as_ref());
        self.progress.ack(delivery.ticket);
    }

    /// An attempt has failed; answers when the next one is made. `random` is drawn evenly from `[0, 1)`.
    pub fn failed(&mut self, mut delivery: Delivery, now: Instant, random: f64) -> Instant {
        self.lanes.set_aside();
        delivery.failed_attempts = delivery.failed_attempts.saturating_add(1);
        let at = now + self.schedule.delay(delivery.failed_attempts, random);
        self.retries.push(Retry { at: Reverse(at), delivery });
        at
    }

    /// When the next event that failed goes again.
    pub fn next_retry(&self) -> Option<Instant> {
        self.retries.peek().map(|retry| retry.at.0)
    }

    /// How many events are held, about.
    pub fn held(&self) -> usize {
        self.progress.held()
    }

    /// How far everything is acknowledged.
    pub fn frontier(&self) -> Frontier<Arc<Mark>> {
        self.progress.frontier()
    }
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
