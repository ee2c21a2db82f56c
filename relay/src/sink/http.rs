// SPDX-License-Identifier: PostgreSQL
//! HTTP: one POST an event.

use std::sync::Arc;
use std::time::Duration;

use dtm_core::options::Options;
use dtm_core::page::Event;
use http::Uri;
use http::header::{HeaderMap, HeaderValue, USER_AGENT};

use super::attempts::Attempts;
use super::cloudevents::Unsendable;
use super::headers;
use super::{SinkError, cloudevents_http as cloudevents};
use crate::calls::http::{self as calls, Endpoint, HttpCaller};
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
        headers::check_servers(&options.headers, secrets, &uri, true)?;
        let set = headers::of_subscription(options, secrets)?;
        let headers = headers::map(&set)?;
        Ok(HttpSink {
            endpoint: caller.endpoint(uri)?,
            timeout: options.timeout,
            source,
            headers,
            echoes: headers::echoes(&set),
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
        headers.entry(USER_AGENT).or_insert_with(calls::agent);
        Ok(headers)
    }
}

/// Requests of one pipeline that are on their way.
pub struct HttpSender<T> {
    sink: Arc<HttpSink>,
    attempts: Attempts<T>,
}

impl<T: AsRef<Event> + Send + 'static> HttpSender<T> {
    /// None yet.
    pub fn new(sink: Arc<HttpSink>) -> Self {
        HttpSender { sink, attempts: Attempts::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.attempts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes a request.
    pub fn send(&mut self, item: T) {
        let sink = self.sink.clone();
        self.attempts.push(async move {
            let outcome = sink.send(item.as_ref()).await;
            (item, outcome)
        });
    }

    /// Waits for requests that have ended; for ever if there is none.
    pub async fn answers(&mut self) -> Vec<(T, Outcome)> {
        self.attempts.answers().await
    }
}
