// SPDX-License-Identifier: PostgreSQL
//! `dtm-relay check`: what is wrong, and how to mend it. One line a finding.

use std::collections::BTreeMap;
use std::iter;
use std::process::ExitCode;

use dtm_core::destination::Destination;
use dtm_core::options::{Guarantee, Options};
use dtm_core::transaction::COORDINATOR;

use crate::config::{Config, Database};
use crate::coordinator::settlement::PAUSE_MAX;
use crate::kafka::position;
use crate::postgres::target::Function;
use crate::sink::postgres::PostgresSink;
use crate::sink::{Outlets, Sink, SinkError};
use crate::source::connect::Connector;
use crate::source::error::SourceError;
use crate::source::inspect::{self, Cursor, Kept, Stored};
use crate::source::{hello, settings::Settings};

/// How many of a kind are named one by one.
const NAMED: usize = 3;

/// What to do about a target that does not answer.
const LET_IN: &str = "see that the database is there and lets the relay's role in";

/// For how long databases that functions are called in remember, by the names that the configuration gives them.
type Memories = BTreeMap<String, Kept>;

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

    fn sum(&self) -> ExitCode {
        match self.problems {
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
}

/// Checks every database that is configured. Fails if something is wrong; the configuration itself was read before.
pub async fn run(config: &Config) -> ExitCode {
    let mut findings = Findings::default();
    println!("configuration");
    findings.good(&format!("environment {:?}, {} database(s)", config.environment, config.databases.len()));
    let outlets = match config.outlets() {
        Ok(outlets) => outlets,
        Err(error) => {
            findings.wrong(&error.to_string(), Some("give ca_file a file of certificates in PEM form"));
            return findings.sum();
        }
    };
    clusters(&outlets, &mut findings).await;
    let memories = targets(&outlets, &mut findings).await;
    for database in &config.databases {
        println!("{}: {}", database.name, database.settings.describe());
        if let Err(error) = check(config, &outlets, &memories, database, &mut findings).await {
            findings.failed(&error);
        }
    }
    findings.sum()
}

/// An error is one that leaves nothing more to check.
async fn check(
    config: &Config,
    outlets: &Outlets,
    memories: &Memories,
    database: &Database,
    findings: &mut Findings,
) -> Result<(), SourceError> {
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
    subscriptions(&stored, outlets, &greeting.source, findings).await;
    retention(&stored, inspect::kept(&link).await?, memories, findings);
    Ok(())
}

/// What receivers remember must outlive what is tried again: else an attempt is taken for a new call.
fn retention(stored: &[Stored], kept: Kept, memories: &Memories, findings: &mut Findings) {
    let remembered = |subscription: &Stored| match Destination::parse(&subscription.destination) {
        Ok(Destination::Postgres { target, .. }) => {
            memories.get(&target).map(|kept| (kept.receipts, format!(" by postgres.{target}")))
        }
        _ => Some((kept.receipts, String::new())),
    };
    let forgotten = stored.iter().filter_map(|subscription| {
        let longest = Options::from_json(&subscription.options).ok()?.retry.longest();
        let (receipts, by) = remembered(subscription)?;
        (longest >= receipts).then_some((subscription, longest, receipts, by))
    });
    for (subscription, longest, receipts, by) in forgotten.take(NAMED) {
        let (name, longest, receipts) = (&subscription.name, longest.as_secs(), receipts.as_secs());
        findings.wrong(
            &format!("subscription {name:?} may try an event again for {longest} s, and receipts are kept{by} for {receipts} s"),
            Some("raise dtm.receipts_kept, or make the retries of the subscription fewer"),
        );
    }
    // A call that began before half of the time was over may end so much later.
    let longest = kept.barriers / 2 + PAUSE_MAX;
    let everybody = iter::once((String::new(), kept))
        .chain(memories.iter().map(|(name, kept)| (format!(" by postgres.{name}"), *kept)));
    for (by, kept) in everybody.filter(|(_, kept)| kept.barriers <= longest) {
        let (barriers, longest) = (kept.barriers.as_secs(), longest.as_secs());
        findings.wrong(
            &format!("a message may call again for {longest} s, and barriers are kept{by} for {barriers} s"),
            Some("raise dtm.barriers_kept there: days are usual"),
        );
    }
}

async fn subscriptions(stored: &[Stored], outlets: &Outlets, source: &str, findings: &mut Findings) {
    for subscription in stored {
        let name = &subscription.name;
        if let Err((problem, mend)) = deliverable(subscription, outlets, source).await {
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
async fn deliverable(
    subscription: &Stored,
    outlets: &Outlets,
    source: &str,
) -> Result<(), (String, &'static str)> {
    if subscription.destination == COORDINATOR {
        return Ok(());
    }
    let stored = "call dtm.subscribe again with its name, or use a newer relay";
    let destination = Destination::parse(&subscription.destination)
        .map_err(|error| (format!("its destination: {error}"), stored))?;
    let options = Options::for_destination(&subscription.options, &destination)
        .map_err(|error| (format!("its options: {error}"), stored))?;
    let topic = match &destination {
        Destination::Kafka { topic, .. } => topic.fixed().map(str::to_owned),
        Destination::Http(_) | Destination::Postgres { .. } => None,
    };
    let mend = |error: &SinkError| match error {
        SinkError::NoTarget(_) => "describe that database in the configuration of every relay",
        SinkError::Unlisted(_) => "name the function there, in the configuration of every relay",
        SinkError::NoCluster(_) => "describe that cluster in the configuration of every relay",
        SinkError::Header(_) => "give that secret an env or a file in the configuration of every relay",
        SinkError::Uri(_) | SinkError::Source(_) => stored,
    };
    let sink = Sink::new(outlets, destination, &options, &subscription.name, source)
        .map_err(|error| (error.to_string(), mend(&error)))?;
    let sink = match sink {
        Sink::Kafka(sink) => sink,
        Sink::Postgres(sink) => return callable(&sink).await,
        Sink::Http(_) | Sink::Coordinator(_) => return Ok(()),
    };
    let (cluster, topics) = (sink.cluster().name(), sink.cluster().topics());
    if let Some(topic) = topic {
        let mend = "make the topic, or let the relay's user describe it and write to it";
        topics.clone().look(topic).await.map_err(|why| (format!("kafka.{cluster}: {why}"), mend))?;
    }
    // Where it is missing the relay makes it.
    if options.delivery == Guarantee::ExactlyOnce
        && let Ok(positions) = topics.clone().look(position::TOPIC.to_owned()).await
        && positions.is_compacted == Some(false)
    {
        let mend = "give that topic cleanup.policy=compact";
        return Err((format!("kafka.{cluster}: topic {} is not compacted", position::TOPIC), mend));
    }
    Ok(())
}

/// Whether the function of a target is there, and may be called.
async fn callable(sink: &PostgresSink) -> Result<(), (String, &'static str)> {
    let target = sink.target().name();
    let link =
        sink.target().connect().await.map_err(|error| (format!("postgres.{target}: {error}"), LET_IN))?;
    let mend = "make the function f(event jsonb) there, and the extension, and grant EXECUTE to the relay's role (see the README)";
    let Function { schema, name } = sink.function();
    match inspect::is_callable(&link, schema, name).await {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err((format!("postgres.{target}: {problem}"), mend)),
        Err(error) => Err((format!("postgres.{target}: {error}"), mend)),
    }
}

/// Whether each database that functions are called in can be called: steps of messages may name one that no subscription does.
/// Answers for how long each remembers what it was called for.
async fn targets(outlets: &Outlets, findings: &mut Findings) -> Memories {
    let mut memories = Memories::default();
    for (name, target) in outlets.postgres.iter() {
        println!("postgres.{name}: {}", target.describe());
        let asked = async { inspect::target(&target.connect().await?).await };
        match asked.await {
            Ok(Some(found)) => {
                findings.good(&format!("it answers, and has the extension pg_dtm {}", found.version));
                if !found.uncallable.is_empty() {
                    findings.note(&format!("the role may not execute {}", found.uncallable.join(", ")));
                }
                if found.is_mighty {
                    let advice = "give it a role that may call its functions and nothing else, for messages say which";
                    findings.note(&format!("the role may change subscriptions there: {advice}"));
                }
                if let Some(kept) = found.kept {
                    memories.insert(name.to_owned(), kept);
                }
            }
            Ok(None) => findings.wrong(
                "it does not have the extension pg_dtm",
                Some("run CREATE EXTENSION pg_dtm there, and grant its functions to the relay's role (see the README)"),
            ),
            Err(error) => {
                findings.wrong(&error.to_string(), Some(error.hint().unwrap_or(LET_IN)));
            }
        }
    }
    memories
}

/// Whether each Kafka cluster answers.
async fn clusters(outlets: &Outlets, findings: &mut Findings) {
    for (name, cluster) in outlets.kafka.iter() {
        println!("kafka.{name}: {}", cluster.settings().servers());
        let topics = cluster.topics().clone();
        match tokio::task::spawn_blocking(move || topics.brokers()).await {
            Ok(Ok(brokers)) => findings.good(&format!("the cluster answers; it has {brokers} broker(s)")),
            Ok(Err(error)) => findings.wrong(
                &error,
                Some("see that its bootstrap.servers listen, and that security.protocol, sasl.* and ssl.* are right"),
            ),
            Err(error) => findings.wrong(&error.to_string(), None),
        }
    }
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
