// SPDX-License-Identifier: PostgreSQL
//! What takes long: crashes, PgBouncer, the relay's life.
