// SPDX-License-Identifier: PostgreSQL
//! Writers that go on whatever happens, and what has to have arrived when they are done.
//!
//! Each event raises the version of a row that all writers share, and carries it under the row's key. What is rolled back or
//! lost in a crash takes its version along, so that the versions of a key arrive as 1, 2, 3 … only if nothing was lost, nothing
//! was delivered that does not exist, and the order held.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use dtm_tests::cluster::Cluster;
use dtm_tests::ledger::Ledger;
use dtm_tests::process;
use dtm_tests::receiver::{Received, Receiver};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls, Statement};

const AGGREGATES: u32 = 8;

/// What a writer does.
#[derive(Clone, Copy)]
pub struct Habits {
    /// One in so many commits is asynchronous: a crash may take it back.
    pub asynchronous_one_in: u32,
    /// One in so many transactions is prepared first: a crash finds it between PREPARE and COMMIT. 0: none.
    pub prepared_one_in: u32,
    /// A pause after each transaction.
    pub pause: Duration,
}

/// Running writers.
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Nobody waits for the server to come back.
    gone: Arc<AtomicBool>,
    survivors: Arc<AtomicUsize>,
    writers: Vec<JoinHandle<Ledger>>,
}

/// Makes the table that writers work on.
pub async fn prepare(client: &Client) {
    let sql = format!(
        "CREATE TABLE aggregate (name text PRIMARY KEY, version int NOT NULL); \
         INSERT INTO aggregate SELECT 'a' || n, 0 FROM generate_series(1, {AGGREGATES}) n"
    );
    client.batch_execute(&sql).await.expect("aggregates");
}

impl Load {
    /// Starts writers on a database that is prepared.
    pub fn start(cluster: &Cluster, database: &str, writers: u64, habits: Habits) -> Load {
        let (stop, gone) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let survivors = Arc::new(AtomicUsize::new(0));
        let writers = (0..writers)
            .map(|n| {
                let (url, survivors) = (cluster.url(database), survivors.clone());
                let (stop, gone) = (stop.clone(), gone.clone());
                tokio::spawn(async move { write(&url, n, habits, [&stop, &gone], &survivors).await })
            })
            .collect();
        Load { stop, gone, survivors, writers }
    }

    /// How many prepared transactions were committed by another session than had prepared them.
    pub fn survivors(&self) -> usize {
        self.survivors.load(Ordering::SeqCst)
    }

    /// Ends them although their server is gone, and answers what they have committed; what was prepared is in doubt.
    pub async fn abandon(self) -> Ledger {
        self.gone.store(true, Ordering::SeqCst);
        self.stop().await
    }

    /// Ends them and answers what they have committed.
    pub async fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::SeqCst);
        let mut ledger = Ledger::default();
        for writer in self.writers {
            ledger.merge(writer.await.expect("a writer"));
        }
        ledger
    }
}

/// How long a transaction stays prepared.
const PREPARED_FOR: Duration = Duration::from_millis(15);

/// A transaction on its way through PREPARE TRANSACTION.
struct Prepared {
    gid: String,
    ids: Vec<String>,
    /// PREPARE was answered: it outlives everything.
    certain: bool,
    /// The session that prepared it is gone.
    orphaned: bool,
}

/// A connection of a writer's.
struct Session {
    client: Client,
    raise: Statement,
    publish: Statement,
}

impl Session {
    async fn open(url: &str) -> Option<Session> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
        tokio::spawn(connection);
        let raise = "UPDATE aggregate SET version = version + 1 WHERE name = $1 RETURNING version";
        let publish = "SELECT dtm.publish('load.event', to_jsonb($1::int), key => $2)::text";
        let (raise, publish) = (client.prepare(raise).await.ok()?, client.prepare(publish).await.ok()?);
        Some(Session { client, raise, publish })
    }

    /// One transaction up to its end, which is the caller's; answers the ids that it has published.
    async fn work(
        &self,
        random: &mut StdRng,
        undone: &mut Vec<String>,
        asynchronous: bool,
    ) -> Result<Vec<String>, tokio_postgres::Error> {
        self.client.batch_execute("BEGIN").await?;
        if asynchronous {
            self.client.batch_execute("SET LOCAL synchronous_commit = off").await?;
        }
        // In one order, so that writers do not deadlock.
        let mut names: Vec<u32> =
            (0..random.random_range(1..4)).map(|_| random.random_range(1..=AGGREGATES)).collect();
        names.sort_unstable();
        let mut ids = Vec::new();
        for name in names {
            let name = format!("a{name}");
            if random.random_range(0..6) == 0 {
                self.client.batch_execute("SAVEPOINT s").await?;
                undone.push(self.event(&name).await?);
                self.client.batch_execute("ROLLBACK TO s").await?;
            }
            ids.push(self.event(&name).await?);
        }
        Ok(ids)
    }

    /// Commits a prepared transaction; answers whether it was there.
    async fn commit_prepared(&self, gid: &str) -> Result<bool, tokio_postgres::Error> {
        let there = "SELECT FROM pg_prepared_xacts WHERE gid = $1";
        if self.client.query(there, &[&gid]).await?.is_empty() {
            return Ok(false);
        }
        self.client.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?;
        Ok(true)
    }

    async fn event(&self, name: &str) -> Result<String, tokio_postgres::Error> {
        let version: i32 = self.client.query_one(&self.raise, &[&name]).await?.get(0);
        Ok(self.client.query_one(&self.publish, &[&version, &name]).await?.get(0))
    }
}

async fn write(
    url: &str,
    writer: u64,
    habits: Habits,
    [stop, gone]: [&AtomicBool; 2],
    survivors: &AtomicUsize,
) -> Ledger {
    let mut random = StdRng::seed_from_u64(writer);
    let mut ledger = Ledger::default();
    let (mut session, mut prepared): (_, Option<Prepared>) = (None, None);
    let mut transactions = 0;
    while prepared.is_some() || !stop.load(Ordering::SeqCst) {
        let Some(open) = &session else {
            session = Session::open(url).await;
            if session.is_none() {
                if gone.load(Ordering::SeqCst) {
                    ledger.unknown.extend(prepared.map(|prepared| prepared.ids));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            continue;
        };
        if let Some(mut pending) = prepared.take() {
            match open.commit_prepared(&pending.gid).await {
                Ok(there) => {
                    survivors.fetch_add(usize::from(there && pending.orphaned), Ordering::SeqCst);
                    // Not there any more: an earlier COMMIT PREPARED took effect without an answer.
                    if there || pending.certain {
                        ledger.commit("", pending.ids)
                    } else {
                        ledger.roll_back(pending.ids)
                    }
                }
                Err(_) => {
                    pending.orphaned = true;
                    prepared = Some(pending);
                    session = None;
                }
            }
            continue;
        }
        transactions += 1;
        let asynchronous =
            habits.asynchronous_one_in > 0 && random.random_range(0..habits.asynchronous_one_in) == 0;
        let mut undone = Vec::new();
        let worked = open.work(&mut random, &mut undone, asynchronous).await;
        ledger.roll_back(undone);
        let Ok(ids) = worked else {
            // What was under way ends with the connection.
            session = None;
            continue;
        };
        if random.random_range(0..5) == 0 {
            ledger.roll_back(ids);
            if open.client.batch_execute("ROLLBACK").await.is_err() {
                session = None;
            }
        } else if habits.prepared_one_in > 0 && random.random_range(0..habits.prepared_one_in) == 0 {
            let gid = format!("{writer}-{transactions}");
            let certain = open.client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await.is_ok();
            if certain {
                tokio::time::sleep(PREPARED_FOR).await;
            } else {
                session = None;
            }
            prepared = Some(Prepared { gid, ids, certain, orphaned: !certain });
        } else {
            let committed = open.client.batch_execute("COMMIT").await.is_ok();
            if committed && !asynchronous {
                ledger.commit("", ids);
            } else {
                ledger.unknown.push(ids);
            }
            if !committed {
                session = None;
            }
        }
        if !habits.pause.is_zero() {
            tokio::time::sleep(habits.pause).await;
        }
    }
    ledger
}

/// What the writers have published; other topics are somebody else's.
async fn stored(client: &Client) -> HashSet<String> {
    let sql = "SELECT id::text FROM dtm.events WHERE topic = 'load.event'";
    let rows = client.query(sql, &[]).await.expect("dtm.events");
    rows.iter().map(|row| row.get(0)).collect()
}

/// Panics unless what was accepted is exactly what the database has, and each key's versions came first as 1, 2, 3 …
/// Answers how many events there were and how many came again.
pub async fn assert_all_arrived(client: &Client, ledger: &Ledger, received: &[Received]) -> (usize, usize) {
    let verdict = ledger.assert_kept(received);
    let stored = stored(client).await;
    let lost_after_commit: Vec<&String> =
        ledger.committed.values().flatten().filter(|id| !stored.contains(*id)).collect();
    assert!(lost_after_commit.is_empty(), "PostgreSQL lost commits: {lost_after_commit:?}");
    let unknown = received.iter().find(|request| request.accepted && !stored.contains(request.id()));
    assert!(unknown.is_none(), "delivered and not in the log: {unknown:?}");
    let arrived = assert_versions(client, received).await;
    assert_eq!(arrived, stored.len(), "not everything in the log arrived");
    (arrived, verdict.duplicates)
}

/// The versions of each key as they came first.
pub fn versions(received: &[Received]) -> BTreeMap<String, Vec<i32>> {
    let (mut seen, mut versions) = (HashSet::new(), BTreeMap::<String, Vec<i32>>::new());
    for request in received.iter().filter(|request| request.accepted) {
        if seen.insert(request.id()) {
            let version = str::from_utf8(&request.body).ok().and_then(|text| text.parse().ok());
            let of_key = versions.entry(request.header("ce-partitionkey").to_owned()).or_default();
            of_key.push(version.expect("a version"));
        }
    }
    versions
}

/// Panics unless each key's versions came first as 1, 2, 3 … up to the last. Answers how many events there were.
pub async fn assert_versions(client: &Client, received: &[Received]) -> usize {
    let mut versions = versions(received);
    let events = versions.values().map(Vec::len).sum();
    for row in client.query("SELECT name, version FROM aggregate", &[]).await.expect("aggregate") {
        let (name, last): (String, i32) = (row.get(0), row.get(1));
        let expected: Vec<i32> = (1..=last).collect();
        assert_eq!(versions.remove(&name).unwrap_or_default(), expected, "versions of {name}");
    }
    assert!(versions.is_empty(), "unknown keys");
    events
}

/// Waits until all of the log's events have been accepted.
pub async fn wait_for_all(client: &Client, receiver: &Receiver, deadline: Duration) {
    let complete = process::eventually(deadline, || async {
        (missing(client, &receiver.received()).await == 0).then_some(())
    });
    if complete.await.is_none() {
        panic!("{} are missing", missing(client, &receiver.received()).await);
    }
}

/// How many of the log's events have not been accepted yet.
pub async fn missing(client: &Client, received: &[Received]) -> usize {
    let mut stored = stored(client).await;
    received.iter().filter(|request| request.accepted).for_each(|request| {
        stored.remove(request.id());
    });
    stored.len()
}

/// How often each event was accepted.
pub fn arrivals(received: &[Received]) -> HashMap<&str, usize> {
    let mut arrivals = HashMap::new();
    for request in received.iter().filter(|request| request.accepted) {
        *arrivals.entry(request.id()).or_default() += 1;
    }
    arrivals
}
