// SPDX-License-Identifier: PostgreSQL
//! Passes over transactions: reads one, does what its machine says, stores what came of it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dtm_core::transaction::Options;
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::branch::{Call, Called, Caller};
use super::machine::{Branch, Kind, Machine, Next, Report, State, Status};
use super::settlement::{PAUSE_MAX, Settlement, TURN, Then, pause};
use super::shards::Shards;
use crate::source::transactions::Store;
use crate::source::unfinished::Found;

/// After somebody else has changed a transaction.
const AGAIN: Duration = Duration::from_millis(50);
/// After so many failures in a row people are told, and each time that it has become twice as many.
const ALARM_AFTER: u32 = 4;

/// Drives the transactions of one database to their end.
pub struct Coordinator {
    store: Store,
    caller: Caller,
    /// Until when anything may be called.
    valid_until: watch::Receiver<Instant>,
    /// Whose transactions are called.
    shards: watch::Receiver<Shards>,
    /// Transactions that a pass is made over.
    busy: Mutex<HashSet<String>>,
    /// One of them is done.
    freed: Notify,
}

/// A branch as dtm.transaction has it.
#[derive(Debug, Deserialize)]
struct Step {
    branch_id: String,
    op: String,
    action: String,
    key: Option<String>,
    headers: Option<serde_json::Value>,
}

/// A branch as dtm.branch has it.
#[derive(Debug, Deserialize)]
struct Known {
    branch_id: String,
    op: String,
    status: String,
    attempts: u32,
}

/// A transaction that was read.
struct Transaction {
    gid: String,
    trans_type: String,
    query_prepared: Option<String>,
    options: Options,
    steps: Vec<Step>,
    /// Headers of steps, as text.
    headers: Vec<Option<String>>,
    payloads: Vec<Option<Bytes>>,
    state: State,
    /// When it was asked for: it is not older than that.
    read_at: Instant,
    /// Since it was made, at that time.
    age: Duration,
    /// What the payloads take of the memory for them.
    _room: OwnedSemaphorePermit,
}

impl Coordinator {
    /// Of the transactions in a store.
    pub fn new(
        store: Store,
        caller: Caller,
        valid_until: watch::Receiver<Instant>,
        shards: watch::Receiver<Shards>,
    ) -> Arc<Self> {
        let (busy, freed) = (Mutex::default(), Notify::new());
        Arc::new(Coordinator { store, caller, valid_until, shards, busy, freed })
    }

    /// The transactions themselves.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Endpoints that take no more calls than so many now, and how many any other takes.
    pub fn rooms(&self) -> (Vec<(String, i32)>, i32) {
        self.caller.rooms()
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a pass is being made over.
    pub fn busy(&self) -> Vec<String> {
        self.lock().iter().cloned().collect()
    }

    /// Whether a pass is being made over a transaction of these shards.
    pub fn is_busy_in(&self, shards: &Shards) -> bool {
        self.lock().iter().any(|gid| shards.have(gid))
    }

    /// Waits until no pass is being made.
    pub async fn idle(&self) {
        self.until(|busy| busy.is_empty()).await;
    }

    /// Waits until something holds of what is busy: it is looked at now, and whenever a pass is over.
    async fn until(&self, mut holds: impl FnMut(&mut HashSet<String>) -> bool) {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if holds(&mut self.lock()) {
                return;
            }
            freed.await;
        }
    }

    /// Makes a pass over a transaction: when it returns, the transaction has ended, or waits in dtm.due, or for somebody's
    /// decision.
    pub async fn drive(&self, gid: &str) {
        let _busy = self.begin(gid).await;
        loop {
            self.valid().await;
            let begun = Instant::now();
            let Some(found) = self.store.find(gid).await else { return };
            let over = match Transaction::read(found, begun) {
                Ok(transaction) => self.pass(&transaction).await,
                Err((status, problem)) => self.give_up(gid, &status, &problem).await,
            };
            if over {
                return;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// One pass at a time over each.
    async fn begin<'a>(&'a self, gid: &str) -> Busy<'a> {
        self.until(|busy| busy.insert(gid.to_owned())).await;
        Busy { coordinator: self, gid: gid.to_owned() }
    }

    /// Waits until something may be called. True: nobody else can have gone on meanwhile.
    async fn valid(&self) -> bool {
        let mut valid_until = self.valid_until.clone();
        let holds = |until: &Instant| *until > Instant::now();
        if holds(&valid_until.borrow()) {
            return true;
        }
        if valid_until.wait_for(holds).await.is_err() {
            std::future::pending().await
        }
        false
    }

    /// False: the transaction is not as it was when it was read.
    async fn pass(&self, transaction: &Transaction) -> bool {
        let mut machine = Machine::new(transaction.state.clone());
        loop {
            match machine.step() {
                Next::AskWhetherCommitted => {
                    if !self.valid().await {
                        return false;
                    }
                    machine.told_whether_committed(self.ask_whether_committed(transaction).await);
                }
                Next::StoreSubmitted => {
                    let from = transaction.state.status;
                    let submitted = json!({
                        "gid": transaction.gid, "from": from.to_string(), "to": "submitted", "failures": 0, "retry_in": 0,
                    });
                    if !self.store.settle(submitted).await {
                        return false;
                    }
                    machine.stored();
                }
                // Whoever takes its shard over goes on with it.
                Next::Call(_) if !self.shards.borrow().have(&transaction.gid) => {
                    return self.settle(transaction, machine.settle()).await;
                }
                Next::Call(branches) => {
                    if !self.valid().await {
                        return false;
                    }
                    let calls = branches.iter().map(|&at| self.call(transaction, transaction.call(at)));
                    for (at, report) in branches.iter().zip(join_all(calls).await) {
                        machine.answered(*at, report);
                    }
                }
                Next::Settle => return self.settle(transaction, machine.settle()).await,
            }
        }
    }

    async fn call(&self, transaction: &Transaction, call: Call<'_>) -> Report {
        self.report(self.caller.call(call, &transaction.options).await).await
    }

    async fn report(&self, called: Called) -> Report {
        if let Some(endpoint) = called.revived {
            self.store.revive(&endpoint).await;
        }
        called.report
    }

    async fn ask_whether_committed(&self, transaction: &Transaction) -> Report {
        let action = transaction.query_prepared.as_deref().unwrap_or_default();
        let is_repeated = transaction.state.failures > 0;
        let call =
            Call { branch_id: "00", op: "msg", action, payload: None, is_repeated, ..transaction.call(0) };
        let age = transaction.age + transaction.read_at.elapsed();
        self.report(self.caller.ask_whether_committed(call, age, &transaction.options).await).await
    }

    async fn settle(&self, transaction: &Transaction, settlement: Settlement) -> bool {
        if settlement.is_clean {
            return self.store.succeed(&transaction.gid).await;
        }
        let stuck = settlement.then == Then::Decide;
        let (retry_in, endpoint) = match &settlement.then {
            Then::End | Then::Decide => (None, None),
            Then::Again { endpoint } => {
                // Turns are taken in the order of what waits: chance has no part in that.
                let pause = match settlement.waits_its_turn {
                    true => TURN,
                    false => pause(transaction.options.retry_interval, settlement.failures, rand::random()),
                };
                let pause = pause.max(settlement.not_before.unwrap_or_default().min(PAUSE_MAX));
                (Some(pause.as_secs_f64()), endpoint.as_deref())
            }
        };
        let branches: Vec<_> = settlement.results.iter().map(|result| {
            let step = &transaction.steps[result.branch];
            json!({
                "branch_id": step.branch_id, "op": step.op, "status": if result.is_done { "succeed" } else { "prepared" },
                "attempts": result.attempts, "last_status": result.status, "last_error": result.error,
            })
        }).collect();
        // Where a branch was called, its row tells what went wrong.
        let is_told = settlement.from != Status::Prepared && !stuck && !settlement.waits_its_turn;
        let settled = json!({
            "gid": transaction.gid, "from": settlement.from.to_string(), "to": settlement.to.to_string(),
            "reason": settlement.error.as_ref().filter(|_| settlement.to == Status::Failed),
            "error": settlement.error.as_ref().filter(|_| !is_told), "failures": settlement.failures,
            "retry_in": retry_in, "endpoint": endpoint, "failed_before": settlement.failed_before, "stuck": stuck,
            "took": transaction.read_at.elapsed().as_secs_f64(), "branches": branches,
        });
        let stored = self.store.settle(settled).await;
        // It may have begun to work since it was called: then nobody else says so.
        if stored
            && let Some(endpoint) = endpoint
            && self.caller.is_up(endpoint)
        {
            self.store.revive(endpoint).await;
        }
        if stored {
            tell(transaction, &settlement);
        }
        stored
    }

    /// One that cannot be read waits for somebody's decision.
    async fn give_up(&self, gid: &str, status: &str, problem: &str) -> bool {
        tracing::error!(gid, "the transaction cannot be driven: {problem}");
        let settlement =
            json!({"gid": gid, "from": status, "to": status, "error": problem, "failures": 0, "stuck": true});
        self.store.settle(settlement).await
    }
}

/// Tells people of what has failed often, and of what waits for them.
fn tell(transaction: &Transaction, settlement: &Settlement) {
    let (gid, error) = (&transaction.gid, settlement.error.as_deref().unwrap_or_default());
    let failures = settlement.failures;
    match settlement.then {
        Then::Decide => {
            let hint = match settlement.to {
                Status::Prepared => "dtm.msg_submit, dtm.msg_abort or dtm.force_stop decide it",
                _ => "dtm.retry_now goes on with it, dtm.force_stop ends it",
            };
            tracing::error!(gid, hint, "the transaction stands still: {error}");
        }
        Then::Again { .. } if settlement.waits_its_turn => {}
        Then::Again { .. } if failures >= ALARM_AFTER && failures.is_power_of_two() => {
            tracing::warn!(gid, failures, "the transaction goes on failing: {error}");
        }
        Then::Again { .. } | Then::End => {}
    }
}

impl Transaction {
    /// An error is the status and what is wrong.
    fn read(found: Found, read_at: Instant) -> Result<Self, (String, String)> {
        let status = found.status.clone();
        Self::parse(found, read_at).map_err(|problem| (status, problem))
    }

    fn parse(found: Found, read_at: Instant) -> Result<Self, String> {
        let json = |error: serde_json::Error| error.to_string();
        let kind =
            Kind::parse(&found.trans_type).ok_or_else(|| format!("trans_type {}", found.trans_type))?;
        let status = Status::parse(&found.status).ok_or_else(|| format!("status {}", found.status))?;
        let options = serde_json::from_str(&found.options).map_err(json)?;
        let options = Options::from_json(&options).map_err(|error| error.to_string())?;
        let steps: Vec<Step> = serde_json::from_str(&found.branches).map_err(json)?;
        let known = found
            .known
            .as_deref()
            .map_or(Ok(Vec::new()), serde_json::from_str::<Vec<Known>>)
            .map_err(json)?;
        let branch = |step: &Step| {
            let row = known.iter().find(|known| known.branch_id == step.branch_id && known.op == step.op);
            Branch {
                is_done: row.is_some_and(|row| row.status == "succeed"),
                attempts: row.map_or(0, |row| row.attempts),
                has_row: row.is_some(),
            }
        };
        let mut payloads: Vec<_> =
            found.payloads.into_iter().map(|payload| payload.map(Bytes::from)).collect();
        payloads.resize(steps.len(), None);
        let state = State {
            kind,
            status,
            branches: steps.iter().map(branch).collect(),
            concurrent: options.concurrent,
            retry_limit: options.retry_limit,
            failures: found.failures,
            undecidable: found.undecidable,
            waits: found.waits,
        };
        Ok(Transaction {
            gid: found.gid,
            trans_type: found.trans_type,
            query_prepared: found.query_prepared,
            headers: steps.iter().map(|step| step.headers.as_ref().map(ToString::to_string)).collect(),
            options,
            steps,
            payloads,
            state,
            read_at,
            age: Duration::try_from_secs_f64(found.age).unwrap_or_default(),
            _room: found.room,
        })
    }

    fn call(&self, at: usize) -> Call<'_> {
        let step = &self.steps[at];
        Call {
            gid: &self.gid,
            trans_type: &self.trans_type,
            branch_id: &step.branch_id,
            op: &step.op,
            action: &step.action,
            payload: self.payloads[at].as_ref(),
            key: step.key.as_deref(),
            headers: self.headers[at].as_deref(),
            is_repeated: self.state.branches[at].attempts > 0,
        }
    }
}

/// A pass is being made.
struct Busy<'a> {
    coordinator: &'a Coordinator,
    gid: String,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.coordinator.lock().remove(&self.gid);
        self.coordinator.freed.notify_waiters();
    }
}
