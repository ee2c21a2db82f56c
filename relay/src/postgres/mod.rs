// SPDX-License-Identifier: PostgreSQL
//! Databases that functions are called in: those that the configuration names by `[postgres.NAME]`. They have the extension too,
//! for its receipts and barriers make each call count once.

pub mod settings;
pub mod target;
pub mod verdict;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::target::Target;

/// By name.
pub type Targets = BTreeMap<String, Arc<Target>>;
