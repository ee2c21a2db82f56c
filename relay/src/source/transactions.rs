// SPDX-License-Identifier: PostgreSQL
//! Global transactions in the database. Whoever works at one asks here; what many ask at a time goes in one statement, while the
//! next ones gather.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_postgres::types::{Json, ToSql};
use tokio_postgres::{Row, Statement};

use super::error::SourceError;
use super::link::Link;

/// Questions of one kind that one statement answers.
const BATCH: usize = 500;
/// Bytes of payloads that are held at a time, beside one message whatever its size.
const HELD: usize = 32 << 20;
/// After an error that the connection survived.
const PAUSE: Duration = Duration::from_secs(1);

/// A transaction that has not ended, as it is stored.
#[derive(Debug)]
pub struct Found {
    /// See there.
    pub gid: String,
    /// DTM's name of its kind.
    pub trans_type: String,
    /// See `Status`.
    pub status: String,
    /// A JSON array.
    pub branches: String,
    /// Of each branch.
    pub payloads: Vec<Option<Vec<u8>>>,
    /// Who is asked whether it is committed.
    pub query_prepared: Option<String>,
    /// A JSON object.
    pub options: String,
    /// Passes that failed since it last got ahead.
    pub failures: u32,
    /// It was prepared too long ago for anybody to be asked.
    pub undecidable: bool,
    /// It has a row in dtm.due.
    pub waits: bool,
    /// What dtm.branch has of it: a JSON array.
    pub known: Option<String>,
    /// The room that its payloads take, for as long as they are held.
    pub room: OwnedSemaphorePermit,
}

/// Transactions that are due, and when the next one is.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    /// Oldest first.
    pub gids: Vec<String>,
    /// From now.
    pub next_in: Option<Duration>,
}

/// Of whom something is asked, and who waits for the answer.
type Asked<Q, A> = (Q, oneshot::Sender<A>);

/// Where questions of one kind are asked.
struct Ask<Q, A>(mpsc::Sender<Asked<Q, A>>);

impl<Q, A> Ask<Q, A> {
    fn new() -> (Self, mpsc::Receiver<Asked<Q, A>>) {
        let (asks, asked) = mpsc::channel(BATCH);
        (Ask(asks), asked)
    }

    /// Never answers if the session is over: nobody goes on then.
    async fn ask(&self, question: Q) -> A {
        let (answers, answer) = oneshot::channel();
        if self.0.send((question, answers)).await.is_ok()
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        std::future::pending().await
    }
}

/// The transactions of one database.
pub struct Store {
    finds: Ask<String, Option<Found>>,
    ends: Ask<String, bool>,
    settlements: Ask<Value, bool>,
    dues: Ask<Wanted, Due>,
    revivals: Ask<String, ()>,
}

/// Of which shards, and what is being worked at.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// How many shards there are.
    pub shards: i32,
    /// Those that this relay owns.
    pub own: Vec<i32>,
    /// What it is at already.
    pub busy: Vec<String>,
    /// No more than so many.
    pub most: i32,
}

/// Where what a [`Store`] is asked arrives.
pub struct Counters {
    finds: mpsc::Receiver<Asked<String, Option<Found>>>,
    ends: mpsc::Receiver<Asked<String, bool>>,
    settlements: mpsc::Receiver<Asked<Value, bool>>,
    dues: mpsc::Receiver<Asked<Wanted, Due>>,
    revivals: mpsc::Receiver<Asked<String, ()>>,
}

impl Store {
    /// A store, and what [`follow`] serves it by.
    pub fn new() -> (Self, Counters) {
        let ((finds, to_find), (ends, to_end)) = (Ask::new(), Ask::new());
        let ((settlements, to_settle), (dues, to_look)) = (Ask::new(), Ask::new());
        let (revivals, to_revive) = Ask::new();
        let counters = Counters {
            finds: to_find,
            ends: to_end,
            settlements: to_settle,
            dues: to_look,
            revivals: to_revive,
        };
        (Store { finds, ends, settlements, dues, revivals }, counters)
    }

    /// A transaction; `None`: it has ended, or waits for a decision.
    pub async fn find(&self, gid: &str) -> Option<Found> {
        self.finds.ask(gid.to_owned()).await
    }

    /// A submitted transaction has succeeded. False: it is not submitted, or somebody holds its row.
    pub async fn succeed(&self, gid: &str) -> bool {
        self.ends.ask(gid.to_owned()).await
    }

    /// Stores what came of a pass, in the form of dtm.relay_settle. False: it has another status, or somebody holds its row.
    pub async fn settle(&self, settlement: Value) -> bool {
        self.settlements.ask(settlement).await
    }

    /// What is due.
    pub async fn due(&self, wanted: Wanted) -> Due {
        self.dues.ask(wanted).await
    }

    /// An endpoint works again: all that waits for it is due.
    pub async fn revive(&self, endpoint: &str) {
        self.revivals.ask(endpoint.to_owned()).await;
    }
}

/// Answers a store's questions until a connection fails.
pub async fn follow(reads: Link, writes: Link, counters: Counters) -> Result<Infallible, SourceError> {
    tokio::try_join!(
        find(&reads, counters.finds),
        look(&reads, counters.dues),
        succeed(&writes, counters.ends),
        settle(&writes, counters.settlements),
        revive(&writes, counters.revivals),
    )
    .map(|(never, ..)| never)
}

/// The next questions, as many as there are. Waits for ever when nobody is left to ask.
async fn next<Q, A>(asked: &mut mpsc::Receiver<Asked<Q, A>>) -> Vec<Asked<Q, A>> {
    let mut questions = Vec::new();
    if asked.recv_many(&mut questions, BATCH).await == 0 {
        std::future::pending().await
    }
    questions
}

/// Tries until the statement works or the connection fails.
async fn persist(
    link: &Link,
    what: &'static str,
    statement: &Statement,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, SourceError> {
    loop {
        match link.query(what, statement, parameters).await {
            Ok(rows) => return Ok(rows),
            Err(error) => error.tolerate()?,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The same of a statement that answers one row.
async fn persist_one(
    link: &Link,
    what: &'static str,
    statement: &Statement,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Row, SourceError> {
    let mut rows = persist(link, what, statement, parameters).await?;
    rows.pop().ok_or(SourceError::Answer { what, problem: "it answered no row".into() })
}

async fn find(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<String, Option<Found>>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "reading transactions";
    let columns = "gid, trans_type, status, branches, payloads, payload_bytes, query_prepared, options, failures, undecidable, waits, known";
    let sql = format!("SELECT {columns} FROM dtm.relay_transactions($1, $2)");
    let mut statement = None;
    let room = Arc::new(Semaphore::new(HELD));
    // Those for whose payloads there was no room.
    let mut waiting: Vec<Asked<String, Option<Found>>> = Vec::new();
    loop {
        let questions = if waiting.is_empty() { next(&mut asked).await } else { std::mem::take(&mut waiting) };
        some(&room).await;
        let gids: Vec<&str> = questions.iter().map(|(gid, _)| gid.as_str()).collect();
        let most = i32::try_from(room.available_permits()).unwrap_or(i32::MAX);
        let statement = prepared(link, WHAT, &sql, &mut statement).await?;
        let rows = persist(link, WHAT, statement, &[&gids, &most]).await?;
        let mut found: HashMap<&str, &Row> = rows.iter().map(|row| (row.get(0), row)).collect();
        for (gid, answers) in questions {
            match found.remove(gid.as_str()).map(|found| (found, found.get::<_, Option<_>>("payloads"))) {
                None => drop(answers.send(None)),
                Some((_, None)) => waiting.push((gid, answers)),
                Some((found, Some(payloads))) => {
                    let taken = take(&room, found.get("payload_bytes")).await;
                    let _ = answers.send(Some(read(gid, found, payloads, taken)));
                }
            }
        }
    }
}

/// Waits until there is some room.
async fn some(room: &Arc<Semaphore>) {
    drop(take(room, 1).await);
}

/// Takes so much, or all where it is not enough for one.
async fn take(room: &Arc<Semaphore>, bytes: i32) -> OwnedSemaphorePermit {
    let bytes = usize::try_from(bytes).unwrap_or(0).min(HELD);
    match room.clone().acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX)).await {
        Ok(taken) => taken,
        // It is never closed.
        Err(_) => std::future::pending().await,
    }
}

fn read(gid: String, row: &Row, payloads: Vec<Option<Vec<u8>>>, room: OwnedSemaphorePermit) -> Found {
    Found {
        gid,
        trans_type: row.get("trans_type"),
        status: row.get("status"),
        branches: row.get("branches"),
        payloads,
        query_prepared: row.get("query_prepared"),
        options: row.get("options"),
        failures: u32::try_from(row.get::<_, i32>("failures")).unwrap_or(0),
        undecidable: row.get("undecidable"),
        waits: row.get("waits"),
        known: row.get("known"),
        room,
    }
}

/// Prepared when it is first needed: a relay of a database without transactions never does.
async fn prepared<'a>(
    link: &Link,
    what: &'static str,
    sql: &str,
    statement: &'a mut Option<Statement>,
) -> Result<&'a Statement, SourceError> {
    let made = match statement.take() {
        Some(made) => made,
        None => loop {
            match link.prepare(what, sql).await {
                Ok(made) => break made,
                Err(error) => error.tolerate()?,
            }
            tokio::time::sleep(PAUSE).await;
        },
    };
    Ok(statement.insert(made))
}

async fn look(link: &Link, mut asked: mpsc::Receiver<Asked<Wanted, Due>>) -> Result<Infallible, SourceError> {
    const WHAT: &str = "looking for transactions that are due";
    let sql = "SELECT gids, next_in FROM dtm.relay_due_transactions($1, $2, $3, $4)";
    let mut statement = None;
    loop {
        for (wanted, answers) in next(&mut asked).await {
            let statement = prepared(link, WHAT, sql, &mut statement).await?;
            let Wanted { shards, own, busy, most } = &wanted;
            let row = persist_one(link, WHAT, statement, &[shards, own, busy, most]).await?;
            let next_in = row.get::<_, Option<f64>>(1).map(|next| next.max(0.0));
            let next_in = next_in.and_then(|next| Duration::try_from_secs_f64(next).ok());
            let _ = answers.send(Due { gids: row.get(0), next_in });
        }
    }
}

/// Answers who asked about a transaction whether it is among these.
fn tell<Q>(questions: Vec<Asked<Q, bool>>, done: Vec<String>, gid: impl Fn(&Q) -> Option<&str>) {
    let done: HashSet<String> = done.into_iter().collect();
    for (question, answers) in questions {
        let _ = answers.send(gid(&question).is_some_and(|gid| done.contains(gid)));
    }
}

async fn succeed(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<String, bool>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "ending transactions";
    let mut statement = None;
    loop {
        let questions = next(&mut asked).await;
        let gids: Vec<&str> = questions.iter().map(|(gid, _)| gid.as_str()).collect();
        let statement = prepared(link, WHAT, "SELECT dtm.relay_succeed($1)", &mut statement).await?;
        let row = persist_one(link, WHAT, statement, &[&gids]).await?;
        tell(questions, row.get(0), |gid| Some(gid));
    }
}

async fn settle(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<Value, bool>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "storing what came of transactions";
    let mut statement = None;
    loop {
        let questions = next(&mut asked).await;
        let statement = prepared(link, WHAT, "SELECT dtm.relay_settle($1)", &mut statement).await?;
        let all: Vec<&Value> = questions.iter().map(|(settlement, _)| settlement).collect();
        let done = match link.query_one(WHAT, statement, &[&Json(all)]).await {
            Ok(row) => row.get::<_, Vec<String>>(0),
            // One of them may be what the database does not take: it shall not hold up the others.
            Err(error) => {
                error.tolerate()?;
                one_by_one(link, statement, &questions).await?
            }
        };
        tell(questions, done, |settlement| settlement["gid"].as_str());
    }
}

async fn one_by_one(
    link: &Link,
    statement: &Statement,
    questions: &[Asked<Value, bool>],
) -> Result<Vec<String>, SourceError> {
    let mut done = Vec::new();
    for (settlement, _) in questions {
        match link.query_one("storing what came of a transaction", statement, &[&Json([settlement])]).await {
            Ok(row) => done.extend(row.get::<_, Vec<String>>(0)),
            Err(error) => error.tolerate()?,
        }
    }
    tokio::time::sleep(PAUSE).await;
    Ok(done)
}

async fn revive(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<String, ()>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "going on with what an endpoint has held up";
    let mut statement = None;
    loop {
        for (endpoint, answers) in next(&mut asked).await {
            let statement = prepared(link, WHAT, "SELECT dtm.relay_revive($1, $2)", &mut statement).await?;
            let most = 1_000_i32;
            while persist_one(link, WHAT, statement, &[&endpoint, &most]).await?.get::<_, i32>(0) >= most {}
            let _ = answers.send(());
        }
    }
}
