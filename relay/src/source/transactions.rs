// SPDX-License-Identifier: PostgreSQL
//! Global transactions in the database. Whoever works at one asks here; what many ask at a time goes in one statement, while the
//! next ones gather.

use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio_postgres::types::{Json, ToSql};
use tokio_postgres::{Row, Statement};

use super::asking::{Ask, Asked, PAUSE, next, persist_one, prepared};
use super::error::SourceError;
use super::link::Link;
use super::unfinished::{self, Found};
use crate::calls::schedule::Schedule;

/// While somebody else holds a row: the first pause and the longest.
const HELD: Schedule = Schedule::exponential(Duration::from_millis(50), PAUSE, None);

/// Transactions that are due, and when the next one is.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    /// Oldest first.
    pub gids: Vec<String>,
    /// From now.
    pub next_in: Option<Duration>,
}

/// The transactions of one database.
pub struct Store {
    finds: Ask<String, Option<Found>>,
    ends: Ask<String, Stored>,
    settlements: Ask<Value, Stored>,
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
    /// Endpoints that take no more, or not the usual number, and how many they take.
    pub rooms: Vec<(String, i32)>,
    /// How many any other endpoint takes.
    pub usual: i32,
}

/// What came of an attempt to store something of a transaction.
enum Stored {
    /// It is stored.
    Done,
    /// The transaction is as it was, but somebody's open transaction holds its row: try again.
    Held,
    /// Somebody has changed the transaction's status: what was to be stored is void.
    Changed,
}

/// Where what a [`Store`] is asked arrives.
pub struct Counters {
    finds: mpsc::Receiver<Asked<String, Option<Found>>>,
    ends: mpsc::Receiver<Asked<String, Stored>>,
    settlements: mpsc::Receiver<Asked<Value, Stored>>,
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

    /// A submitted transaction has succeeded. False: its status has changed. Tries for as long as somebody's open transaction holds
    /// its row: nothing is called again for that.
    pub async fn succeed(&self, gid: &str) -> bool {
        stored(&self.ends, gid.to_owned()).await
    }

    /// Stores what came of a pass, in the form of dtm.relay_settle; as [`Store::succeed`].
    pub async fn settle(&self, settlement: Value) -> bool {
        stored(&self.settlements, settlement).await
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

/// Asks for something to be stored, and again for as long as its row is held.
async fn stored<Q: Clone>(desk: &Ask<Q, Stored>, what: Q) -> bool {
    let mut tries: u32 = 0;
    loop {
        match desk.ask(what.clone()).await {
            Stored::Done => return true,
            Stored::Changed => return false,
            Stored::Held => {}
        }
        tries = tries.saturating_add(1);
        tokio::time::sleep(HELD.delay(tries, 1.0)).await;
    }
}

/// Answers a store's questions until a connection fails.
pub async fn follow(reads: Link, writes: Link, counters: Counters) -> Result<Infallible, SourceError> {
    tokio::try_join!(
        unfinished::find(&reads, counters.finds),
        look(&reads, counters.dues),
        succeed(&writes, counters.ends),
        settle(&writes, counters.settlements),
        revive(&writes, counters.revivals),
    )
    .map(|(never, ..)| never)
}

async fn look(link: &Link, mut asked: mpsc::Receiver<Asked<Wanted, Due>>) -> Result<Infallible, SourceError> {
    const WHAT: &str = "looking for transactions that are due";
    let sql = "SELECT gids, next_in FROM dtm.relay_due_transactions($1, $2, $3, $4, $5, $6, $7)";
    let mut statement = None;
    loop {
        for (wanted, answers) in next(&mut asked).await {
            let statement = prepared(link, WHAT, sql, &mut statement).await?;
            let Wanted { shards, own, busy, most, rooms, usual } = &wanted;
            let (endpoints, rooms): (Vec<&str>, Vec<i32>) =
                rooms.iter().map(|(endpoint, room)| (endpoint.as_str(), *room)).unzip();
            let parameters: [&(dyn ToSql + Sync); 7] = [shards, own, busy, most, &endpoints, &rooms, usual];
            let row = persist_one(link, WHAT, statement, &parameters).await?;
            let next_in = row.get::<_, Option<f64>>(1).map(|next| next.max(0.0));
            let next_in = next_in.and_then(|next| Duration::try_from_secs_f64(next).ok());
            let _ = answers.send(Due { gids: row.get(0), next_in });
        }
    }
}

/// What a statement that stores answers: the transactions of which it has stored something, and those that are held.
#[derive(Default)]
struct Places {
    stored: HashSet<String>,
    held: HashSet<String>,
}

impl Places {
    fn add(&mut self, row: &Row) {
        self.stored.extend(row.get::<_, Vec<String>>("stored"));
        self.held.extend(row.get::<_, Vec<String>>("held"));
    }

    fn tell<Q>(&self, questions: Vec<Asked<Q, Stored>>, gid: impl Fn(&Q) -> Option<&str>) {
        for (question, answers) in questions {
            let is_in = |places: &HashSet<String>| gid(&question).is_some_and(|gid| places.contains(gid));
            let stored = match (is_in(&self.stored), is_in(&self.held)) {
                (true, _) => Stored::Done,
                (false, true) => Stored::Held,
                (false, false) => Stored::Changed,
            };
            let _ = answers.send(stored);
        }
    }
}

async fn succeed(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<String, Stored>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "ending transactions";
    let sql = "SELECT stored, held FROM dtm.relay_succeed($1)";
    let mut statement = None;
    loop {
        let questions = next(&mut asked).await;
        let gids: Vec<&str> = questions.iter().map(|(gid, _)| gid.as_str()).collect();
        let statement = prepared(link, WHAT, sql, &mut statement).await?;
        let mut places = Places::default();
        places.add(&persist_one(link, WHAT, statement, &[&gids]).await?);
        places.tell(questions, |gid| Some(gid));
    }
}

async fn settle(
    link: &Link,
    mut asked: mpsc::Receiver<Asked<Value, Stored>>,
) -> Result<Infallible, SourceError> {
    const WHAT: &str = "storing what came of transactions";
    let sql = "SELECT stored, held FROM dtm.relay_settle($1)";
    let mut statement = None;
    loop {
        let questions = next(&mut asked).await;
        let statement = prepared(link, WHAT, sql, &mut statement).await?;
        let all: Vec<&Value> = questions.iter().map(|(settlement, _)| settlement).collect();
        let mut places = Places::default();
        match link.query_one(WHAT, statement, &[&Json(all)]).await {
            Ok(row) => places.add(&row),
            // One of them may be what the database does not take: it shall not hold up the others.
            Err(error) => {
                error.tolerate()?;
                one_by_one(link, statement, &questions, &mut places).await?;
            }
        }
        places.tell(questions, |settlement| settlement["gid"].as_str());
    }
}

async fn one_by_one(
    link: &Link,
    statement: &Statement,
    questions: &[Asked<Value, Stored>],
    places: &mut Places,
) -> Result<(), SourceError> {
    for (settlement, _) in questions {
        let store = async |settlement| {
            link.query_one("storing what came of a transaction", statement, &[&Json([settlement])]).await
        };
        let mut stored = store(settlement).await;
        if let Err(error) = stored {
            error.tolerate()?;
            // What services answer need not be text in the database's encoding.
            stored = store(&in_ascii(settlement)).await;
        }
        match stored {
            Ok(row) => places.add(&row),
            Err(error) => {
                error.tolerate()?;
                places.held.extend(settlement["gid"].as_str().map(str::to_owned));
            }
        }
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}

/// The same with errors that every database can store.
fn in_ascii(settlement: &Value) -> Value {
    let mut settlement = settlement.clone();
    let ascii = |text: &mut Value| {
        if let Value::String(text) = text {
            *text = text.replace(|c: char| !c.is_ascii() || c.is_control(), "?");
        }
    };
    for name in ["error", "reason"] {
        settlement.get_mut(name).map(ascii);
    }
    for branch in settlement.get_mut("branches").and_then(Value::as_array_mut).into_iter().flatten() {
        branch.get_mut("last_error").map(ascii);
    }
    settlement
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
