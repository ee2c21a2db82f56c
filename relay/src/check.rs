// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay check`: what is wrong, and how to mend it. One line a finding.

use std::process::ExitCode;

use dtm_core::destination::Destination;
use dtm_core::options::Options;

use crate::calls::secrets::Secrets;
use crate::config::{Config, Database};
use crate::sink::http;
use crate::source::connect::Connector;
use crate::source::error::SourceError;
use crate::source::inspect::{self, Cursor, Stored};
use crate::source::{hello, settings::Settings};

/// How many of a kind are named one by one.
const NAMED: usize = 3;

/// The findings of a check; they are printed as they come.
#[derive(Default)]
struct Findings {
    problems: usize,
}

impl Findings {
    fn good(&self, what: &str) {
        println!("  ok     {what}");
    }

    fn note(&self, what: &str) {
        println!("  note   {what}");
    }

    fn wrong(&mut self, what: &str, mend: Option<&str>) {
        self.problems += 1;
        let mend = mend.map(|mend| format!(" -- to mend it: {mend}")).unwrap_or_default();
        println!("  WRONG  {what}{mend}");
    }

    fn failed(&mut self, error: &SourceError) {
        self.wrong(&error.to_string(), error.hint());
    }
}

/// Checks every database that is configured. Fails if something is wrong; the configuration itself was read before.
pub async fn run(config: &Config) -> ExitCode {
    let mut findings = Findings::default();
    println!("configuration");
    findings.good(&format!("environment {:?}, {} database(s)", config.environment, config.databases.len()));
    for database in &config.databases {
        println!("{}: {}", database.name, database.settings.describe());
        if let Err(error) = check(config, database, &mut findings).await {
            findings.failed(&error);
        }
    }
    match findings.problems {
        0 => {
            println!("nothing is wrong");
            ExitCode::SUCCESS
        }
        n => {
            println!("{n} problem(s)");
            ExitCode::FAILURE
        }
    }
}

/// An error is one that leaves nothing more to check.
async fn check(config: &Config, database: &Database, findings: &mut Findings) -> Result<(), SourceError> {
    let connector = Connector::new(database.settings.clone(), config.statement_timeout)?;
    let link = match connector.connect().await {
        Ok(link) => link,
        Err(error) => {
            findings.wrong(&error.to_string(), Some(error.hint().unwrap_or(&reach(&database.settings))));
            return Ok(());
        }
    };
    let (version, encrypted) = inspect::server(&link).await?;
    findings.good(&format!(
        "connected to PostgreSQL {version}, {}",
        if encrypted { "over TLS" } else { "without TLS" }
    ));

    let version = hello::check_extension(&link).await?;
    let missing = inspect::missing_privileges(&link).await?;
    for missing in missing.iter().take(NAMED) {
        findings.wrong(&format!("the role lacks {}", missing.privilege), Some(&missing.grant));
    }
    if missing.len() > NAMED {
        let statements = missing.iter().map(|missing| missing.grant.as_str());
        let mut grants: Vec<&str> = statements.collect();
        grants.dedup();
        findings.wrong(&format!("and {} more privileges", missing.len() - NAMED), Some(&grants.join(" ")));
    }
    if !missing.is_empty() {
        return Ok(());
    }
    findings.good("privileges");

    hello::check_protocol(&link, &version).await?;
    findings.good(&format!("extension pg_dtm {version} speaks this relay's protocol"));
    if let Some(newer) = inspect::newer_version(&link).await? {
        findings
            .note(&format!("version {newer} is installed beside the server: ALTER EXTENSION pg_dtm UPDATE"));
    }
    let (greeting, stored) = inspect::greet(&link, &config.environment).await?;
    findings.good(&format!("the database may be delivered from; ce-source is {}", greeting.source));
    if !greeting.preloaded {
        findings.note("commits do not wake the relay, it polls: shared_preload_libraries has no pg_dtm");
    }
    subscriptions(&stored, &config.secrets, findings);
    Ok(())
}

fn subscriptions(stored: &[Stored], secrets: &Secrets, findings: &mut Findings) {
    for subscription in stored {
        let name = &subscription.name;
        if let Err((problem, mend)) = deliverable(subscription, secrets) {
            findings.wrong(&format!("subscription {name:?}: {problem}"), Some(mend));
        } else if let Some(problem) = misplaced(subscription.cursor) {
            let mend = "call dtm.rewind with its name and 'now', 'earliest' or a time";
            findings.wrong(&format!("subscription {name:?} {problem}"), Some(mend));
        } else if subscription.state != "active" {
            let reason =
                subscription.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            findings.note(&format!("subscription {name:?} is {}{reason}", subscription.state));
        }
    }
    match stored.len() {
        0 => findings.note("there are no subscriptions yet: nothing is delivered"),
        n => findings.good(&format!("{n} subscription(s)")),
    }
}

/// Why a relay with this configuration cannot deliver a subscription, and how to mend it.
fn deliverable(subscription: &Stored, secrets: &Secrets) -> Result<(), (String, &'static str)> {
    let stored = "call dtm.subscribe again with its name, or use a newer relay";
    Destination::parse(&subscription.destination)
        .map_err(|error| (format!("its destination: {error}"), stored))?;
    let options = Options::from_json(&subscription.options)
        .map_err(|error| (format!("its options: {error}"), stored))?;
    let secret = "give that secret an env or a file in the configuration of every relay";
    http::headers(&options, secrets).map_err(|error| (error.to_string(), secret))?;
    Ok(())
}

/// Why a subscription cannot go on from its cursor.
fn misplaced(cursor: Cursor) -> Option<&'static str> {
    match cursor {
        Cursor::Usable => None,
        Cursor::OfUnknownEra => Some("has a cursor in an era that the database does not know"),
        Cursor::Missing => Some("has no cursor"),
    }
}

/// What to look at if a server cannot be reached.
fn reach(settings: &Settings) -> String {
    let hosts: Vec<&str> = settings.servers.iter().map(|server| server.host.as_str()).collect();
    format!(
        "see that a PostgreSQL primary listens at {}, and lets this role in (pg_hba.conf)",
        hosts.join(", ")
    )
}
