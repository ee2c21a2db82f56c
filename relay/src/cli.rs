// SPDX-License-Identifier: PostgreSQL
//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Overrides;

/// Delivers events that were committed to PostgreSQL by pg_dtm.
///
/// Every setting can come from a flag, from an environment variable (DTM_ and its name in capitals), or from the file; the
/// first that has it counts, in this order.
#[derive(Debug, Parser)]
#[command(name = "dtm-relay", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Deliver, until SIGTERM or SIGINT. A second signal ends it at once.
    Run(Settings),
    /// Say what is wrong with configuration, connections, extension and privileges, and how to mend it.
    Check(Settings),
    /// Make a copy of a database one of its own, which delivers from here on.
    Adopt(AdoptArgs),
    /// Show all subscriptions: who delivers them, how far they are behind, what of them failed.
    Status(Output),
    /// Show, redrive or discard events that could not be delivered.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Deliver nothing more of a subscription until it is resumed.
    Pause(Changed),
    /// Let a subscription that is paused or disabled go on.
    Resume(Changed),
    /// Set a subscription's cursor; what is parked or dead at or after it goes.
    Rewind(RewindArgs),
}

/// What to do with dead letters.
#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// Show them, the newest first.
    List(Listed),
    /// Deliver them again.
    Redrive(DeadLetters),
    /// Drop them.
    Discard(DeadLetters),
}

/// Which database, and in which form the answer comes.
#[derive(Args, Debug)]
pub struct Output {
    /// The name of the database in the configuration; needed if there are several.
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// Answer JSON, with everything that is known.
    #[arg(long)]
    pub json: bool,
    /// Settings of all commands.
    #[command(flatten)]
    pub settings: Settings,
}

/// Conditions on dead letters: all of them have to hold.
#[derive(Args, Debug)]
pub struct Filter {
    /// With this id; may be given several times.
    #[arg(long = "id", value_name = "UUID")]
    pub ids: Vec<String>,
    /// Whose topic matches this pattern.
    #[arg(long, value_name = "PATTERN")]
    pub topic: Option<String>,
    /// Published at this time or later.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
}

impl Filter {
    /// None of them is given.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.topic.is_none() && self.since.is_none()
    }

    /// The ids, if there are some.
    pub fn ids(&self) -> Option<&Vec<String>> {
        Some(&self.ids).filter(|ids| !ids.is_empty())
    }
}

/// Which dead letters to show.
#[derive(Args, Debug)]
pub struct Listed {
    /// Of this subscription only.
    pub subscription: Option<String>,
    /// Which of them.
    #[command(flatten)]
    pub filter: Filter,
    /// So many at the most.
    #[arg(long, default_value_t = 100)]
    pub limit: u32,
    /// The answer.
    #[command(flatten)]
    pub output: Output,
}

/// Which dead letters to redrive or discard.
#[derive(Args, Debug)]
pub struct DeadLetters {
    /// Of this subscription.
    pub subscription: String,
    /// Which of them.
    #[command(flatten)]
    pub filter: Filter,
    /// So many at the most, the oldest first.
    #[arg(long, value_name = "N")]
    pub max: Option<u32>,
    /// All of them.
    #[arg(long)]
    pub everything: bool,
    /// The answer.
    #[command(flatten)]
    pub output: Output,
}

/// Which subscription to change.
#[derive(Args, Debug)]
pub struct Changed {
    /// Its name.
    pub subscription: String,
    /// The answer.
    #[command(flatten)]
    pub output: Output,
}

/// Where to set a cursor.
#[derive(Args, Debug)]
pub struct RewindArgs {
    /// now, earliest, or a time.
    #[arg(long, value_name = "START")]
    pub to: String,
    /// Which subscription.
    #[command(flatten)]
    pub changed: Changed,
}

/// Settings of all commands.
#[derive(Args, Debug, Default)]
pub struct Settings {
    /// The file with the settings, TOML.
    #[arg(long, env = "DTM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The database to deliver from, a libpq URL; short for `[database.default] url`.
    #[arg(long, env = "DTM_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// What this relay belongs to: a database of another environment is refused.
    #[arg(long, env = "DTM_ENVIRONMENT", value_name = "NAME")]
    pub environment: Option<String>,
    /// What this relay is called in dtm.subscriptions.
    #[arg(long, env = "DTM_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// text or json.
    #[arg(long, env = "DTM_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// error, warn, info, debug, trace, or tracing's directives.
    #[arg(long, env = "DTM_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Settings of `adopt`.
#[derive(Args, Debug)]
pub struct AdoptArgs {
    /// The name of the database in the configuration; needed if there are several.
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// Settings of all commands.
    #[command(flatten)]
    pub settings: Settings,
}

impl Cli {
    /// What the command line and the environment say.
    pub fn overrides(&self) -> Overrides {
        let settings = match &self.command {
            Command::Run(settings) | Command::Check(settings) => settings,
            Command::Adopt(args) => &args.settings,
            Command::Status(output) => &output.settings,
            Command::DeadLetters(DeadLettersCommand::List(listed)) => &listed.output.settings,
            Command::DeadLetters(DeadLettersCommand::Redrive(which) | DeadLettersCommand::Discard(which)) => {
                &which.output.settings
            }
            Command::Pause(changed) | Command::Resume(changed) => &changed.output.settings,
            Command::Rewind(args) => &args.changed.output.settings,
        };
        let Settings { config, database_url, environment, name, log_format, log_level } = settings;
        Overrides {
            file: config.clone(),
            database_url: database_url.clone(),
            environment: environment.clone(),
            name: name.clone(),
            log_format: log_format.clone(),
            log_level: log_level.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
