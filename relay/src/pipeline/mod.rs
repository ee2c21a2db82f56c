// SPDX-License-Identifier: PostgreSQL
//! From window to acknowledgement: one pipeline for each subscription that this relay owns.
//!
//! An event's way: [`reader`] says which piece of the log comes next, [`budget`] makes room for it, [`lanes`] says when
//! its key is free, [`run`] sends it, [`retry`] says when a failed one goes out again, [`windows`] says how far everything
//! is acknowledged. [`flow`] holds them together. All but `run` do no I/O and take time and randomness as arguments.

pub mod budget;
pub mod flow;
pub mod lanes;
pub mod reader;
pub mod retry;
pub mod run;
pub mod windows;
