// SPDX-License-Identifier: PostgreSQL
//! Where events go. A sink knows events and destinations, and nothing of PostgreSQL, cursors or retries.

pub mod cloudevents;
pub mod http;
