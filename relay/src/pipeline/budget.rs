// SPDX-License-Identifier: PostgreSQL
//! Bounds on what is held in memory: bytes of the whole relay, and of one subscription.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A subscription that holds nothing may always read a page of this size, whatever the others hold.
const ALWAYS: usize = 64 * 1024;

/// The bytes that all pipelines of the relay may hold together.
#[derive(Clone, Debug)]
pub struct Budget {
    bytes: Arc<Semaphore>,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Budget { bytes: Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))) }
    }
}

/// What one pipeline holds of the budget.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    held: Arc<AtomicUsize>,
    limit: usize,
}

/// Room for a page that is being read.
#[derive(Debug)]
pub struct Room {
    permit: Option<OwnedSemaphorePermit>,
    bytes: usize,
}

/// A page in memory, until the last of its events is dropped.
#[derive(Debug)]
pub struct Held {
    _permit: Option<OwnedSemaphorePermit>,
    bytes: usize,
    held: Arc<AtomicUsize>,
}

impl Share {
    /// A share that never holds more than `limit` bytes and one page.
    pub fn new(budget: Budget, limit: usize) -> Self {
        Share { budget, held: Arc::new(AtomicUsize::new(0)), limit }
    }

    /// Room for a page of about so many bytes; `None`: first something has to be delivered.
    pub fn room(&self, bytes: usize) -> Option<Room> {
        let held = self.held.load(Ordering::Relaxed);
        if held >= self.limit {
            return None;
        }
        let permits = u32::try_from(bytes).ok()?;
        match self.budget.bytes.clone().try_acquire_many_owned(permits) {
            Ok(permit) => Some(Room { permit: Some(permit), bytes }),
            Err(_) if held == 0 => Some(Room { permit: None, bytes: bytes.min(ALWAYS) }),
            Err(_) => None,
        }
    }

    /// The page has come and has so many bytes.
    pub fn hold(&self, room: Room, bytes: usize) -> Arc<Held> {
        let permit = room.permit.map(|mut permit| {
            drop(permit.split(permit.num_permits().saturating_sub(bytes)));
            permit
        });
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Arc::new(Held { _permit: permit, bytes, held: self.held.clone() })
    }
}

impl Room {
    /// How many bytes the page should have at the most.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_page_does_not_need_is_given_back() {
        let budget = Budget::new(1_000);
        let share = Share::new(budget.clone(), 1_000);
        let page = share.hold(share.room(800).unwrap(), 100);
        assert_eq!(budget.bytes.available_permits(), 900);
        drop(page);
        assert_eq!(budget.bytes.available_permits(), 1_000);
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
}
