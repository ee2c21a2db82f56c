// SPDX-License-Identifier: PostgreSQL
//! Many ask at a time, one statement answers: the next ones gather meanwhile.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Statement};

use super::error::SourceError;
use super::link::Link;

/// Questions of one kind that one statement answers.
pub const BATCH: usize = 500;
/// After an error that the connection survived.
pub const PAUSE: Duration = Duration::from_secs(1);

/// Of whom something is asked, and who waits for the answer.
pub type Asked<Q, A> = (Q, oneshot::Sender<A>);

/// Where questions of one kind are asked.
pub struct Ask<Q, A>(mpsc::Sender<Asked<Q, A>>);

impl<Q, A> Ask<Q, A> {
    /// And where they arrive.
    pub fn new() -> (Self, mpsc::Receiver<Asked<Q, A>>) {
        let (asks, asked) = mpsc::channel(BATCH);
        (Ask(asks), asked)
    }

    /// Never answers if the session is over: nobody goes on then.
    pub async fn ask(&self, question: Q) -> A {
        let (answers, answer) = oneshot::channel();
        if self.0.send((question, answers)).await.is_ok()
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        std::future::pending().await
    }
}

/// The next questions, as many as there are. Waits for ever when nobody is left to ask.
pub async fn next<Q, A>(asked: &mut mpsc::Receiver<Asked<Q, A>>) -> Vec<Asked<Q, A>> {
    let mut questions = Vec::new();
    if asked.recv_many(&mut questions, BATCH).await == 0 {
        std::future::pending().await
    }
    questions
}

/// Tries until the statement works or the connection fails.
pub async fn persist(
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
pub async fn persist_one(
    link: &Link,
    what: &'static str,
    statement: &Statement,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Row, SourceError> {
    let mut rows = persist(link, what, statement, parameters).await?;
    rows.pop().ok_or(SourceError::Answer { what, problem: "it answered no row".into() })
}

/// Prepared when it is first needed: a relay of a database without transactions never does.
pub async fn prepared<'a>(
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
