// SPDX-License-Identifier: PostgreSQL
//! The coordinator as a sink: an event names a transaction that was submitted, and is settled when a pass was made over it. What
//! the pass did not bring to its end waits elsewhere, so no event ever fails here.

use std::sync::Arc;

use dtm_core::page::Event;

use super::attempts::Attempts;
use crate::calls::outcome::Outcome;
use crate::coordinator::Coordinator;

/// Passes that one pipeline has begun.
pub struct CoordinatorSender<T> {
    coordinator: Arc<Coordinator>,
    attempts: Attempts<T>,
}

impl<T: AsRef<Event> + Send + 'static> CoordinatorSender<T> {
    /// None yet.
    pub fn new(coordinator: Arc<Coordinator>) -> Self {
        CoordinatorSender { coordinator, attempts: Attempts::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.attempts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Begins a pass.
    pub fn send(&mut self, item: T) {
        let coordinator = self.coordinator.clone();
        self.attempts.push(async move {
            if let Some(gid) = &item.as_ref().key {
                coordinator.drive(gid).await;
            }
            (item, Outcome::accepted())
        });
    }

    /// Waits for passes that have ended; for ever if there is none.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        self.attempts.answers().await
    }
}
