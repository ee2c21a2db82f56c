// SPDX-License-Identifier: PostgreSQL
//! What runs on every PostgreSQL version: the SQL surface, the log's properties, one way from end to end.

mod barrier;
mod barrier_money;
mod barrier_table;
mod concurrent;
mod copies;
mod dead_letters;
mod delivery;
mod dtm_server;
mod dtm_server_guards;
mod encodings;
mod lag;
mod messages;
mod pg_upgrade;
mod positions;
mod privileges;
mod publish;
mod reading;
mod receive;
mod refusals;
mod schedule;
mod segments;
mod sharing;
mod source;
mod subscriptions;
mod turning;
mod upgrade;
mod versions;
mod windows;
