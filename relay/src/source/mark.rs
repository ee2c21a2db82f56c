// SPDX-License-Identifier: PostgreSQL
//! Positions of the log as the relay holds them.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use dtm_core::position::Position;

use super::error::SourceError;

/// A position, shared by all subscriptions that stand at it: stored once, it has an id.
#[derive(Debug)]
pub struct Mark {
    text: String,
    position: Position,
    id: AtomicI64,
}

impl Mark {
    /// Takes a position as the database wrote it.
    pub fn parse(what: &'static str, text: String) -> Result<Arc<Self>, SourceError> {
        match Position::parse(&text) {
            Ok(position) => Ok(Arc::new(Mark { text, position, id: AtomicI64::new(0) })),
            Err(error) => Err(SourceError::Answer { what, problem: error.to_string() }),
        }
    }

    /// Takes a position that the relay made.
    pub fn new(position: Position) -> Arc<Self> {
        Arc::new(Mark { text: position.to_string(), position, id: AtomicI64::new(0) })
    }

    /// As the database reads it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The position itself.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// The era that it lies in.
    pub fn era(&self) -> i32 {
        self.position.era
    }

    /// The id that it is stored under, if it is.
    pub(super) fn id(&self) -> Option<i64> {
        Some(self.id.load(Ordering::Relaxed)).filter(|&id| id != 0)
    }

    /// It is no longer stored: nothing named it for long.
    pub(super) fn forgotten(&self) {
        self.id.store(0, Ordering::Relaxed);
    }

    /// It has been stored under this id.
    pub(super) fn stored(&self, id: i64) {
        self.id.store(id, Ordering::Relaxed);
    }
}
