// SPDX-License-Identifier: PostgreSQL
//! The kit that tests, benchmarks and the demo share: real PostgreSQL clusters, real HTTP endpoints that misbehave, the real
//! relay as a process that can be killed, and a ledger of what was committed against what arrived.

pub mod arrivals;
pub mod bench;
pub mod cluster;
pub mod dtm_api;
pub mod kafka;
mod kafka_acl;
pub mod kafka_log;
mod kafka_node;
pub mod kafka_tls;
pub mod kafka_topics;
pub mod ledger;
pub mod pgbouncer;
pub mod port;
pub mod process;
pub mod proxy;
pub mod receiver;
pub mod relay;
