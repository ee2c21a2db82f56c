// SPDX-License-Identifier: PostgreSQL
//! The functions that a relay calls and that are not SQL: reading pages, and waiting.

mod page;
mod wait;
