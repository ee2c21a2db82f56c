// SPDX-License-Identifier: PostgreSQL
//! Random schedules over real sessions: what a schedule is, how it is drawn from a seed, and the sessions that run it.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

/// Sessions that write.
const WRITERS: usize = 5;
/// The subscription that a transaction of a schedule can make.
pub const INSIDE: &str = "inside";
/// Aggregates, of which one transaction at a time has the lock.
const KEYS: usize = 3;

/// What has been asked of the database and what it answered: the truth that a reader is held against.
#[derive(Default)]
pub struct Truth {
    /// Events of transactions that committed, in the order of the commits, and of publishing inside a transaction.
    pub committed: Vec<Published>,
    /// A transaction of the schedule subscribed [`INSIDE`] and committed: how many of `committed` it does not get, which are
    /// those that were committed when it subscribed.
    pub subscribed_behind: Option<usize>,
}

/// One event as it was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Counts all events of all schedules.
    pub n: i64,
    /// Whose events keep their order, since their publishers hold a row lock.
    pub key: Option<String>,
}

#[derive(Default)]
struct Transaction {
    open: bool,
    /// Published so far, by savepoint: rolling back to a savepoint drops the last list.
    events: Vec<Vec<Published>>,
    locked: BTreeSet<usize>,
    subscribed_behind: Option<usize>,
}

/// The writers of a schedule.
pub struct Writers<'a> {
    clients: &'a [Client],
    transactions: Vec<Transaction>,
    prepared: BTreeMap<String, Transaction>,
    random: StdRng,
    next_n: i64,
    has_subscribed: bool,
    seed: u64,
    pub truth: Truth,
}

impl<'a> Writers<'a> {
    /// `clients` has [`WRITERS`] sessions; `seed` decides everything that they do.
    pub fn new(clients: &'a [Client], seed: u64) -> Self {
        assert_eq!(clients.len(), WRITERS);
        Writers {
            clients,
            transactions: (0..WRITERS).map(|_| Transaction::default()).collect(),
            prepared: BTreeMap::new(),
            random: StdRng::seed_from_u64(seed),
            next_n: 0,
            has_subscribed: false,
            seed,
            truth: Truth::default(),
        }
    }

    /// How many sessions a schedule needs.
    pub const fn sessions() -> usize {
        WRITERS
    }

    async fn run(&self, writer: usize, sql: &str) {
        let client = &self.clients[writer];
        client
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("seed {}: {sql}: {error:?}", self.seed));
    }

    /// One random step of one random session.
    pub async fn step(&mut self) {
        let writer = self.random.random_range(0..WRITERS);
        if !self.transactions[writer].open {
            return self.step_outside(writer).await;
        }
        match self.random.random_range(0..13) {
            0 => self.run(writer, "SELECT pg_current_xact_id()").await,
            1..=5 => self.publish(writer).await,
            6 => self.savepoint(writer).await,
            7 => self.rollback_to(writer).await,
            8 | 9 => self.end(writer, true).await,
            10 => self.end(writer, false).await,
            11 => self.subscribe(writer).await,
            _ => self.prepare(writer).await,
        }
    }

    async fn step_outside(&mut self, writer: usize) {
        match self.random.random_range(0..8) {
            0 => self.run(writer, "SELECT pg_current_xact_id()").await,
            1 | 2 if !self.prepared.is_empty() => self.end_prepared(writer).await,
            _ => {
                // In one of REPEATABLE READ the snapshot is as old as its first statement.
                let repeatable_read = self.random.random_range(0..3) == 0;
                self.run(
                    writer,
                    if repeatable_read { "BEGIN ISOLATION LEVEL REPEATABLE READ" } else { "BEGIN" },
                )
                .await;
                if repeatable_read {
                    self.run(writer, "SELECT count(*) FROM dtm.log").await;
                }
                self.transactions[writer] =
                    Transaction { open: true, events: vec![Vec::new()], ..Transaction::default() };
            }
        }
    }

    fn free_key(&mut self, writer: usize) -> Option<usize> {
        let key = self.random.random_range(0..KEYS);
        let prepared = self.prepared.values();
        let others = self.transactions.iter().enumerate().filter(|(at, _)| *at != writer).map(|(_, tx)| tx);
        let taken = others.chain(prepared).any(|tx| tx.locked.contains(&key));
        (!taken).then_some(key)
    }

    async fn publish(&mut self, writer: usize) {
        let key = self.free_key(writer);
        let many = self.random.random_range(0..4) == 0;
        let mut published = Vec::new();
        for _ in 0..if many { 3 } else { 1 } {
            self.next_n += 1;
            published.push(Published { n: self.next_n, key: key.map(|key| format!("k{key}")) });
        }
        if let Some(key) = key {
            self.run(writer, &format!("SELECT FROM aggregate WHERE id = {key} FOR UPDATE")).await;
            self.transactions[writer].locked.insert(key);
        }
        let key = key.map_or("NULL".to_owned(), |key| format!("'k{key}'"));
        let sql = match &published[..] {
            [one] => format!("SELECT dtm.publish('t.x', '{}', key => {key})", one.n),
            all => {
                let payloads: Vec<String> = all.iter().map(|event| event.n.to_string()).collect();
                let keys = vec![key; all.len()].join(",");
                format!(
                    "SELECT dtm.publish_many('t.x', '{{{}}}', keys => ARRAY[{keys}]::text[])",
                    payloads.join(",")
                )
            }
        };
        self.run(writer, &sql).await;
        let events = &mut self.transactions[writer].events;
        events.last_mut().expect("an open transaction has a list").extend(published);
    }

    /// Once in a schedule, and not where a rollback to a savepoint would take it back.
    async fn subscribe(&mut self, writer: usize) {
        if self.has_subscribed || self.transactions[writer].events.len() > 1 {
            return;
        }
        self.has_subscribed = true;
        self.run(writer, &format!("SELECT dtm.subscribe('{INSIDE}', 't.*', 'http://127.0.0.1:9/')")).await;
        self.transactions[writer].subscribed_behind = Some(self.truth.committed.len());
    }

    fn committed(&mut self, transaction: Transaction) {
        self.truth.committed.extend(transaction.events.into_iter().flatten());
        self.truth.subscribed_behind = self.truth.subscribed_behind.or(transaction.subscribed_behind);
    }

    async fn savepoint(&mut self, writer: usize) {
        self.run(writer, "SAVEPOINT s").await;
        self.transactions[writer].events.push(Vec::new());
    }

    async fn rollback_to(&mut self, writer: usize) {
        if self.transactions[writer].events.len() < 2 {
            return;
        }
        self.run(writer, "ROLLBACK TO s").await;
        let events = &mut self.transactions[writer].events;
        // The savepoint itself stays; the row locks taken after it are let go, which the model need not know.
        *events.last_mut().expect("two lists") = Vec::new();
    }

    async fn end(&mut self, writer: usize, commit: bool) {
        self.run(writer, if commit { "COMMIT" } else { "ROLLBACK" }).await;
        let transaction = std::mem::take(&mut self.transactions[writer]);
        if commit {
            self.committed(transaction);
        }
    }

    async fn prepare(&mut self, writer: usize) {
        let gid = format!("{}-{}-{writer}", self.seed, self.next_n);
        if self.prepared.contains_key(&gid) {
            return;
        }
        self.run(writer, &format!("PREPARE TRANSACTION '{gid}'")).await;
        let transaction = std::mem::take(&mut self.transactions[writer]);
        self.prepared.insert(gid, transaction);
    }

    async fn end_prepared(&mut self, writer: usize) {
        let at = self.random.random_range(0..self.prepared.len());
        let gid = self.prepared.keys().nth(at).cloned().expect("in range");
        let transaction = self.prepared.remove(&gid).expect("just found");
        let commit = self.random.random_range(0..3) > 0;
        self.run(writer, &format!("{} PREPARED '{gid}'", if commit { "COMMIT" } else { "ROLLBACK" })).await;
        if commit {
            self.committed(transaction);
        }
    }

    /// Ends everything that is open, at random.
    pub async fn end_all(&mut self) {
        for writer in 0..WRITERS {
            if self.transactions[writer].open {
                let commit = self.random.random_range(0..4) > 0;
                self.end(writer, commit).await;
            }
        }
        while !self.prepared.is_empty() {
            self.end_prepared(0).await;
        }
    }
}
