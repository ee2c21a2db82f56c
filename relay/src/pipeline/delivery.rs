// SPDX-License-Identifier: PostgreSQL
//! An event on its way, and what a pipeline remembers of one that is parked.

use std::sync::Arc;

use bytestring::ByteString;
use dtm_core::options::Ordering;
use dtm_core::page::Event;
use tokio::time::Instant;

use super::budget::Held;
use super::windows::Ticket;

/// What keeps its order by itself: the events of a key, or a single event without one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LaneName {
    /// All events of a key.
    Key(ByteString),
    /// The event with this sequence number.
    Own(i64),
}

impl LaneName {
    /// The lane of an event.
    pub fn of(seq: i64, key: Option<&ByteString>, ordering: Ordering) -> Self {
        match key {
            Some(key) if ordering == Ordering::Key => LaneName::Key(key.clone()),
            _ => LaneName::Own(seq),
        }
    }
}

/// Where an event stands until it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the log: the cursor waits for it.
    Log(Ticket),
    /// In dtm.retry: the cursor is past it.
    Row,
}

/// An event on its way.
#[derive(Debug)]
pub struct Delivery {
    /// The event.
    pub event: Event,
    /// Its lane.
    pub lane: LaneName,
    /// Where it stands.
    pub place: Place,
    /// How many attempts were charged to it before it was read from dtm.retry.
    pub attempts: u32,
    /// The memory that it is a part of.
    pub held: Arc<Held>,
}

impl Delivery {
    /// How much memory the event stands for, about.
    pub fn size(&self) -> usize {
        let event = &self.event;
        let texts = event.topic.len() + event.key.as_ref().map_or(0, |key| key.len());
        texts
            + event.headers.as_ref().map_or(0, |h| h.len())
            + event.payload.as_ref().map_or(0, bytes::Bytes::len)
    }
}

/// A row of dtm.retry as a pipeline remembers it: the event itself is read when it is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The event's sequence number.
    pub seq: i64,
    /// Its size, about.
    pub bytes: usize,
    /// Attempts that are charged to it.
    pub attempts: u32,
    /// When it is due; `None`: when it is the first of its lane.
    pub next: Option<Instant>,
}

impl Row {
    /// The row that an event has, or is about to get.
    pub fn of(delivery: &Delivery, attempts: u32, next: Option<Instant>) -> Self {
        Row { seq: delivery.event.seq, bytes: delivery.size(), attempts, next }
    }
}
