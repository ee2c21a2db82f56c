// SPDX-License-Identifier: PostgreSQL
//! `[postgres.NAME]`: databases that functions are called in.

use std::collections::BTreeMap;
use std::sync::Arc;

use dtm_core::names::{self, is_name};
use serde::Deserialize;

use super::Targets;
use super::target::Target;
use crate::source::error::SourceError;
use crate::source::settings::{Settings, ThisMachine};

/// As it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetTable {
    url: String,
    #[serde(default = "connections")]
    connections: usize,
    /// What may be called: `schema.function` or `schema.*`.
    functions: Option<Vec<String>>,
}

fn connections() -> usize {
    4
}

/// How a target is reached.
#[derive(Clone, Debug)]
pub struct TargetSettings {
    /// By a URL as that of `[database.NAME]`.
    pub settings: Settings,
    /// So many calls are made side by side.
    pub connections: usize,
    /// What may be called; `None`: whatever the role may execute.
    pub functions: Option<Vec<String>>,
}

/// Checks all of them. An error is a key and what is wrong with it.
pub fn read(
    tables: BTreeMap<String, TargetTable>,
) -> Result<BTreeMap<String, TargetSettings>, (String, String)> {
    let mut targets = BTreeMap::new();
    for (name, TargetTable { url, connections, functions }) in tables {
        let wrong = |key: &str, why: String| Err((format!("postgres.{name}{key}"), why));
        if !is_name(&name) {
            return wrong("", names::RULE.into());
        }
        if !(1..=64).contains(&connections) {
            return wrong(".connections", format!("{connections} is not between 1 and 64"));
        }
        if let Some(odd) = functions.iter().flatten().find(|function| !function.contains('.')) {
            return wrong(".functions", format!("{odd:?} is neither schema.function nor schema.*"));
        }
        let settings = match Settings::parse(&url, &ThisMachine) {
            Ok(settings) => settings,
            Err(error) => return wrong(".url", error.to_string()),
        };
        targets.insert(name, TargetSettings { settings, connections, functions });
    }
    Ok(targets)
}

/// The targets; nothing is connected yet.
pub fn open(targets: &BTreeMap<String, TargetSettings>) -> Result<Targets, SourceError> {
    let open = |(name, target): (&String, &TargetSettings)| {
        let opened = Target::new(name, target)?;
        Ok((name.clone(), Arc::new(opened)))
    };
    targets.iter().map(open).collect()
}
