// SPDX-License-Identifier: PostgreSQL
//! From window to settlement: one pipeline for each subscription, or shard of one, that this relay owns.
//!
//! An event's way: [`reader`] says which piece of the log comes next, [`budget`] makes room for it, [`lanes`] says when
//! its key is free ([`straight`] lets all go where the sink keeps the order itself), [`run`] sends it. What fails goes again, is
//! parked behind its key, or becomes a dead letter: [`flow`] decides, [`verdict`] says how, and [`delivery`] what is stored of
//! it. [`windows`] says how far everything is settled. [`writers`] is the way of a subscription whose events reach Kafka exactly
//! once, [`once`] what each of them does, and [`reconcile`] how it begins. All but `run`, `writers` and `once` do no I/O and take
//! time and randomness as arguments.

pub mod budget;
pub mod delivery;
pub mod flow;
pub mod lane;
pub mod lanes;
mod once;
pub mod reader;
mod reconcile;
pub mod run;
mod straight;
pub mod verdict;
pub mod windows;
mod writers;
