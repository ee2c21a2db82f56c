// SPDX-License-Identifier: PostgreSQL
//! A session with a database: from hello until the first of its connections breaks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info};
use uuid::Uuid;

use crate::config::Config;
use crate::coordinator::branch::Caller;
use crate::coordinator::shards::Shards;
use crate::coordinator::{self, Coordinator};
use crate::deliveries::{Common, Deliveries};
use crate::pipeline::budget::Budget;
use crate::sink::Outlets;
use crate::source::connect::Connector;
use crate::source::cursors::{self, Cursors};
use crate::source::due;
use crate::source::error::SourceError;
use crate::source::head::{self, Pace};
use crate::source::hello::{self, Greeting};
use crate::source::leases::{self, Assignments, Identity, Told};
use crate::source::origin;
use crate::source::pages::Pages;
use crate::source::tail::Tail;
use crate::source::transactions::{self, Store};
use crate::source::upkeep;

/// Connections that pages are read over.
const READERS: usize = 2;

/// Leases that wait to be given up; more are with the next heartbeat.
const GIVEN: usize = 64;

/// What storing the last cursors may take, beyond what is in flight.
const STORING: Duration = Duration::from_secs(2);

/// What giving up the leases may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Tasks that each have a connection of their own: one that waits holds up no other.
type Roles = JoinSet<Result<(), SourceError>>;

/// What all databases of a relay share.
pub struct Shared {
    /// Who this process is towards databases: the same over reconnects, so that it keeps its leases.
    pub relay: Uuid,
    /// By what events go out.
    pub outlets: Outlets,
    /// Memory.
    pub budget: Budget,
    /// Settings.
    pub config: Config,
}

/// A session.
pub struct Session {
    roles: Roles,
    deliveries: Deliveries,
    coordinator: Arc<Coordinator>,
    cursors: Arc<Cursors>,
    assignments: watch::Receiver<Assignments>,
    release: CancellationToken,
    /// How long its pipelines may take to end.
    patience: Duration,
}

impl Session {
    /// Delivers until `stop`, which ends it in good order, or until a connection breaks. `unstored` is set to whether it
    /// leaves deliveries that no stored cursor covers; a session that does not come about leaves it as it is.
    pub async fn run(
        connector: &Connector,
        shared: &Shared,
        stop: &CancellationToken,
        unstored: &mut bool,
    ) -> Result<(), SourceError> {
        let mut session = tokio::select! {
            begun = Session::begin(connector, shared) => begun?,
            () = stop.cancelled() => return Ok(()),
        };
        let ended = session.work(stop).await;
        // Nothing of a session outlives it: the next one begins with what is stored.
        session.deliveries.abort().await;
        session.roles.shutdown().await;
        *unstored = session.cursors.has_unstored();
        ended
    }

    async fn begin(connector: &Connector, shared: &Shared) -> Result<Self, SourceError> {
        let config = &shared.config;
        let first = connector.connect().await?;
        let greeting = hello::hello(&first, &config.environment).await?;
        let others = try_join_all((0..READERS + 6).map(|_| connector.connect())).await?;
        origin::same(&first, &others).await?;
        let mut others = others.into_iter();
        let mut next =
            || others.next().ok_or_else(|| SourceError::Unreachable("a connection is missing".into()));
        let (lease_link, cursor_link, due_link, upkeep_link) = (next()?, next()?, next()?, next()?);
        let (transaction_reads, transaction_writes) = (next()?, next()?);
        let pages = Arc::new(Pages::new(others.collect()).await?);
        announce(connector, &greeting);

        let now = Instant::now();
        let (heads, head) = watch::channel(None);
        let (valid_until, valid) = watch::channel(now);
        let (assigned, assignments) = watch::channel(None);
        let cursors = Arc::new(Cursors::default());
        let release = CancellationToken::new();
        let identity = Identity { relay: shared.relay, name: config.name.clone(), lease: config.lease };
        let pace = Pace { busy: config.poll_busy, idle: config.poll_idle };
        let (given, gives) = mpsc::channel(GIVEN);
        let told = Told { valid_until, assignments: assigned, given: gives };
        let tail = Arc::new(Tail::default());

        let (store, counters) = Store::new();
        let caller = Caller::new(shared.outlets.clone(), greeting.source.clone());
        let (shards, owned_shards) = watch::channel(Shards::default());
        let coordinator = Coordinator::new(store, caller, valid.clone(), owned_shards.clone());

        let mut roles = Roles::new();
        let common = Common {
            source: greeting.source.clone(),
            pages,
            tail: tail.clone(),
            given,
            heads: head,
            cursors: cursors.clone(),
            valid_until: valid,
            outlets: shared.outlets.clone(),
            coordinator: coordinator.clone(),
            shards,
            budget: shared.budget.clone(),
            subscription_bytes: config.subscription_bytes,
            bounds: config.pipeline_bounds(),
        };
        roles.spawn(endless(head::follow(first, greeting, pace, tail, heads)).in_current_span());
        roles.spawn(leases::follow(lease_link, identity, told, release.clone()).in_current_span());
        roles.spawn(endless(cursors::follow(cursor_link, cursors.clone())).in_current_span());
        roles.spawn(endless(due::follow(due_link)).in_current_span());
        roles.spawn(endless(upkeep::follow(upkeep_link, config.upkeep)).in_current_span());
        let store = transactions::follow(transaction_reads, transaction_writes, counters);
        roles.spawn(endless(store).in_current_span());
        let due = coordinator::due::follow(coordinator.clone(), owned_shards);
        roles.spawn(endless(async { Ok(due.await) }).in_current_span());
        let (deliveries, patience) = (Deliveries::new(common), config.shutdown + STORING);
        Ok(Session { roles, deliveries, coordinator, cursors, assignments, release, patience })
    }

    async fn work(&mut self, stop: &CancellationToken) -> Result<(), SourceError> {
        loop {
            tokio::select! {
                Some(role) = self.roles.join_next() => return Err(why(role)),
                ended = self.deliveries.ended() => {
                    ended?;
                    // It may have been one that another relay waits for.
                    self.reconcile();
                }
                changed = self.assignments.changed() => {
                    if changed.is_err() {
                        // The leases' task has ended: its error comes by the first branch.
                        self.assignments = watch::channel(None).1;
                        continue;
                    }
                    self.reconcile();
                }
                () = stop.cancelled() => return self.stop().await,
            }
        }
    }

    fn reconcile(&mut self) {
        let assigned = self.assignments.borrow_and_update().clone();
        self.deliveries.reconcile(assigned.as_deref().map_or(&[], Vec::as_slice));
    }

    /// Waits for what is in flight, stores the last cursors and gives up the leases. Heartbeats go on meanwhile. A cursor that
    /// somebody else's transaction holds up is given up in the end, and holds up no other.
    async fn stop(&mut self) -> Result<(), SourceError> {
        self.deliveries.reconcile(&[]);
        let patience = tokio::time::sleep(self.patience);
        tokio::pin!(patience);
        while !self.deliveries.is_empty() {
            tokio::select! {
                Some(role) = self.roles.join_next() => return Err(why(role)),
                ended = self.deliveries.ended() => ended?,
                () = &mut patience => {
                    tracing::error!("some cursors could not be stored: what was delivered since is repeated");
                    self.deliveries.abort().await;
                }
            }
        }
        tokio::select! {
            Some(role) = self.roles.join_next() => return Err(why(role)),
            () = self.coordinator.idle() => {}
            () = &mut patience => tracing::warn!("calls of some transactions are repeated: they have not ended in time"),
        }
        self.release.cancel();
        let released = tokio::time::timeout(FAREWELL, async {
            match self.roles.join_next().await {
                None | Some(Ok(Ok(()))) => Ok(()),
                Some(other) => Err(why(other)),
            }
        });
        released.await.unwrap_or(Err(SourceError::Silent { what: "releasing leases", limit: FAREWELL }))
    }
}

async fn endless(role: impl Future<Output = Result<Infallible, SourceError>>) -> Result<(), SourceError> {
    role.await.map(|never| match never {})
}

/// Why a task that should go on has ended.
fn why(ended: Result<Result<(), SourceError>, JoinError>) -> SourceError {
    match ended {
        Ok(Err(error)) => error,
        Ok(Ok(())) => SourceError::Unreachable("a task of the session has ended".into()),
        Err(error) => SourceError::Unreachable(format!("a task of the session failed: {error}")),
    }
}

fn announce(connector: &Connector, greeting: &Greeting) {
    info!(
        extension = greeting.version,
        wakes = if greeting.preloaded { "by commit" } else { "by polling" },
        "connected to {}",
        connector.settings().describe()
    );
}
