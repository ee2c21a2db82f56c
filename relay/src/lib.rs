// SPDX-License-Identifier: PostgreSQL
//! The relay of pg_dtm: reads what was committed to the log and delivers it.
//!
//! An event's way: [`source`] reads it from PostgreSQL, a [`pipeline`] sees to its order and its retries, a [`sink`] sends
//! it, by [`calls`] that may fail or to [`kafka`]. [`database`] runs all that belongs to one database and starts it anew when the connection breaks; [`daemon`] runs
//! all databases until the process is asked to stop.

pub mod adopt;
pub mod calls;
pub mod causes;
pub mod check;
pub mod cli;
pub mod config;
pub mod coordinator;
pub mod daemon;
pub mod database;
pub mod deliveries;
pub mod kafka;
pub mod logging;
pub mod operate;
pub mod pipeline;
pub mod postgres;
pub mod server;
pub mod session;
pub mod sink;
pub mod source;
pub mod table;
