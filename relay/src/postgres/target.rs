// SPDX-License-Identifier: PostgreSQL
//! One database that functions are called in, over a few connections that are kept.

use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::settings::TargetSettings;
use super::verdict;
use crate::calls::outcome::{Class, Outcome};
use crate::source::connect::{Connector, GRACE};
use crate::source::error::SourceError;
use crate::source::link::Link;
use crate::source::pool::Pool;

/// How long a free connection, or a new one, is waited for at the least.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// No statement takes longer, whatever is asked.
const LONGEST: Duration = Duration::from_secs(3_600);

const CALL_EVENTS: &str = "SELECT n, state, message FROM dtm.call_events($1, $2, $3, $4, $5, $6)";
const CALL_BRANCH: &str = "SELECT dtm.call_branch($1, $2, $3, $4, $5, $6, $7)";
/// Not of one that was prepared so long ago that its barrier may have been forgotten there.
const QUERY_PREPARED: &str = "SELECT CASE WHEN pg_catalog.make_interval(secs => $2)
    OPERATOR(pg_catalog.<) (dtm.barriers_kept() OPERATOR(pg_catalog./) 2) THEN dtm.query_prepared($1) END";
/// Whatever functions have left behind in a session: what one sets, locks or holds is not the next one's.
const RESET: &str = "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; DISCARD TEMP;
    SELECT pg_catalog.pg_advisory_unlock_all()";

/// A database.
pub struct Target {
    name: String,
    connector: Connector,
    functions: Option<Vec<String>>,
    pool: Pool<Session>,
}

/// A function there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub schema: String,
    /// What it is called.
    pub name: String,
}

/// Events for a function.
#[derive(Debug, Default)]
pub struct Batch {
    /// Their ids.
    pub ids: Vec<Uuid>,
    /// Their keys: of one key none is tried after one that failed.
    pub keys: Vec<Option<String>>,
    /// The events in CloudEvents' JSON format.
    pub events: Vec<String>,
}

/// A branch of a global transaction.
#[derive(Clone, Copy, Debug)]
pub struct Branch<'a> {
    /// DTM's name of the kind of the transaction.
    pub trans_type: &'a str,
    /// Of the transaction.
    pub gid: &'a str,
    /// Of the branch.
    pub branch_id: &'a str,
    /// What it is to do.
    pub op: &'a str,
    /// JSON; `None`: null.
    pub payload: Option<&'a str>,
}

struct Session {
    link: Link,
    /// What its statements may take.
    timeout: Duration,
    call_events: Option<Statement>,
    call_branch: Option<Statement>,
    query_prepared: Option<Statement>,
}

/// Why there is no answer.
struct NoAnswer {
    error: SourceError,
    was_sent: bool,
}

impl Target {
    /// Connects to nothing yet.
    pub fn new(name: &str, settings: &TargetSettings) -> Result<Self, SourceError> {
        let connector = Connector::to_target(settings.settings.clone(), LONGEST)?;
        let (functions, pool) = (settings.functions.clone(), Pool::new(settings.connections));
        Ok(Target { name: name.to_owned(), connector, functions, pool })
    }

    /// Whether the configuration lets a function be called.
    pub fn lets_call(&self, function: &Function) -> bool {
        let Function { schema, name } = function;
        let is_listed = |listed: &String| {
            listed.split_once('.').is_some_and(|(s, n)| s == schema && (n == "*" || n == name))
        };
        self.functions.as_ref().is_none_or(|functions| functions.iter().any(is_listed))
    }

    /// `[postgres.NAME]`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    pub fn describe(&self) -> String {
        self.connector.settings().describe()
    }

    /// A connection of its own.
    pub async fn connect(&self) -> Result<Link, SourceError> {
        self.connector.connect().await
    }

    /// Calls a function for each event, in one transaction. Answers what came of each; an error is one of all of them: nothing is
    /// known to be done.
    pub async fn call_events(
        &self,
        consumer: &str,
        function: &Function,
        batch: &Batch,
        timeout: Duration,
    ) -> Result<Vec<Outcome>, Outcome> {
        let parameters: [&(dyn ToSql + Sync); 6] =
            [&consumer, &function.schema, &function.name, &batch.ids, &batch.keys, &batch.events];
        let busy = || {
            Outcome::without_answer(Class::Overloaded, format!("all connections to {} are busy", self.name))
        };
        let _turn = self.turn(timeout).await.ok_or_else(busy)?;
        let rows = self
            .ask("calling for events", CALL_EVENTS, |session| &mut session.call_events, &parameters, timeout)
            .await?;
        let mut outcomes = vec![Outcome::accepted(); batch.ids.len()];
        for row in rows {
            let (n, state, message): (i32, Option<&str>, Option<&str>) = (row.get(0), row.get(1), row.get(2));
            let place = usize::try_from(n - 1).ok().and_then(|at| outcomes.get_mut(at));
            let Some(place) = place else { continue };
            *place = match state {
                Some(state) => verdict::of_state(state, message.unwrap_or_default()),
                None => verdict::withdrawn(),
            };
        }
        Ok(outcomes)
    }

    /// Calls a function for a branch, behind the barrier. `None`: it was not called, for all connections are busy.
    pub async fn call_branch(
        &self,
        function: &Function,
        branch: Branch<'_>,
        timeout: Duration,
    ) -> Option<Outcome> {
        let _turn = self.turn(timeout).await?;
        let Branch { trans_type, gid, branch_id, op, payload } = branch;
        let parameters: [&(dyn ToSql + Sync); 7] =
            [&function.schema, &function.name, &trans_type, &gid, &branch_id, &op, &payload];
        let asked = self.ask(
            "calling a branch",
            CALL_BRANCH,
            |session| &mut session.call_branch,
            &parameters,
            timeout,
        );
        Some(asked.await.map_or_else(|outcome| outcome, |_| Outcome::accepted()))
    }

    /// Asks whether a prepared message is committed, in the form that HTTP would answer: success, or 409. Any error means that it
    /// is not known. `None`: it was not asked, for all connections are busy.
    pub async fn query_prepared(&self, gid: &str, age: Duration, timeout: Duration) -> Option<Outcome> {
        let _turn = self.turn(timeout).await?;
        let age = age.as_secs_f64();
        let parameters: [&(dyn ToSql + Sync); 2] = [&gid, &age];
        let place: fn(&mut Session) -> &mut Option<Statement> = |session| &mut session.query_prepared;
        let asked =
            self.ask("asking whether a message is committed", QUERY_PREPARED, place, &parameters, timeout);
        Some(match asked.await {
            Ok(rows) => match rows.first().and_then(|row| row.get::<_, Option<&str>>(0)) {
                Some("committed") => Outcome::accepted(),
                Some("rolled_back") => verdict::of_state(verdict::FAILURE, "rolled back"),
                None => Outcome::without_answer(
                    Class::Failed,
                    "it was prepared longer ago than half of what dtm.barriers_kept is there",
                ),
                Some(_) => Outcome::without_answer(Class::Failed, "it is not known whether it is committed"),
            },
            // Whatever it raises is no decision.
            Err(outcome) => Outcome { status: None, ..outcome },
        })
    }

    /// Waits for a connection to be free.
    async fn turn(&self, timeout: Duration) -> Option<SemaphorePermit<'_>> {
        let patience = CONNECT_WITHIN.max(timeout);
        tokio::time::timeout(patience, self.pool.turn()).await.ok()?.ok()
    }

    async fn ask(
        &self,
        what: &'static str,
        sql: &'static str,
        place: fn(&mut Session) -> &mut Option<Statement>,
        parameters: &[&(dyn ToSql + Sync)],
        timeout: Duration,
    ) -> Result<Vec<tokio_postgres::Row>, Outcome> {
        let kept = self.pool.take();
        let was_kept = kept.is_some();
        let mut answer = self.ask_over(kept, what, sql, place, parameters, timeout).await;
        // One that was kept may have ended long ago.
        if let Err(NoAnswer { error, was_sent: false }) = &answer
            && was_kept
            && !error.spares_connection()
        {
            self.pool.clear();
            answer = self.ask_over(None, what, sql, place, parameters, timeout).await;
        }
        answer.map_err(|NoAnswer { error, was_sent }| verdict::of_error(&error, was_sent))
    }

    async fn ask_over(
        &self,
        kept: Option<Session>,
        what: &'static str,
        sql: &'static str,
        place: fn(&mut Session) -> &mut Option<Statement>,
        parameters: &[&(dyn ToSql + Sync)],
        timeout: Duration,
    ) -> Result<Vec<tokio_postgres::Row>, NoAnswer> {
        let unsent = |error| NoAnswer { error, was_sent: false };
        let mut session = match kept {
            Some(session) => session,
            None => {
                let connecting = tokio::time::timeout(CONNECT_WITHIN, self.connector.connect()).await;
                let silent = SourceError::Silent { what: "connecting", limit: CONNECT_WITHIN };
                Session::over(connecting.unwrap_or(Err(silent)).map_err(unsent)?)
            }
        };
        let timeout = timeout.min(LONGEST);
        if session.timeout != timeout {
            // The server may be stopped, or the network silent: then its own time-out tells nobody.
            session.link.set_limit(timeout + GRACE);
            session.link.batch("setting a time-out", &set_timeout(timeout)).await.map_err(unsent)?;
            session.timeout = timeout;
        }
        let statement = match place(&mut session).clone() {
            Some(statement) => statement,
            None => {
                let made = match session.link.prepare(what, sql).await {
                    Ok(made) => made,
                    Err(error) => return Err(self.refused(session, error, false).await),
                };
                place(&mut session).insert(made).clone()
            }
        };
        match session.link.query(what, &statement, parameters).await {
            Ok(rows) => {
                self.keep(session).await;
                Ok(rows)
            }
            Err(error) => Err(self.refused(session, error, true).await),
        }
    }

    async fn refused(&self, session: Session, error: SourceError, was_sent: bool) -> NoAnswer {
        if error.spares_connection() {
            self.keep(session).await;
        }
        NoAnswer { error, was_sent }
    }

    /// Keeps a session for the next call, as if it were new.
    async fn keep(&self, session: Session) {
        let reset = format!("{RESET}; {}; {}", self.connector.session(), set_timeout(session.timeout));
        match session.link.batch("resetting a session", &reset).await {
            Ok(()) => self.pool.keep(session),
            Err(error) => tracing::debug!(target = self.name, "a session is given up: {error}"),
        }
    }
}

fn set_timeout(timeout: Duration) -> String {
    format!("SET statement_timeout = {}", timeout.as_millis().max(1))
}

impl AsRef<Link> for Session {
    fn as_ref(&self) -> &Link {
        &self.link
    }
}

impl Session {
    fn over(link: Link) -> Self {
        Session { link, timeout: LONGEST, call_events: None, call_branch: None, query_prepared: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::settings::{Settings, ThisMachine};

    #[test]
    fn what_may_be_called_is_what_the_configuration_lists() {
        let lets_call = |functions: Option<&[&str]>, name: &str| {
            let settings = Settings::parse("postgres://u@h/d", &ThisMachine).unwrap();
            let functions = functions.map(|listed| listed.iter().map(ToString::to_string).collect());
            let settings = TargetSettings { settings, connections: 1, functions };
            let (schema, name) = name.split_once('.').unwrap();
            let function = Function { schema: schema.into(), name: name.into() };
            Target::new("stock", &settings).unwrap().lets_call(&function)
        };
        assert!(lets_call(None, "app.f"));
        let listed: &[&str] = &["app.f", "open.*"];
        for (name, expected) in
            [("app.f", true), ("app.g", false), ("open.g", true), ("opens.g", false), ("App.f", false)]
        {
            assert_eq!(lets_call(Some(listed), name), expected, "{name}");
        }
        assert!(!lets_call(Some(&[]), "app.f"));
    }
}
