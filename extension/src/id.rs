// SPDX-License-Identifier: PostgreSQL
//! Ids of events: UUIDv7, 48 bits of time in milliseconds and 74 bits from the operating system's generator.

use std::cell::RefCell;

use pgrx::prelude::*;

use crate::refusal::Refusal;

const UNIX_TO_POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Random bytes of one id.
const RANDOM_BYTES: usize = 10;

/// Ids for which random bytes are fetched at once: the generator costs more to ask than to run.
const POOL_IDS: usize = 256;

/// Random bytes not used yet. They are the backend's own: the pool is empty when the postmaster forks one, since nothing is
/// ever published in the postmaster.
struct Pool {
    bytes: [u8; RANDOM_BYTES * POOL_IDS],
    used: usize,
}

thread_local! {
    static POOL: RefCell<Pool> =
        const { RefCell::new(Pool { bytes: [0; RANDOM_BYTES * POOL_IDS], used: RANDOM_BYTES * POOL_IDS }) };
}

impl Pool {
    fn take(&mut self) -> Option<[u8; RANDOM_BYTES]> {
        if self.used == self.bytes.len() {
            // SAFETY: fills the buffer that it is given.
            if !unsafe { pg_sys::pg_strong_random(self.bytes.as_mut_ptr().cast(), self.bytes.len()) } {
                return None;
            }
            self.used = 0;
        }
        let mut random = [0; RANDOM_BYTES];
        random.copy_from_slice(&self.bytes[self.used..self.used + RANDOM_BYTES]);
        self.bytes[self.used..self.used + RANDOM_BYTES].fill(0);
        self.used += RANDOM_BYTES;
        Some(random)
    }
}

/// A new id of this time.
pub fn new(now: pg_sys::TimestampTz) -> [u8; 16] {
    let Some(random) = POOL.with_borrow_mut(Pool::take) else {
        let hint = "Try again; if it stays so, the operating system's random generator is broken.";
        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
        Refusal::new(code, "could not make an id", "There were no random bits.", hint).raise()
    };
    let milliseconds = ((now + UNIX_TO_POSTGRES_EPOCH_US) / 1_000) as u64;
    *uuid::Builder::from_unix_timestamp_millis(milliseconds, &random).into_uuid().as_bytes()
}
