// SPDX-License-Identifier: PostgreSQL
//! `dtm.shard_of`: what decides between shards in a page, for SQL.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::refusal::Refusal;
use crate::varlena;

#[pg_extern]
fn shard_of(fcinfo: pg_sys::FunctionCallInfo) -> Result<i32, ErrorReport> {
    // SAFETY: called with the arguments that 08-retries.sql declares: text, bigint, int.
    let (key, seq, shards) = unsafe {
        let key = pgrx::fcinfo::pg_getarg_datum(fcinfo, 0);
        let key = key.map(|key| varlena::to_utf8(varlena::bytes(key)));
        (key, pgrx::fcinfo::pg_getarg::<i64>(fcinfo, 1), pgrx::fcinfo::pg_getarg::<i32>(fcinfo, 2))
    };
    match (seq, shards) {
        (Some(seq), Some(shards)) if shards >= 1 => Ok(dtm_core::shard::shard_of(key, seq, shards)),
        _ => {
            let detail = format!("The sequence number is {seq:?}, the number of shards {shards:?}.");
            Err(Refusal::argument("an event of no shard", detail, "A subscription has 1 to 64 shards.")
                .into())
        }
    }
}
