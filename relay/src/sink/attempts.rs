// SPDX-License-Identifier: PostgreSQL
//! Attempts that are on their way, each a future of its own.

use std::future::Future;

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{FuturesUnordered, StreamExt as _};

use crate::calls::outcome::Outcome;

/// Attempts of one pipeline.
pub struct Attempts<T> {
    running: FuturesUnordered<BoxFuture<'static, (T, Outcome)>>,
}

impl<T: Send + 'static> Attempts<T> {
    /// None yet.
    pub fn new() -> Self {
        Attempts { running: FuturesUnordered::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Another one.
    pub fn push(&mut self, attempt: impl Future<Output = (T, Outcome)> + Send + 'static) {
        self.running.push(attempt.boxed());
    }

    /// Waits for some that have ended; for ever if there is none.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        let Some(answer) = self.running.next().await else { return std::future::pending().await };
        let mut answers = vec![answer];
        while let Some(Some(answer)) = self.running.next().now_or_never() {
            answers.push(answer);
        }
        answers
    }
}
