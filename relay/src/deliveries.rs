// SPDX-License-Identifier: PostgreSQL
//! The pipelines of one database, kept in step with what its leases say.

use std::collections::HashMap;
use std::sync::Arc;

use dtm_core::destination::Destination;
use dtm_core::options::Options;
use dtm_core::transaction::COORDINATOR;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info};

use crate::coordinator::Coordinator;
use crate::coordinator::shards::Shards;
use crate::pipeline::budget::{Budget, Share};
use crate::pipeline::run::{Bounds, Pipeline, TELL_EVERY};
use crate::sink::{Outlets, Sink};
use crate::source::cursors::{Cursors, Owner};
use crate::source::error::SourceError;
use crate::source::head::Head;
use crate::source::leases::{Assignment, Given};
use crate::source::pages::{Pages, Wanted};
use crate::source::tail::Tail;

/// What all pipelines of a session share.
pub struct Common {
    /// Who the events are from.
    pub source: String,
    /// Where pages come from.
    pub pages: Arc<Pages>,
    /// Where they come from at the end of the log.
    pub tail: Arc<Tail>,
    /// The newest head.
    pub heads: watch::Receiver<Head>,
    /// Where cursors are left.
    pub cursors: Arc<Cursors>,
    /// Until when anything may be sent.
    pub valid_until: watch::Receiver<Instant>,
    /// Where leases are given up.
    pub given: mpsc::Sender<Given>,
    /// By what events go out.
    pub outlets: Outlets,
    /// What drives global transactions, and where it is told which.
    pub coordinator: Arc<Coordinator>,
    /// See above.
    pub shards: watch::Sender<Shards>,
    /// Memory of the whole relay.
    pub budget: Budget,
    /// Memory of one pipeline.
    pub subscription_bytes: usize,
    /// Bounds of one pipeline.
    pub bounds: Bounds,
}

/// What a page for Kafka has at the least.
const KAFKA_PAGE_EVENTS: usize = 4_000;
const KAFKA_PAGE_BYTES: usize = 2 * 1024 * 1024;

type Key = (i64, i32);

/// A pipeline, or the last one that there was.
struct Running {
    /// What it delivers; `None`: it is to stop.
    assignment: Option<Assignment>,
    drain: CancellationToken,
    /// Cancelled when its task has ended.
    ended: CancellationToken,
}

/// All pipelines of a session.
pub struct Deliveries {
    common: Common,
    running: HashMap<Key, Running>,
    tasks: JoinSet<Result<(), SourceError>>,
}

impl Deliveries {
    /// No pipelines yet.
    pub fn new(common: Common) -> Self {
        Deliveries { common, running: HashMap::new(), tasks: JoinSet::new() }
    }

    /// Whether no pipeline runs.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Waits for a pipeline to end. An error is one of the database connection. Waits for ever if there is none.
    pub async fn ended(&mut self) -> Result<(), SourceError> {
        match self.tasks.join_next().await {
            Some(Ok(result)) => result?,
            Some(Err(error)) => return Err(SourceError::Unreachable(format!("a pipeline failed: {error}"))),
            None => std::future::pending().await,
        }
        self.running.retain(|_, running| running.assignment.is_some() || !running.ended.is_cancelled());
        Ok(())
    }

    /// Stops all pipelines at once.
    pub async fn abort(&mut self) {
        self.tasks.shutdown().await;
    }

    /// Starts what is new, stops what is gone, and starts anew what has changed, from where its cursor stands.
    pub fn reconcile(&mut self, assigned: &[Assignment]) {
        let place = |assignment: &Assignment| (assignment.subscription, assignment.shard);
        let kept = || assigned.iter().filter(|assignment| !assignment.release);
        self.common.tail.serve(kept().map(wanted));
        self.coordinate(kept());
        let wanted: HashMap<Key, &Assignment> =
            kept().map(|assignment| (place(assignment), assignment)).collect();
        for (key, running) in &mut self.running {
            if wanted.contains_key(key) {
                continue;
            }
            if let Some(gone) = running.assignment.take() {
                info!(subscription = gone.name, shard = gone.shard, "no longer delivered here");
                running.drain.cancel();
            }
        }
        for assignment in assigned.iter().filter(|assignment| assignment.release) {
            // What still drains is given up when it has ended: it is asked for again with each heartbeat.
            let drains =
                self.running.get(&place(assignment)).is_some_and(|running| !running.ended.is_cancelled());
            let shard = Shards { of: assignment.shards, own: vec![assignment.shard] };
            let coordinates =
                assignment.destination == COORDINATOR && self.common.coordinator.is_busy_in(&shard);
            if !drains && !coordinates {
                let Assignment { subscription, shard, token, .. } = *assignment;
                let _ = self.common.given.try_send(Given { subscription, shard, token });
            }
        }
        for (key, assignment) in wanted {
            if self.running.get(&key).is_none_or(|running| running.assignment.as_ref() != Some(assignment)) {
                self.start(key, assignment);
            }
        }
    }

    /// What is due of global transactions goes with their subscription.
    fn coordinate<'a>(&self, kept: impl Iterator<Item = &'a Assignment>) {
        let own: Vec<_> = kept.filter(|assignment| assignment.destination == COORDINATOR).collect();
        let of = own.first().map_or(1, |assignment| assignment.shards);
        let shards = Shards { of, own: own.iter().map(|assignment| assignment.shard).collect() };
        self.common.shards.send_if_modified(|old| std::mem::replace(old, shards.clone()) != shards);
    }

    fn start(&mut self, key: Key, assignment: &Assignment) {
        let before = self.running.remove(&key).map(|running| {
            running.drain.cancel();
            running.ended
        });
        let (drain, ended) = (CancellationToken::new(), CancellationToken::new());
        let pipeline = self.pipeline(assignment, drain.clone());
        if pipeline.is_ok() {
            info!(subscription = assignment.name, destination = assignment.destination, "delivering");
        }
        let (name, asked_to_stop) = (assignment.name.clone(), drain.clone());
        let end = ended.clone().drop_guard();
        let task = async move {
            let _end = end;
            // Its last cursor has to be stored before the new one reads it.
            if let Some(before) = before {
                before.cancelled().await;
            }
            match pipeline {
                Ok(pipeline) => pipeline.run().await,
                Err(problem) => {
                    asked_to_stop.run_until_cancelled(complain(&name, &problem)).await;
                    Ok(())
                }
            }
        };
        self.tasks.spawn(task.in_current_span());
        self.running.insert(key, Running { assignment: Some(assignment.clone()), drain, ended });
    }

    fn pipeline(&self, assignment: &Assignment, drain: CancellationToken) -> Result<Pipeline, String> {
        let common = &self.common;
        let destination = match assignment.destination.as_str() {
            COORDINATOR => None,
            text => Some(Destination::parse(text).map_err(|error| format!("destination {text}: {error}"))?),
        };
        let options = match &destination {
            Some(destination) => Options::for_destination(&assignment.options, destination),
            None => Options::from_json(&assignment.options),
        };
        let mut options = options.map_err(|error| error.to_string())?;
        // The limits are the subscription's: its shards share them evenly.
        options.max_in_flight = (options.max_in_flight / options.shards).max(1);
        options.rate_limit = options.rate_limit.map(|rate| rate / f64::from(options.shards));
        let sink = match destination {
            Some(destination) => {
                Sink::new(&common.outlets, destination, &options, &assignment.name, &common.source)
                    .map_err(|error| error.to_string())?
            }
            None => Sink::Coordinator(common.coordinator.clone()),
        };
        let mut bounds = common.bounds;
        if let Sink::Kafka(_) = sink {
            // It takes far more at once than an endpoint, and answers by the batch, some time later.
            bounds.events = bounds.events.max(options.max_in_flight as usize);
            bounds.page_events = bounds.page_events.max(KAFKA_PAGE_EVENTS);
            bounds.page_bytes = bounds.page_bytes.max(KAFKA_PAGE_BYTES);
        }
        let Assignment { subscription, shard, epoch, token, .. } = *assignment;
        Ok(Pipeline {
            name: assignment.name.clone(),
            owner: Owner { subscription, shard, epoch, token, fenced: CancellationToken::new() },
            wanted: Arc::new(wanted(assignment)),
            options,
            sink,
            pages: common.pages.clone(),
            tail: common.tail.clone(),
            heads: common.heads.clone(),
            cursors: common.cursors.clone(),
            valid_until: common.valid_until.clone(),
            share: Share::new(common.budget.clone(), common.subscription_bytes),
            bounds,
            drain,
        })
    }
}

fn wanted(assignment: &Assignment) -> Wanted {
    Wanted { unit: assignment.unit(), topics: assignment.topics.clone(), since: assignment.since }
}

/// Tells again and again why a subscription is not delivered.
async fn complain(subscription: &str, problem: &str) {
    let mut times = tokio::time::interval(TELL_EVERY);
    loop {
        times.tick().await;
        error!(subscription, "it is not delivered: {problem}");
    }
}
