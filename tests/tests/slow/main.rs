// SPDX-License-Identifier: PostgreSQL
//! Tests that take long: crashes, outages, connections of all kinds, PgBouncer.

mod administration;
mod asking;
mod clients;
mod commands;
mod connections;
mod failover;
mod failures;
mod https;
mod kafka;
mod kafka_crash;
mod kafka_kit;
mod kafka_messages;
mod kafka_once;
mod load;
mod message_crash;
mod numbered;
mod operations;
mod outages;
mod pgbouncer;
mod relay_crash;
mod restore;
mod rotation;
mod server_crash;
mod shutdown;
mod target_faults;
mod target_recovery;
mod two_databases;
mod two_relays;
mod undeliverable;
