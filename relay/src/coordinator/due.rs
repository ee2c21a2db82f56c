// SPDX-License-Identifier: PostgreSQL
//! Transactions whose time has come: those that were prepared and nobody has decided, those that were delayed, and those that
//! have failed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument as _;

use super::drive::Coordinator;
use super::shards::Shards;
use crate::source::transactions::Wanted;

/// So many are worked at.
const AT_ONCE: usize = 512;
/// Something may be made due at any time.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Works at what is due, for ever.
pub async fn follow(coordinator: Arc<Coordinator>, mut shards: watch::Receiver<Shards>) -> Infallible {
    let mut passes = JoinSet::new();
    let mut look_at = Instant::now();
    loop {
        let owned = shards.borrow_and_update().clone();
        tokio::select! {
            Some(_) = passes.join_next() => while passes.try_join_next().is_some() {},
            Ok(()) = shards.changed() => look_at = Instant::now(),
            () = sleep_until(look_at), if !owned.own.is_empty() && passes.len() < AT_ONCE => {
                let most = AT_ONCE - passes.len();
                let busy = coordinator.busy();
                let (rooms, usual) = coordinator.rooms();
                let wanted = Wanted {
                    shards: owned.of,
                    own: owned.own,
                    busy,
                    most: i32::try_from(most).unwrap_or(i32::MAX),
                    rooms,
                    usual,
                };
                let due = coordinator.store().due(wanted).await;
                let (is_all, is_none) = (due.gids.len() < most, due.gids.is_empty());
                for gid in due.gids {
                    let coordinator = coordinator.clone();
                    passes.spawn(async move { coordinator.drive(&gid).await }.in_current_span());
                }
                // More may wait for the same endpoints, which have room again soon.
                let soon = LOOK_EVERY / 10;
                look_at = match (is_all, is_none) {
                    (false, _) => Instant::now(),
                    (true, false) => Instant::now() + soon,
                    (true, true) => Instant::now() + due.next_in.map_or(LOOK_EVERY, |next| next.clamp(soon, LOOK_EVERY)),
                };
            }
        }
    }
}
