// SPDX-License-Identifier: PostgreSQL
//! The headers that a subscription adds to every event, or a transaction to every call, with their secrets filled in.

use std::collections::BTreeMap;

use dtm_core::options::{HeaderSource, Options};
use http::Uri;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::calls::secrets::{Echoes, Secret, Secrets};

/// Headers that cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderProblem {
    /// A header names a secret that the relay's configuration does not have.
    #[error("header {header}: the relay's configuration has no [secret.{name}]")]
    NoSecret {
        /// The header.
        header: String,
        /// The secret.
        name: String,
    },
    /// The configuration does not let the secret of a header be sent there.
    #[error(
        "header {header}: the secret {name} may not be sent there: servers of [secret.{name}] does not have it"
    )]
    Elsewhere {
        /// The header.
        header: String,
        /// The secret.
        name: String,
    },
    /// A header that the sink does not allow.
    #[error("header {0} cannot be sent")]
    Unsendable(String),
}

/// The value of a header.
#[derive(Clone, Debug)]
pub enum HeaderText<'a> {
    /// It may be shown.
    Plain(&'a str),
    /// It may not.
    Secret(&'a Secret),
}

impl HeaderText<'_> {
    /// As it is sent.
    pub fn text(&self) -> &str {
        match self {
            HeaderText::Plain(text) => text,
            HeaderText::Secret(secret) => secret.reveal(),
        }
    }
}

/// The subscription's headers by name.
pub fn of_subscription<'a>(
    options: &'a Options,
    secrets: &'a Secrets,
) -> Result<Vec<(&'a str, HeaderText<'a>)>, HeaderProblem> {
    filled(&options.headers, secrets)
}

/// Headers by name, with the secrets that they name.
pub fn filled<'a>(
    headers: &'a BTreeMap<String, HeaderSource>,
    secrets: &'a Secrets,
) -> Result<Vec<(&'a str, HeaderText<'a>)>, HeaderProblem> {
    let filled = |(name, source): (&'a String, &'a HeaderSource)| match source {
        HeaderSource::Text(text) => Ok((name.as_str(), HeaderText::Plain(text))),
        HeaderSource::Secret(secret) => match secrets.get(secret) {
            Some(value) => Ok((name.as_str(), HeaderText::Secret(value))),
            None => Err(HeaderProblem::NoSecret { header: name.clone(), name: secret.clone() }),
        },
    };
    headers.iter().map(filled).collect()
}

/// That the secrets among headers may be sent to a URI. `unbound`: also those of which nothing is said.
pub fn check_servers(
    headers: &BTreeMap<String, HeaderSource>,
    secrets: &Secrets,
    uri: &Uri,
    unbound: bool,
) -> Result<(), HeaderProblem> {
    for (header, source) in headers {
        if let HeaderSource::Secret(name) = source
            && let Some(secret) = secrets.get(name)
            && !(secret.is_for(uri) || unbound && !secret.is_bound())
        {
            return Err(HeaderProblem::Elsewhere { header: header.clone(), name: name.clone() });
        }
    }
    Ok(())
}

/// Headers as HTTP has them.
pub fn map(set: &[(&str, HeaderText<'_>)]) -> Result<HeaderMap, HeaderProblem> {
    let mut headers = HeaderMap::new();
    for (name, text) in set {
        let wrong = || HeaderProblem::Unsendable((*name).to_owned());
        let mut value = HeaderValue::from_bytes(text.text().as_bytes()).map_err(|_| wrong())?;
        value.set_sensitive(matches!(text, HeaderText::Secret(_)));
        headers.insert(HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?, value);
    }
    Ok(headers)
}

/// What must not be kept of an answer to such headers.
pub fn echoes(headers: &[(&str, HeaderText<'_>)]) -> Echoes {
    Echoes::of(headers.iter().filter_map(|(_, value)| match value {
        HeaderText::Secret(secret) => Some(*secret),
        HeaderText::Plain(_) => None,
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_header_gets_its_secret_or_the_subscription_is_not_delivered() {
        let json = json!({"headers": {"Authorization": "secret:a", "x-b": "c"}});
        let options = Options::from_json(&json).unwrap();
        let missing = of_subscription(&options, &Secrets::new()).unwrap_err();
        assert!(missing.to_string().contains("[secret.a]"), "{missing}");
        let secrets = Secrets::from([("a".to_owned(), Secret::from("Bearer x".to_owned()))]);
        let found = of_subscription(&options, &secrets).unwrap();
        let texts: Vec<(&str, &str)> = found.iter().map(|(name, value)| (*name, value.text())).collect();
        assert_eq!(texts, [("authorization", "Bearer x"), ("x-b", "c")]);
    }
}
