// SPDX-License-Identifier: PostgreSQL
//! How far a subscription is delivered: several windows on their way, acknowledged in any order, covered in order.

use std::collections::VecDeque;

/// What stands for an event until it is acknowledged.
pub type Ticket = u64;

/// How far everything is acknowledged: this is what may be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontier<M> {
    /// Everything before it is acknowledged.
    pub position: M,
    /// The end of the window that is acknowledged in part.
    pub target: Option<M>,
    /// Up to this sequence number that window is acknowledged.
    pub acked: i64,
    /// How many events have been covered so far: to tell a move that covers events from one that does not.
    pub covered: u64,
}

/// One window: everything between where the one before it leads and `to`.
#[derive(Debug)]
struct Window<M> {
    to: M,
    /// Where the next window begins: at `to`, but for the last window of an era, behind which the next era begins.
    leads_to: Option<M>,
    /// The ticket of its first event.
    start: Ticket,
    /// The ticket after its last event, once it was read to its end.
    end: Option<Ticket>,
}

/// A place in the order: an event, or (acknowledged from the start) a stretch of the log in which nothing matched.
#[derive(Debug)]
struct Slot {
    seq: i64,
    acked: bool,
    event: bool,
}

/// The progress of a subscription. `M` is a position.
#[derive(Debug)]
pub struct Progress<M> {
    position: M,
    /// In the first window.
    acked: i64,
    windows: VecDeque<Window<M>>,
    slots: VecDeque<Slot>,
    /// The ticket of the first slot.
    first: Ticket,
    covered: u64,
}

impl<M: Clone> Progress<M> {
    /// Progress from a position on.
    pub fn new(position: M) -> Self {
        Progress {
            position,
            acked: 0,
            windows: VecDeque::new(),
            slots: VecDeque::new(),
            first: 0,
            covered: 0,
        }
    }

    /// Goes on in the middle of a window of which everything up to `acked` is acknowledged.
    pub fn resume(&mut self, to: M, leads_to: Option<M>, acked: i64) {
        self.open(to, leads_to);
        self.acked = acked;
    }

    /// Opens the next window. `leads_to`: where the one after it begins, if that is not where this one ends.
    pub fn open(&mut self, to: M, leads_to: Option<M>) {
        let next = self.next_ticket();
        let mut window = Window { to, leads_to, start: next, end: None };
        // A window without events and the one after it are one: a slow event does not make windows pile up behind it.
        if let Some(last) = self.windows.back()
            && last.end == Some(last.start)
            && last.leads_to.is_none()
        {
            window.start = last.start;
            self.windows.pop_back();
        }
        self.windows.push_back(window);
    }

    /// Adds an event of the last window.
    pub fn push(&mut self, seq: i64) -> Ticket {
        self.slots.push_back(Slot { seq, acked: false, event: true });
        self.next_ticket() - 1
    }

    /// The last window was read up to a sequence number, or to its end.
    pub fn scanned(&mut self, seq: i64, to_the_end: bool) {
        let next = self.next_ticket();
        let Some(window) = self.windows.back_mut() else { return };
        if to_the_end {
            window.end = Some(next);
        } else {
            match self.slots.back_mut() {
                Some(slot) if !slot.event && next > window.start => slot.seq = seq,
                _ => self.slots.push_back(Slot { seq, acked: true, event: false }),
            }
        }
        self.advance();
    }

    /// An event is delivered.
    pub fn ack(&mut self, ticket: Ticket) {
        let slot = ticket.checked_sub(self.first).and_then(|at| self.slots.get_mut(at as usize));
        if let Some(slot) = slot {
            slot.acked = true;
            self.advance();
        }
    }

    /// How many events and stretches are held.
    pub fn held(&self) -> usize {
        self.slots.len()
    }

    /// How far everything is acknowledged.
    pub fn frontier(&self) -> Frontier<M> {
        let window = self.windows.front().filter(|_| self.acked > 0);
        Frontier {
            position: self.position.clone(),
            target: window.map(|window| window.to.clone()),
            acked: self.acked,
            covered: self.covered,
        }
    }

    fn next_ticket(&self) -> Ticket {
        self.first + self.slots.len() as u64
    }

    fn advance(&mut self) {
        while let Some(window) = self.windows.front() {
            if window.end == Some(self.first) {
                let Some(window) = self.windows.pop_front() else { return };
                self.position = window.leads_to.unwrap_or(window.to);
                self.acked = 0;
                continue;
            }
            match self.slots.pop_front_if(|slot| slot.acked) {
                Some(slot) => {
                    self.acked = slot.seq;
                    self.covered += u64::from(slot.event);
                    self.first += 1;
                }
                None => return,
            }
        }
    }
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
