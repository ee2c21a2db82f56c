// SPDX-License-Identifier: PostgreSQL
//! What a client is told: a status and an object, in DTM's form.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::source::error::SourceError;

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    status: StatusCode,
    body: Body,
}

#[derive(Clone, Debug, PartialEq)]
enum Body {
    Object(Value),
    Text(String),
}

/// Why something was not done, and what that means to the client.
pub type Refusal = Answer;

impl Answer {
    /// Done.
    pub fn success() -> Self {
        Answer::object(json!({"dtm_result": "SUCCESS"}))
    }

    /// An object.
    pub fn object(value: Value) -> Self {
        Answer { status: StatusCode::OK, body: Body::Object(value) }
    }

    /// The text of metrics.
    pub fn text(text: String) -> Self {
        Answer { status: StatusCode::OK, body: Body::Text(text) }
    }

    /// It will never be done: DTM's failure.
    pub fn failure(message: impl Into<String>) -> Self {
        let body = json!({"dtm_result": "FAILURE", "message": message.into()});
        Answer { status: StatusCode::CONFLICT, body: Body::Object(body) }
    }

    /// It is being done.
    pub fn ongoing(message: impl Into<String>) -> Self {
        let body = json!({"dtm_result": "ONGOING", "message": message.into()});
        Answer { status: StatusCode::TOO_EARLY, body: Body::Object(body) }
    }

    /// An error with its reason.
    pub fn error(status: StatusCode, message: impl Into<String>) -> Self {
        Answer { status, body: Body::Object(json!({"message": message.into()})) }
    }

    /// The request is wrong.
    pub fn bad(message: impl Into<String>) -> Self {
        Answer::error(StatusCode::BAD_REQUEST, message)
    }

    /// What DTM answers 500 to.
    pub fn wrong(message: impl Into<String>) -> Self {
        Answer::error(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// As it goes over the wire.
    pub fn into_response(self) -> Response<Full<Bytes>> {
        let (content_type, body) = match self.body {
            Body::Object(value) => ("application/json", value.to_string()),
            Body::Text(text) => ("text/plain; version=0.0.4", text),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<SourceError> for Answer {
    fn from(error: SourceError) -> Self {
        let SourceError::Database { sqlstate, message, detail, hint, .. } = &error else {
            return Answer::error(StatusCode::SERVICE_UNAVAILABLE, format!("the database is away: {error}"));
        };
        let parts = [Some(message), detail.as_ref(), hint.as_ref()];
        let text = parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" -- ");
        match sqlstate.get(..2).unwrap_or_default() {
            "22" | "54" => Answer::bad(text),
            // There is no such topic.
            "42" if sqlstate == "42704" => Answer::bad(text),
            "55" if sqlstate == "55000" => Answer::failure(text),
            // Somebody is in the way, or the server is on its way down or up.
            "08" | "40" | "53" | "55" | "57" | "58" => {
                Answer::error(StatusCode::SERVICE_UNAVAILABLE, format!("try again: {text}"))
            }
            _ => Answer::wrong(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_is_away_is_no_fault_of_the_request() {
        let database = |sqlstate: &str| {
            let (sqlstate, message) = (sqlstate.to_owned(), "m".to_owned());
            let error =
                SourceError::Database { what: "x", sqlstate, message, detail: Some("d".into()), hint: None };
            Answer::from(error)
        };
        assert_eq!(Answer::from(SourceError::Unreachable("gone".into())).status().as_u16(), 503);
        for (sqlstate, status) in
            [("22023", 400), ("42704", 400), ("55000", 409), ("55P03", 503), ("57P01", 503), ("42501", 500)]
        {
            assert_eq!(database(sqlstate).status().as_u16(), status, "{sqlstate}");
        }
        assert_eq!(database("22023"), Answer::bad("m -- d"));
    }
}
