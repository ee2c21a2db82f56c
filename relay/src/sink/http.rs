// SPDX-License-Identifier: PostgreSQL
//! HTTP: one POST an event.

use std::time::Duration;

use dtm_core::options::{HeaderSource, Options};
use dtm_core::page::Event;
use http::Uri;
use http::header::{HeaderMap, HeaderName, HeaderValue, USER_AGENT};

use super::cloudevents::{self, Unsendable};
use crate::calls::http::{Endpoint, HttpCaller, NotAbsolute};
use crate::calls::outcome::{Class, Outcome};
use crate::calls::secrets::{Echoes, Secrets};

/// One endpoint that events are posted to.
pub struct HttpSink {
    endpoint: Endpoint,
    timeout: Duration,
    source: HeaderValue,
    /// Of the subscription: they win over an event's own.
    headers: HeaderMap,
    /// Of the secrets that stand in its headers.
    echoes: Echoes,
}

/// An endpoint cannot be called as the subscription says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The destination.
    #[error(transparent)]
    Uri(#[from] NotAbsolute),
    /// `ce-source`.
    #[error(transparent)]
    Source(#[from] Unsendable),
    /// A header names a secret that the relay's configuration does not have.
    #[error("header {header}: the relay's configuration has no [secret.{name}]")]
    NoSecret {
        /// The header.
        header: String,
        /// The secret.
        name: String,
    },
    /// A header that HTTP does not allow.
    #[error("header {0} cannot be sent")]
    Header(String),
}

impl HttpSink {
    /// `source`: who the events are from.
    pub fn new(
        caller: &HttpCaller,
        uri: Uri,
        options: &Options,
        secrets: &Secrets,
        source: &str,
    ) -> Result<Self, SinkError> {
        let source = cloudevents::attribute("the source", source)?;
        let headers = headers(options, secrets)?;
        let sent = options.headers.values().filter_map(|source| match source {
            HeaderSource::Secret(name) => secrets.get(name),
            HeaderSource::Text(_) => None,
        });
        Ok(HttpSink {
            endpoint: caller.endpoint(uri)?,
            timeout: options.timeout,
            source,
            headers,
            echoes: Echoes::of(sent),
        })
    }

    /// Makes one attempt.
    pub async fn send(&self, event: &Event) -> Outcome {
        let outcome = match self.headers(event) {
            Ok(headers) => {
                let body = event.payload.clone().unwrap_or_default();
                self.endpoint.post(headers, body, self.timeout).await
            }
            Err(unsendable) => Outcome::without_answer(Class::Unsendable, unsendable.to_string()),
        };
        outcome.without(&self.echoes)
    }

    fn headers(&self, event: &Event) -> Result<HeaderMap, Unsendable> {
        let mut headers = cloudevents::headers(event, &self.source)?;
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        let agent = HeaderValue::from_static(concat!("dtm-relay/", env!("CARGO_PKG_VERSION")));
        headers.entry(USER_AGENT).or_insert(agent);
        Ok(headers)
    }
}

/// The subscription's headers, with its secrets filled in.
pub fn headers(options: &Options, secrets: &Secrets) -> Result<HeaderMap, SinkError> {
    let mut headers = HeaderMap::new();
    for (name, source) in &options.headers {
        let wrong = || SinkError::Header(name.clone());
        let value = match source {
            HeaderSource::Text(text) => HeaderValue::from_bytes(text.as_bytes()).map_err(|_| wrong())?,
            HeaderSource::Secret(secret) => {
                let missing = || SinkError::NoSecret { header: name.clone(), name: secret.clone() };
                let secret = secrets.get(secret).ok_or_else(missing)?;
                let mut value = HeaderValue::from_bytes(secret.reveal().as_bytes()).map_err(|_| wrong())?;
                value.set_sensitive(true);
                value
            }
        };
        headers.insert(HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_header_gets_its_secret_or_the_subscription_is_not_delivered() {
        let options =
            Options::from_json(&json!({"headers": {"Authorization": "secret:a", "x-b": "c"}})).unwrap();
        let missing = headers(&options, &Secrets::new()).unwrap_err();
        assert!(missing.to_string().contains("[secret.a]"), "{missing}");
        let found = headers(&Options::from_json(&json!({"headers": {"x-b": "c"}})).unwrap(), &Secrets::new());
        assert_eq!(found.unwrap()["x-b"], "c");
    }
}
