// SPDX-License-Identifier: PostgreSQL
//! Whether a database is one that this relay can and may deliver from.

use dtm_core::PROTOCOL;

use super::error::SourceError;
use super::link::Link;

/// What the database says of itself.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// The era that it writes now.
    pub era: i32,
    /// Who its events are from: `ce-source`.
    pub source: String,
    /// The extension's version.
    pub version: String,
    /// Whether commits wake a waiting relay.
    pub preloaded: bool,
}

/// Introduces the relay. A refusal says what is wrong and how to mend it.
pub async fn hello(link: &Link, environment: &str) -> Result<Greeting, SourceError> {
    let version = check_extension(link).await?;
    check_protocol(link, &version).await?;
    let what = "introducing the relay";
    let row = link
        .query_one(what, "SELECT era, source, version, preloaded FROM dtm.relay_hello($1)", &[&environment])
        .await?;
    Ok(Greeting {
        era: row.get("era"),
        source: row.get("source"),
        version: row.get("version"),
        preloaded: row.get("preloaded"),
    })
}

/// Refuses a database without the extension. Answers the extension's version.
pub async fn check_extension(link: &Link) -> Result<String, SourceError> {
    let sql = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_dtm'";
    match link.query("looking for the extension", sql, &[]).await?.first() {
        Some(row) => Ok(row.get(0)),
        None => Err(SourceError::Unfit {
            problem: "the database does not have the extension pg_dtm".into(),
            hint:
                "Run CREATE EXTENSION pg_dtm there as a superuser, or correct the database's name in the URL."
                    .into(),
        }),
    }
}

/// Refuses an extension that does not speak the relay's protocol: by its library, or by the version of its SQL.
pub async fn check_protocol(link: &Link, version: &str) -> Result<(), SourceError> {
    let sql = "SELECT least, greatest FROM dtm.protocol()";
    let row = link.query_one("asking for the protocol", sql, &[]).await?;
    agree(row.get(0), row.get(1))?;
    check_version(version)
}

/// Refuses an extension whose SQL is of an earlier version, whatever its library.
fn check_version(version: &str) -> Result<(), SourceError> {
    let number = |version: &str| -> Vec<u64> {
        version.split('.').take(2).map(|part| part.parse().unwrap_or(0)).collect()
    };
    let own = env!("CARGO_PKG_VERSION");
    if number(version) >= number(own) {
        return Ok(());
    }
    Err(SourceError::Unfit {
        problem: format!("the extension is of version {version}, the relay of version {own}"),
        hint: "Run ALTER EXTENSION pg_dtm UPDATE: the relay waits for it.".into(),
    })
}

fn agree(least: i32, greatest: i32) -> Result<(), SourceError> {
    if (least..=greatest).contains(&PROTOCOL) {
        return Ok(());
    }
    let newer = if PROTOCOL > greatest { "extension (ALTER EXTENSION pg_dtm UPDATE)" } else { "relay" };
    Err(SourceError::Unfit {
        problem: format!("the relay speaks protocol {PROTOCOL}, the extension {least} to {greatest}"),
        hint: format!("Install a newer {newer}."),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_version_is_refused_and_a_newer_one_is_not() {
        assert_eq!(check_version(env!("CARGO_PKG_VERSION")), Ok(()));
        assert_eq!(check_version("99.0"), Ok(()));
        assert!(check_version("0.1").unwrap_err().hint().unwrap().contains("ALTER EXTENSION pg_dtm UPDATE"));
    }

    #[test]
    fn a_protocol_out_of_bounds_is_refused_naming_both() {
        assert_eq!(agree(PROTOCOL, PROTOCOL), Ok(()));
        assert_eq!(agree(PROTOCOL - 1, PROTOCOL + 1), Ok(()));
        let older = agree(PROTOCOL - 2, PROTOCOL - 1).unwrap_err();
        assert!(older.to_string().contains(&format!("protocol {PROTOCOL}, the extension")));
        assert!(older.hint().unwrap().contains("ALTER EXTENSION"));
        assert!(agree(PROTOCOL + 1, PROTOCOL + 2).unwrap_err().hint().unwrap().contains("newer relay"));
    }
}
