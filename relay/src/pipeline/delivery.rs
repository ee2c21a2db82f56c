// SPDX-License-Identifier: PostgreSQL
//! An event on its way, and what a pipeline remembers of one that is parked.

use std::sync::Arc;

use dtm_core::options::Ordering;
use dtm_core::page::Event;
use tokio::time::Instant;

use super::budget::Held;
use super::windows::Ticket;

/// What keeps its order by itself: the events of a key, or a single event without one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LaneName {
    /// All events of a key. It outlives the page that the event came in, and shares no memory with it.
    Key(Arc<str>),
    /// The event with this sequence number.
    Own(i64),
}

impl LaneName {
    /// The lane of an event.
    pub fn of(seq: i64, key: Option<&str>, ordering: Ordering) -> Self {
        match key {
            Some(key) if ordering == Ordering::Key => LaneName::Key(key.into()),
            _ => LaneName::Own(seq),
        }
    }
}

/// Where an event stands until it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In dtm.retry: the cursor is past it.
    Row,
    /// In the log: the cursor waits for it.
    Log(Ticket),
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
    /// The how-manieth attempt of the pipeline it is: the order of those that are on their way.
    pub turn: u64,
    /// The memory that it is a part of.
    pub held: Arc<Held>,
}

impl AsRef<Event> for Delivery {
    fn as_ref(&self) -> &Event {
        &self.event
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
    /// It is a dead letter: what follows on its lane waits until that is redriven or discarded.
    pub blocks: bool,
}

impl Row {
    /// The row that an event has, or is about to get.
    pub fn of(delivery: &Delivery, attempts: u32, next: Option<Instant>) -> Self {
        Row { seq: delivery.event.seq, bytes: delivery.event.size(), attempts, next, blocks: false }
    }

    /// What stands for a dead letter that blocks its lane.
    pub fn blocking(seq: i64) -> Self {
        Row { seq, bytes: 0, attempts: 0, next: None, blocks: true }
    }
}
