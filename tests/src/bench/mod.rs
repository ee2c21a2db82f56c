// SPDX-License-Identifier: PostgreSQL
//! Benchmarks: what is measured, against what, and how it is shown.

pub mod backlog;
pub mod fanout;
pub mod http;
pub mod latency;
pub mod load;
pub mod pinned;
pub mod processor;
pub mod publish;
pub mod report;
pub mod sink;
pub mod statistics;
