// SPDX-License-Identifier: PostgreSQL
//! Calls to services that may fail: what came of one, whose fault it was, and when the next one may be made.
//!
//! Nothing here knows what is sent: events today, branches of global transactions alike. [`outcome`] classes what came of a
//! call, [`circuit`] tells a service that is down from a caller's own fault, [`schedule`] says when a failed call is made
//! again, [`pace`] how many may be made: those four are pure, time and randomness are arguments. [`http`] makes calls, over
//! connections that are kept, with [`secrets`] that only the relay's configuration knows.

mod answer;
pub mod circuit;
mod connections;
pub mod http;
pub mod outcome;
pub mod pace;
pub mod schedule;
pub mod secrets;
pub mod tls;
