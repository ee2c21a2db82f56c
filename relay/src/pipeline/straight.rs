// SPDX-License-Identifier: PostgreSQL
//! The way of events while nothing fails, where the sink keeps the order itself: one after the other as they stand in the log,
//! without a look at their keys.
//!
//! When something fails nothing more goes; once all that is on its way is back, each key goes its own way from there.

use std::collections::VecDeque;

use super::delivery::Delivery;

/// Events in the order of the log.
#[derive(Debug)]
pub struct Straight {
    /// The sink keeps the order itself.
    may_be: bool,
    is_on: bool,
    waiting: VecDeque<Delivery>,
    back: Vec<Delivery>,
}

impl Straight {
    /// Nothing goes this way yet; `may_be`: the sink keeps the order itself.
    pub fn new(may_be: bool) -> Self {
        Straight { may_be, is_on: false, waiting: VecDeque::new(), back: Vec::new() }
    }

    /// Events that are read from now on may go this way if `all_well`: nothing else waits or is on its way.
    pub fn may_begin(&mut self, all_well: bool) {
        self.is_on |= self.may_be && all_well;
    }

    /// Whether events go this way.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Adds the next one.
    pub fn push(&mut self, delivery: Delivery) {
        self.waiting.push_back(delivery);
    }

    /// Whether there is one to send.
    pub fn has_next(&self) -> bool {
        self.back.is_empty() && !self.waiting.is_empty()
    }

    /// The next one to send.
    pub fn next(&mut self) -> Option<Delivery> {
        if self.has_next() { self.waiting.pop_front() } else { None }
    }

    /// One has come back.
    pub fn failed(&mut self, delivery: Delivery) {
        self.back.push(delivery);
    }

    /// Whether one has.
    pub fn has_failed(&self) -> bool {
        !self.back.is_empty()
    }

    /// It ends here. Answers all that has not arrived, in the order of the log.
    pub fn end(&mut self) -> impl Iterator<Item = Delivery> + use<> {
        self.is_on = false;
        let mut back = std::mem::take(&mut self.back);
        back.sort_unstable_by_key(|delivery| delivery.turn);
        back.into_iter().chain(std::mem::take(&mut self.waiting))
    }
}
