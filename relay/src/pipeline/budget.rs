// SPDX-License-Identifier: PostgreSQL
//! Bounds on what is held in memory: bytes of the whole relay, and of one subscription.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A subscription that holds nothing may always read a page of this size, whatever the others hold.
const ALWAYS: usize = 64 * 1024;

/// The bytes that all pipelines of the relay may hold together.
#[derive(Clone, Debug)]
pub struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Budget { used: Arc::default(), limit: bytes }
    }

    /// Takes bytes that are free.
    fn take(&self, bytes: usize) -> Option<Charge> {
        let room = |used: usize| used.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok()?;
        Some(Charge { used: self.used.clone(), bytes })
    }
}

/// Bytes that are counted in a sum until it is dropped.
#[derive(Debug)]
struct Charge {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

impl Charge {
    fn nothing(used: &Arc<AtomicUsize>) -> Self {
        Charge { used: used.clone(), bytes: 0 }
    }

    /// Counts so many from now on, also past a limit: what is in memory is in memory.
    fn amount_to(&mut self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What one pipeline holds of the budget.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    held: Arc<AtomicUsize>,
    limit: usize,
    /// Whoever has it has the room that is there in any case.
    extra: Arc<()>,
}

/// Room for a page that is being read.
#[derive(Debug)]
pub struct Room {
    charge: Charge,
    bytes: usize,
    extra: Option<Arc<()>>,
}

/// A page in memory, until the last of its events is dropped.
#[derive(Debug)]
pub struct Held {
    _of_all: Charge,
    _of_share: Charge,
    _extra: Option<Arc<()>>,
}

impl Share {
    /// A share that never holds more than `limit` bytes and one page.
    pub fn new(budget: Budget, limit: usize) -> Self {
        Share { budget, held: Arc::default(), limit, extra: Arc::default() }
    }

    /// Room for a page of about so many bytes; `None`: first something has to be delivered.
    pub fn room(&self, bytes: usize) -> Option<Room> {
        let held = self.held.load(Ordering::Relaxed);
        if held >= self.limit {
            return None;
        }
        match self.budget.take(bytes) {
            Some(charge) => Some(Room { charge, bytes, extra: None }),
            None if held == 0 => Some(self.beyond(bytes)),
            None => None,
        }
    }

    /// The same for what everything else that is held may wait for: a little of it, one page at a time, always has room.
    pub fn room_in_any_case(&self, bytes: usize) -> Option<Room> {
        self.room(bytes).or_else(|| {
            let is_free = Arc::strong_count(&self.extra) == 1;
            is_free.then(|| Room { extra: Some(self.extra.clone()), ..self.beyond(bytes) })
        })
    }

    fn beyond(&self, bytes: usize) -> Room {
        let mut charge = Charge::nothing(&self.budget.used);
        let bytes = bytes.min(ALWAYS);
        charge.amount_to(bytes);
        Room { charge, bytes, extra: None }
    }

    /// The bytes that it holds.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// The page has come and has so many bytes. They can be more than there was room for, since the last event of a page may
    /// go beyond it: then nobody gets room until the excess is gone.
    pub fn hold(&self, room: Room, bytes: usize) -> Arc<Held> {
        let (mut of_all, mut of_share) = (room.charge, Charge::nothing(&self.held));
        of_all.amount_to(bytes);
        of_share.amount_to(bytes);
        Arc::new(Held { _of_all: of_all, _of_share: of_share, _extra: room.extra })
    }
}

impl Room {
    /// How many bytes the page should have at the most.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(budget: &Budget) -> usize {
        budget.used.load(Ordering::Relaxed)
    }

    #[test]
    fn what_a_page_does_not_need_is_given_back() {
        let budget = Budget::new(1_000);
        let share = Share::new(budget.clone(), 1_000);
        let page = share.hold(share.room(800).unwrap(), 100);
        assert_eq!(used(&budget), 100);
        drop(page);
        assert_eq!(used(&budget), 0);
        drop(share.room(800).unwrap());
        assert_eq!(used(&budget), 0, "nor does a page that never came keep its room");
    }

    #[test]
    fn a_page_larger_than_its_room_counts_whole_and_is_paid_for_before_the_next() {
        let budget = Budget::new(1_000);
        let (first, second) = (Share::new(budget.clone(), 10_000), Share::new(budget.clone(), 10_000));
        let large = first.hold(first.room(100).unwrap(), 5_000);
        let small = second.hold(second.room(100).unwrap(), 10);
        assert_eq!(used(&budget), 5_010);
        assert!(first.room(1).is_none() && second.room(1).is_none());
        drop(large);
        assert!(first.room(990).is_some() && second.room(990).is_some());
        drop(small);
        assert_eq!(used(&budget), 0);
    }

    #[test]
    fn a_page_that_is_read_although_nothing_is_free_counts_too() {
        let budget = Budget::new(10);
        let share = Share::new(budget.clone(), usize::MAX);
        let page = share.hold(share.room(100).unwrap(), 1_000);
        assert_eq!(used(&budget), 1_000);
        assert!(share.room(1).is_none());
        drop(page);
        assert_eq!(used(&budget), 0);
    }

    #[test]
    fn a_subscription_stops_at_its_limit() {
        let share = Share::new(Budget::new(1_000_000), 150);
        let first = share.hold(share.room(100).unwrap(), 100);
        let second = share.hold(share.room(100).unwrap(), 100);
        assert!(share.room(100).is_none());
        drop(first);
        assert!(share.room(100).is_some());
        drop(second);
    }

    #[test]
    fn who_holds_nothing_goes_on_when_others_hold_all() {
        let budget = Budget::new(1_000_000);
        let greedy = Share::new(budget.clone(), usize::MAX);
        let _all = greedy.hold(greedy.room(1_000_000).unwrap(), 1_000_000);
        assert!(greedy.room(1).is_none());
        let other = Share::new(budget, usize::MAX);
        let room = other.room(500_000).unwrap();
        assert_eq!(room.bytes(), ALWAYS);
        let _page = other.hold(room, 10);
        assert!(other.room(1).is_none(), "the second page has to wait");
    }

    #[test]
    fn what_all_else_waits_for_has_room_one_page_at_a_time() {
        let budget = Budget::new(10_000);
        let share = Share::new(budget.clone(), 1_000);
        let full = share.hold(share.room(1_000).unwrap(), 1_000);
        assert!(share.room(1).is_none());
        let first = share.hold(share.room_in_any_case(500).unwrap(), 700);
        assert!(share.room_in_any_case(500).is_none(), "the first is held still");
        drop(first);
        assert!(share.room_in_any_case(500).is_some());
        drop(full);
        assert_eq!(used(&budget), 0);
    }
}
