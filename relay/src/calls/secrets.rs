// SPDX-License-Identifier: PostgreSQL
//! Secrets by name: they stand in the environment or in a file, and neither in tables nor in logs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

/// Where a secret stands.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretTable {
    env: Option<String>,
    file: Option<PathBuf>,
}

/// A secret; it is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// What must not be shown.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// All secrets that the configuration names.
pub type Secrets = BTreeMap<String, Secret>;

impl SecretTable {
    /// Reads the secret. The line break at a file's end is not a part of it. An error says what is wrong, without the secret.
    pub fn read(&self) -> Result<Secret, String> {
        let text = match (&self.env, &self.file) {
            (Some(name), None) => {
                std::env::var(name).map_err(|_| format!("the variable {name} is not set"))?
            }
            (None, Some(path)) => {
                let text =
                    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
                text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text).to_owned()
            }
            _ => return Err("it needs either env or file".into()),
        };
        if text.is_empty() { Err("it is empty".into()) } else { Ok(Secret(text)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: Option<&str>, file: Option<PathBuf>) -> Result<Secret, String> {
        SecretTable { env: env.map(str::to_owned), file }.read()
    }

    #[test]
    fn a_secret_comes_from_one_place_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "Bearer abc\n").unwrap();
        let secret = read(None, Some(path.clone())).unwrap();
        assert_eq!(secret.reveal(), "Bearer abc");
        assert!(!format!("{secret:?}").contains("abc"));
        assert!(read(Some("PATH"), None).is_ok());
        assert!(read(Some("DTM_NO_SUCH_VARIABLE"), None).unwrap_err().contains("DTM_NO_SUCH_VARIABLE"));
        assert!(read(None, None).is_err() && read(Some("PATH"), Some(path.clone())).is_err());
        std::fs::write(&path, "\n").unwrap();
        assert!(read(None, Some(path)).is_err());
    }
}
