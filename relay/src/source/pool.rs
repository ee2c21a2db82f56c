// SPDX-License-Identifier: PostgreSQL
//! A few connections that are made when they are needed and kept between calls.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::link::Link;

/// The connections, each with what belongs to it.
pub struct Pool<T> {
    turns: Semaphore,
    idle: Mutex<Vec<T>>,
}

impl<T: AsRef<Link>> Pool<T> {
    /// No more than so many are used at once; there is none yet.
    pub fn new(most: usize) -> Self {
        Pool { turns: Semaphore::new(most), idle: Mutex::default() }
    }

    /// Waits until one may be used, for as long as the permit is held.
    pub async fn turn(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.turns.acquire().await
    }

    /// One that was kept and is not known to have ended; what is sent over such a one would not be sent.
    pub fn take(&self) -> Option<T> {
        let mut idle = self.idle();
        std::iter::from_fn(|| idle.pop()).find(|kept| !kept.as_ref().is_closed())
    }

    /// Keeps one for the next call.
    pub fn keep(&self, used: T) {
        self.idle().push(used);
    }

    /// Forgets all that are kept.
    pub fn clear(&self) {
        self.idle().clear();
    }

    fn idle(&self) -> MutexGuard<'_, Vec<T>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
