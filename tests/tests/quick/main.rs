// SPDX-License-Identifier: PostgreSQL
//! What runs on every PostgreSQL version: the SQL surface, the log's properties, one way from end to end.

mod concurrent;
mod delivery;
mod publish;
mod refusals;
mod schedule;
mod windows;
