// SPDX-License-Identifier: PostgreSQL
//! Benchmarks: what is measured, against what, and how it is shown.

pub mod backlog;
pub mod barrier;
pub mod fanout;
pub mod http;
pub mod kafka;
pub mod kafka_bare;
pub mod kafka_latency;
pub mod kafka_site;
pub mod kafka_topic;
pub mod latency;
pub mod load;
pub mod msg;
pub mod pinned;
pub mod processor;
pub mod publish;
pub mod report;
pub mod sink;
pub mod statistics;
