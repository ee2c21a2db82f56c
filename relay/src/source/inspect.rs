// SPDX-License-Identifier: PostgreSQL
//! What a database says when it is asked whether all is well. Nothing is changed by asking.

use std::time::Duration;

use super::error::SourceError;
use super::hello::{self, Greeting};
use super::link::Link;

/// A privilege that the relay's role does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// `SELECT on table dtm.log_1`
    pub privilege: String,
    /// The statement that grants it and its like.
    pub grant: String,
}

/// A subscription as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Its destination.
    pub destination: String,
    /// Its options.
    pub options: serde_json::Value,
    /// `active` or `paused`.
    pub state: String,
    /// Why it is paused, if that was not asked for.
    pub reason: Option<String>,
    /// Where it goes on from.
    pub cursor: Cursor,
}

/// Whether a subscription has a place to go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cursor {
    /// It has.
    Usable,
    /// It has one in an era that the database does not know.
    OfUnknownEra,
    /// It has none.
    Missing,
}

const WHAT: &str = "inspecting";

/// PostgreSQL's version, and whether the connection is encrypted.
pub async fn server(link: &Link) -> Result<(String, bool), SourceError> {
    let sql = "SELECT current_setting('server_version'), \
               coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)";
    let row = link.query_one(WHAT, sql, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

/// The newest version of the extension that is installed beside the server, where it differs from the database's.
pub async fn newer_version(link: &Link) -> Result<Option<String>, SourceError> {
    let sql = "SELECT default_version FROM pg_available_extensions \
               WHERE name = 'pg_dtm' AND default_version IS DISTINCT FROM installed_version";
    Ok(link.query(WHAT, sql, &[]).await?.first().map(|row| row.get(0)))
}

/// What of the privileges in the README's snippet for relays the role does not have.
pub async fn missing_privileges(link: &Link) -> Result<Vec<Missing>, SourceError> {
    let rows = link.query(WHAT, MISSING, &[]).await?;
    Ok(rows.iter().map(|row| Missing { privilege: row.get(0), grant: row.get(1) }).collect())
}

const MISSING: &str = "
    SELECT privilege, format('GRANT %s TO %I;', granted, current_user) FROM (
        SELECT 1 AS rank, 'USAGE on schema dtm' AS privilege, 'USAGE ON SCHEMA dtm' AS granted
        WHERE NOT has_schema_privilege('dtm', 'USAGE')
        UNION ALL
        SELECT 2, format('%s on %s dtm.%I', p, CASE relkind WHEN 'v' THEN 'view' ELSE 'table' END, relname),
               'SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA dtm'
        FROM pg_class, unnest(CASE relkind WHEN 'v' THEN ARRAY['SELECT']
                                           ELSE ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE'] END) AS p
        WHERE relnamespace = 'dtm'::regnamespace AND relkind IN ('r', 'p', 'v') AND NOT has_table_privilege(oid, p)
        UNION ALL
        SELECT 3, format('USAGE on sequence dtm.%I', relname), 'USAGE, SELECT ON ALL SEQUENCES IN SCHEMA dtm'
        FROM pg_class
        WHERE relnamespace = 'dtm'::regnamespace AND relkind = 'S'
          AND NOT (has_sequence_privilege(oid, 'USAGE') AND has_sequence_privilege(oid, 'SELECT'))
        UNION ALL
        SELECT 4, 'EXECUTE on ' || oid::regprocedure, 'EXECUTE ON ALL ROUTINES IN SCHEMA dtm'
        FROM pg_proc
        WHERE pronamespace = 'dtm'::regnamespace AND NOT has_function_privilege(oid, 'EXECUTE')
    ) AS missing
    ORDER BY rank, privilege";

/// Introduces the relay as a run does, looks at the subscriptions as that leaves them (it pauses those of a database that
/// was restored), and takes everything back: a first relay leaves its environment in the database.
pub async fn greet(link: &Link, environment: &str) -> Result<(Greeting, Vec<Stored>), SourceError> {
    link.batch(WHAT, "BEGIN").await?;
    let seen = async { Ok((hello::hello(link, environment).await?, subscriptions(link).await?)) }.await;
    link.batch(WHAT, "ROLLBACK").await?;
    seen
}

async fn subscriptions(link: &Link) -> Result<Vec<Stored>, SourceError> {
    let sql = "SELECT name, destination, options, state, reason, \
               (SELECT EXISTS (SELECT FROM dtm.eras e WHERE e.era = dtm.position_era(c.\"position\")) \
                FROM dtm.relay_cursor(id, 0, epoch) c) \
               FROM dtm.subscription ORDER BY name";
    let rows = link.query(WHAT, sql, &[]).await?;
    let stored = |row: &tokio_postgres::Row| Stored {
        name: row.get(0),
        destination: row.get(1),
        options: row.get(2),
        state: row.get(3),
        reason: row.get(4),
        cursor: match row.get(5) {
            Some(true) => Cursor::Usable,
            Some(false) => Cursor::OfUnknownEra,
            None => Cursor::Missing,
        },
    };
    Ok(rows.iter().map(stored).collect())
}

/// How long receivers remember.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// dtm.receipts_kept.
    pub receipts: Duration,
    /// dtm.barriers_kept.
    pub barriers: Duration,
}

/// What this database says of how long they do.
pub async fn kept(link: &Link) -> Result<Kept, SourceError> {
    let sql = "SELECT extract(epoch FROM dtm.receipts_kept())::float8, extract(epoch FROM dtm.barriers_kept())::float8";
    let row = link.query_one(WHAT, sql, &[]).await?;
    let duration = |at| Duration::try_from_secs_f64(row.get(at)).unwrap_or_default();
    Ok(Kept { receipts: duration(0), barriers: duration(1) })
}

/// The extension in a database that functions are called in.
#[derive(Clone, Debug)]
pub struct TargetExtension {
    /// Its version.
    pub version: String,
    /// What calls need and the role cannot execute, or this version does not have.
    pub uncallable: Vec<String>,
    /// The role could change subscriptions there, and so could whatever function a message names.
    pub is_mighty: bool,
    /// For how long it remembers; `None`: its version does not say.
    pub kept: Option<Kept>,
}

/// What a target has of the extension; `None`: it does not have it.
pub async fn target(link: &Link) -> Result<Option<TargetExtension>, SourceError> {
    // By the catalogs: where the role may not use the schema, to_regprocedure raises.
    let sql = "SELECT e.extversion, ARRAY(
            SELECT 'dtm.' || needed
            FROM pg_catalog.unnest('{receive,call_events,call_branch,barrier,query_prepared}'::text[]) AS needed
            WHERE NOT EXISTS (
                SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
                WHERE n.nspname = 'dtm' AND p.proname = needed
                  AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
                  AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE'))),
            EXISTS (
                SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'dtm' AND c.relname = 'subscription'
                  AND pg_catalog.has_table_privilege(c.oid, 'UPDATE'))
        FROM pg_catalog.pg_extension e WHERE e.extname = 'pg_dtm'";
    let rows = link.query("looking for the extension", sql, &[]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let uncallable: Vec<String> = row.get(1);
    let kept = if uncallable.is_empty() { Some(kept(link).await?) } else { None };
    Ok(Some(TargetExtension { version: row.get(0), uncallable, is_mighty: row.get(2), kept }))
}

/// Why a function of a target cannot be called for events; `None`: it can.
pub async fn is_callable(link: &Link, schema: &str, function: &str) -> Result<Option<String>, SourceError> {
    let sql = "SELECT CASE
        WHEN pg_catalog.to_regprocedure('dtm.call_events(text,text,text,uuid[],text[],text[])') IS NULL
            THEN 'it does not have the extension pg_dtm of this version'
        WHEN pg_catalog.to_regprocedure(pg_catalog.format('%I.%I(jsonb)', $1::text, $2::text)) IS NULL
            THEN pg_catalog.format('there is no function %I.%I(jsonb)', $1::text, $2::text)
        WHEN NOT pg_catalog.has_function_privilege(
                 pg_catalog.to_regprocedure(pg_catalog.format('%I.%I(jsonb)', $1::text, $2::text)), 'EXECUTE')
          OR NOT pg_catalog.has_function_privilege('dtm.call_events(text,text,text,uuid[],text[],text[])', 'EXECUTE')
          OR NOT pg_catalog.has_function_privilege('dtm.receive(text,uuid)', 'EXECUTE')
            THEN pg_catalog.format('the role may not execute %I.%I, dtm.call_events or dtm.receive', $1::text, $2::text)
        END";
    let row = link.query_one("looking for a function", sql, &[&schema, &function]).await?;
    Ok(row.get(0))
}
