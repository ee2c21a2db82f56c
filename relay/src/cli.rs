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
