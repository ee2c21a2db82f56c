// SPDX-License-Identifier: PostgreSQL
//! All that knows PostgreSQL: connections, the log's head and pages, cursors, leases, due events, what is parked.

pub mod asking;
mod batch;
pub mod connect;
pub mod cursors;
pub mod desk;
pub mod dtm_api;
pub mod due;
pub mod error;
pub mod head;
pub mod hello;
pub mod inspect;
pub mod leases;
pub mod link;
pub mod mark;
pub mod origin;
pub mod pages;
pub mod passfile;
pub mod pool;
mod reminders;
pub mod settings;
pub mod settlement;
pub mod tail;
pub mod tls;
pub mod transactions;
pub mod unfinished;
pub mod upkeep;
pub mod url;
