// SPDX-License-Identifier: PostgreSQL
//! A server that DTM's clients take for DTM's own: they make transactions here that the coordinator drives to their end.
//!
//! A request's way: [`serve`] takes the connection, [`endpoints`] knows what is asked for, [`api`] does it and says what came of
//! it in the form of [`answer`].

pub mod answer;
pub mod api;
pub mod endpoints;
pub mod metrics;
pub mod request;
pub mod serve;
pub mod settings;
mod topics;
mod wait;
