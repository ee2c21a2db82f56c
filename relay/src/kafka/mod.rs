// SPDX-License-Identifier: PostgreSQL
//! Kafka clusters by name, and records sent to them without a gap in the order of a key.
//!
//! Nothing here knows events. [`settings`] says what a cluster's configuration may say, [`cluster`] holds the producers that
//! all senders share, [`producer`] is one of them and its successors, [`topics`] knows what a topic takes, [`problem`] why
//! nobody answers, [`verdict`] says what an error means.
//! [`transactions`] writes batches that are there as a whole or not at all, and with each of them a [`position`].

pub mod cluster;
pub mod position;
mod problem;
pub mod producer;
pub mod settings;
pub mod topics;
pub mod transactions;
pub mod verdict;
