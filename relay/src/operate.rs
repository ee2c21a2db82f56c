// SPDX-License-Identifier: PostgreSQL
//! What an operator asks for: the state of subscriptions, dead letters, and changes of both. All of it is SQL that can be
//! called without this program too.

use std::process::ExitCode;

use serde_json::{Value, json};
use tokio_postgres::types::ToSql;

use crate::cli::{Changed, DeadLetters, Listed, Output};
use crate::config::{Config, Database};
use crate::source::connect::Connector;
use crate::source::error::SourceError;
use crate::source::hello;
use crate::source::link::Link;
use crate::table;

/// Events that one statement redrives or discards: a great number of them is one transaction after the other.
const BATCH: i32 = 1_000;

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// Several databases are configured.
    #[error("the configuration has several databases; name one by --database: {0}")]
    Which(String),
    /// None has that name.
    #[error("the configuration has no database {0:?}; it has: {1}")]
    Unknown(String, String),
    /// The database refused, or is away.
    #[error("{0}{hint}", hint = hint(.0).map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Source(#[from] SourceError),
    /// All dead letters, or which of them?
    #[error("which dead letters? give --id, --topic or --since, or --everything for all of the subscription")]
    NoFilter,
}

/// How to mend it: the database's hint, or one about what is read as a time or an id before any function sees it.
fn hint(error: &SourceError) -> Option<&str> {
    match error.sqlstate() {
        Some("22007" | "22008") => Some("Write a time as in '2026-01-31 12:00+00'."),
        Some("22P02") => Some("\"dtm-relay dead-letters list\" shows the ids."),
        _ => error.hint(),
    }
}

/// A connection to the database that is meant.
async fn connect(config: &Config, database: Option<&str>) -> Result<Link, OperateError> {
    Ok(connect_to(config, choose(&config.databases, database)?).await?)
}

/// A connection to a database whose extension this relay understands.
pub async fn connect_to(config: &Config, database: &Database) -> Result<Link, SourceError> {
    let link = Connector::new(database.settings.clone(), config.statement_timeout)?.connect().await?;
    let version = hello::check_extension(&link).await?;
    hello::check_protocol(&link, &version).await?;
    Ok(link)
}

/// The database of this name, or the only one.
pub fn choose<'a>(databases: &'a [Database], name: Option<&str>) -> Result<&'a Database, OperateError> {
    let names = || databases.iter().map(|database| database.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, databases) {
        (None, [only]) => Ok(only),
        (None, _) => Err(OperateError::Which(names())),
        (Some(name), _) => databases
            .iter()
            .find(|database| database.name == name)
            .ok_or_else(|| OperateError::Unknown(name.into(), names())),
    }
}

/// `status`: all subscriptions, how far each is behind, and what of it failed.
pub async fn status(config: &Config, output: &Output) -> Result<ExitCode, OperateError> {
    let link = connect(config, output.database.as_deref()).await?;
    let sql = "SELECT to_jsonb(s) FROM dtm.subscriptions s ORDER BY name";
    let rows = objects(&link, "reading subscriptions", sql, &[]).await?;
    let columns = [
        "name",
        "state",
        "owner",
        "lag_seconds",
        "lag_events",
        "lag_bytes",
        "retrying",
        "dead",
        "destination",
        "reason",
    ];
    show(output, rows, &columns, "there are no subscriptions");
    Ok(ExitCode::SUCCESS)
}

/// `dead-letters list`: those of all subscriptions or of one, newest first.
pub async fn list(config: &Config, listed: &Listed) -> Result<ExitCode, OperateError> {
    let link = connect(config, listed.output.database.as_deref()).await?;
    let sql = "SELECT to_jsonb(d) FROM dtm.dead_letters d \
               WHERE ($1::text IS NULL OR name = $1) AND ($3::text[] IS NULL OR id = ANY ($3::uuid[])) \
                 AND ($4::text IS NULL OR dtm.topic_matches($4, topic)) \
                 AND ($5::text IS NULL OR published_at >= $5::timestamptz) \
               ORDER BY died_at DESC LIMIT $2";
    let limit = i64::from(listed.limit);
    let (what, filter) = ("reading dead letters", &listed.filter);
    let parameters: [&(dyn ToSql + Sync); 5] =
        [&listed.subscription, &limit, &filter.ids(), &filter.topic, &filter.since];
    let rows = objects(&link, what, sql, &parameters).await?;
    if rows.is_empty() && listed.subscription.is_some() {
        let known = "SELECT dtm.raise_no_subscription($1) \
                     WHERE NOT EXISTS (SELECT FROM dtm.subscription WHERE name = $1)";
        link.query(what, known, &[&listed.subscription]).await?;
    }
    let columns = ["name", "id", "topic", "key", "attempts", "died_at", "last_status", "last_error"];
    show(&listed.output, rows, &columns, "there are no dead letters");
    Ok(ExitCode::SUCCESS)
}

/// What is done with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// They are delivered again.
    Redrive,
    /// They are dropped.
    Discard,
}

/// `dead-letters redrive` and `discard`: in pieces, so that a great number of them stands in nobody's way.
pub async fn deal(config: &Config, deed: Deed, which: &DeadLetters) -> Result<ExitCode, OperateError> {
    if which.filter.is_empty() && !which.everything {
        return Err(OperateError::NoFilter);
    }
    let link = connect(config, which.output.database.as_deref()).await?;
    let (function, what, done) = match deed {
        Deed::Redrive => ("redrive", "redriving", "redriven"),
        Deed::Discard => ("discard", "discarding", "discarded"),
    };
    let sql = format!("SELECT dtm.{function}($1, $2::text[]::uuid[], $3, $4::text::timestamptz, $5, $6)");
    let statement = link.prepare(what, &sql).await?;
    let filter = &which.filter;
    // No more than there are now: those that are redriven and die again are not to be redriven for ever. One at the least: the
    // database says what is wrong with the arguments.
    let count = "SELECT greatest(count(*), 1) FROM dtm.dead_letters WHERE name = $1";
    let there: i64 = link.query_one(what, count, &[&which.subscription]).await?.get(0);
    let most = which.max.map_or(there, |max| there.min(i64::from(max)));
    let mut total: i64 = 0;
    while total < most {
        let batch = i32::try_from(most - total).unwrap_or(BATCH).min(BATCH);
        let parameters: [&(dyn ToSql + Sync); 6] =
            [&which.subscription, &filter.ids(), &filter.topic, &filter.since, &batch, &which.everything];
        let moved: i64 = link.query_one(what, &statement, &parameters).await?.get(0);
        total += moved;
        if moved < i64::from(batch) {
            break;
        }
        if total < most {
            eprintln!("{total} {done} so far");
        }
    }
    match which.output.json {
        true => println!("{}", json!({ done: total })),
        false => println!("{total} {done}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is done with a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing more is sent.
    Pause,
    /// It goes on.
    Resume,
}

/// `pause` and `resume`.
pub async fn change(config: &Config, change: Change, changed: &Changed) -> Result<ExitCode, OperateError> {
    let link = connect(config, changed.output.database.as_deref()).await?;
    let (sql, what, state) = match change {
        Change::Pause => ("SELECT dtm.pause($1)", "pausing", "paused"),
        Change::Resume => ("SELECT dtm.resume($1)", "resuming", "active"),
    };
    link.query(what, sql, &[&changed.subscription]).await?;
    tell(&changed.output, &changed.subscription, state);
    Ok(ExitCode::SUCCESS)
}

/// `rewind`.
pub async fn rewind(config: &Config, changed: &Changed, to: &str) -> Result<ExitCode, OperateError> {
    let link = connect(config, changed.output.database.as_deref()).await?;
    link.query("rewinding", "SELECT dtm.rewind($1, $2)", &[&changed.subscription, &to]).await?;
    tell(&changed.output, &changed.subscription, "rewound");
    Ok(ExitCode::SUCCESS)
}

fn tell(output: &Output, subscription: &str, state: &str) {
    match output.json {
        true => println!("{}", json!({ "subscription": subscription, "state": state })),
        false => println!("{subscription}: {state}"),
    }
}

async fn objects(
    link: &Link,
    what: &'static str,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Value>, SourceError> {
    Ok(link.query(what, sql, parameters).await?.iter().map(|row| row.get(0)).collect())
}

/// As JSON everything that the view has; else the columns that matter, as a table.
fn show(output: &Output, rows: Vec<Value>, columns: &[&str], none: &str) {
    if output.json {
        println!("{}", Value::Array(rows));
    } else if rows.is_empty() {
        println!("{none}");
    } else {
        print!("{}", table::format(&rows, columns));
    }
}
