// SPDX-License-Identifier: PostgreSQL
//! Log lines on standard error.

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

/// A level that is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "log_level: {0:?} is neither a level (error, warn, info, debug, trace) nor a list of tracing's directives"
)]
pub struct LevelError(String);

/// Writes log lines from now on.
pub fn init(config: &Config) -> Result<(), LevelError> {
    let filter = filter(&config.log_level)?;
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}

/// A plain level is meant for the relay; of the libraries below it only warnings are of interest.
fn filter(level: &str) -> Result<EnvFilter, LevelError> {
    let bad = || LevelError(level.to_owned());
    let is_plain = ["error", "warn", "info", "debug", "trace"].contains(&level);
    let directives = if is_plain { format!("warn,dtm_relay={level}") } else { level.to_owned() };
    if !is_plain && !level.contains(['=', ',']) {
        return Err(bad());
    }
    EnvFilter::try_new(directives).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_taken_and_nothing_else() {
        for good in ["info", "trace", "warn,dtm_relay=debug", "hyper=trace"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "INFORMATION", "dtm_relay=loud"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}
