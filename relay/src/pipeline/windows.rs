// SPDX-License-Identifier: PostgreSQL
//! How far a subscription has come: several windows on their way, settled in any order, covered in order.

use std::collections::{HashMap, VecDeque};

/// What stands for an event until it is settled.
pub type Ticket = u64;

/// How far everything is settled: this is what may be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontier<M> {
    /// Everything before it is settled.
    pub position: M,
    /// The end of the window that is settled in part.
    pub target: Option<M>,
    /// Up to this sequence number that window is settled.
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

/// What has become of an event.
#[derive(Clone, Debug)]
enum Standing<S> {
    Waits,
    Delivered,
    /// It leaves the log's order in another way: that is stored together with the cursor that covers it.
    Leaves(S),
}

/// A place in the order: an event, or (settled from the start) a stretch of the log in which nothing matched.
#[derive(Debug)]
struct Slot<T, S> {
    seq: i64,
    tag: Option<T>,
    standing: Standing<S>,
}

/// Events beyond the frontier that are settled already, by sequence number.
#[derive(Debug)]
pub struct Ahead<S>(HashMap<i64, Standing<S>>);

impl<S> Ahead<S> {
    /// Those that were delivered.
    pub fn delivered(seqs: impl IntoIterator<Item = i64>) -> Self {
        Ahead(seqs.into_iter().map(|seq| (seq, Standing::Delivered)).collect())
    }
}

/// The progress of a subscription. `M` is a position, `T` what an event is tagged with, `S` a way to leave.
#[derive(Debug)]
pub struct Progress<M, T, S> {
    position: M,
    /// In the first window.
    acked: i64,
    windows: VecDeque<Window<M>>,
    slots: VecDeque<Slot<T, S>>,
    /// The ticket of the first slot.
    first: Ticket,
    covered: u64,
    ahead: HashMap<i64, Standing<S>>,
}

impl<M: Clone, T, S: Clone> Progress<M, T, S> {
    /// Progress from a position on. What lies `ahead` counts as settled when it is read.
    pub fn new(position: M, ahead: Ahead<S>) -> Self {
        Progress {
            position,
            acked: 0,
            windows: VecDeque::new(),
            slots: VecDeque::new(),
            first: 0,
            covered: 0,
            ahead: ahead.0,
        }
    }

    /// Goes on in the middle of a window of which everything up to `acked` is settled.
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

    /// Adds an event of the last window; no ticket if it is settled already.
    pub fn push(&mut self, seq: i64, tag: T) -> Option<Ticket> {
        let standing = self.ahead.remove(&seq).unwrap_or(Standing::Waits);
        let waits = matches!(standing, Standing::Waits);
        self.slots.push_back(Slot { seq, tag: Some(tag), standing });
        waits.then(|| self.next_ticket() - 1)
    }

    /// The last window was read up to a sequence number, or to its end.
    pub fn scanned(&mut self, seq: i64, to_the_end: bool) {
        let next = self.next_ticket();
        let Some(window) = self.windows.back_mut() else { return };
        if to_the_end {
            window.end = Some(next);
        } else {
            match self.slots.back_mut() {
                Some(slot) if slot.tag.is_none() && next > window.start => slot.seq = seq,
                _ => self.slots.push_back(Slot { seq, tag: None, standing: Standing::Delivered }),
            }
        }
    }

    /// An event is tagged with something else.
    pub fn tag(&mut self, ticket: Ticket, tag: T) {
        let slot = ticket.checked_sub(self.first).and_then(|at| self.slots.get_mut(at as usize));
        if let Some(slot) = slot {
            slot.tag = Some(tag);
        }
    }

    /// An event is delivered.
    pub fn ack(&mut self, ticket: Ticket) {
        self.stand(ticket, Standing::Delivered);
    }

    /// An event leaves in another way.
    pub fn leave(&mut self, ticket: Ticket, how: S) {
        self.stand(ticket, Standing::Leaves(how));
    }

    fn stand(&mut self, ticket: Ticket, standing: Standing<S>) {
        let slot = ticket.checked_sub(self.first).and_then(|at| self.slots.get_mut(at as usize));
        if let Some(slot) = slot {
            slot.standing = standing;
        }
    }

    /// Moves the frontier over everything that is settled; what leaves goes to `left`. Answers the event it stops at, if
    /// there is one.
    pub fn advance(&mut self, left: &mut Vec<S>) -> Option<(Ticket, i64, &T)> {
        loop {
            match self.windows.front() {
                None => return None,
                Some(window) if window.end == Some(self.first) => {
                    let window = self.windows.pop_front()?;
                    self.position = window.leads_to.unwrap_or(window.to);
                    self.acked = 0;
                    continue;
                }
                Some(_) => {}
            }
            let Some(slot) = self.slots.pop_front_if(|slot| !matches!(slot.standing, Standing::Waits)) else {
                break;
            };
            if let Standing::Leaves(how) = slot.standing {
                left.push(how);
            }
            self.acked = slot.seq;
            self.covered += u64::from(slot.tag.is_some());
            self.first += 1;
        }
        let slot = self.slots.front()?;
        Some((self.first, slot.seq, slot.tag.as_ref()?))
    }

    /// How many events and stretches are held.
    pub fn held(&self) -> usize {
        self.slots.len()
    }

    /// How far everything is settled.
    pub fn frontier(&self) -> Frontier<M> {
        let window = self.windows.front().filter(|_| self.acked > 0);
        Frontier {
            position: self.position.clone(),
            target: window.map(|window| window.to.clone()),
            acked: self.acked,
            covered: self.covered,
        }
    }

    /// The sequence numbers beyond the frontier that are delivered.
    pub fn delivered_ahead(&self) -> Vec<i64> {
        let read = self.slots.iter().filter(|slot| slot.tag.is_some());
        let read = read.map(|slot| (slot.seq, &slot.standing));
        let known = read.chain(self.ahead.iter().map(|(seq, standing)| (*seq, standing)));
        known.filter(|(_, standing)| matches!(standing, Standing::Delivered)).map(|(seq, _)| seq).collect()
    }

    /// Forgets what was read and not settled; what is settled beyond the frontier is kept for when it is read again.
    pub fn into_ahead(self) -> Ahead<S> {
        let mut ahead = self.ahead;
        let settled = self.slots.into_iter().filter(|slot| slot.tag.is_some());
        ahead.extend(
            settled
                .filter(|slot| !matches!(slot.standing, Standing::Waits))
                .map(|slot| (slot.seq, slot.standing)),
        );
        Ahead(ahead)
    }

    fn next_ticket(&self) -> Ticket {
        self.first + self.slots.len() as u64
    }
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
