// SPDX-License-Identifier: PostgreSQL
//! Which endpoint a request is for.

use std::collections::BTreeMap;

use http::{Method, StatusCode, Uri};

use super::answer::Refusal;

/// Where DTM's endpoints are.
const BASE: &str = "/api/dtmsvr/";

/// An endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is what DTM calls it")]
pub enum Endpoint {
    NewGid,
    Prepare,
    Submit,
    Abort,
    ForceStop,
    Query,
    All,
    ResetCronTime,
    ResetNextCronTime,
    Subscribe,
    Unsubscribe,
    DeleteTopic,
    ScanKv,
    QueryKv,
    Version,
    Ping,
    Metrics,
    /// One of DTM's that this server does not have.
    Unsupported,
    /// None of DTM's.
    Unknown,
}

/// Path, method and endpoint. Without a method any is taken.
const ENDPOINTS: [(&str, Option<Method>, Endpoint); 22] = [
    ("newGid", Some(Method::GET), Endpoint::NewGid),
    ("prepare", Some(Method::POST), Endpoint::Prepare),
    ("submit", Some(Method::POST), Endpoint::Submit),
    ("abort", Some(Method::POST), Endpoint::Abort),
    ("forceStop", Some(Method::POST), Endpoint::ForceStop),
    ("query", Some(Method::GET), Endpoint::Query),
    ("all", Some(Method::GET), Endpoint::All),
    ("resetCronTime", Some(Method::GET), Endpoint::ResetCronTime),
    ("resetNextCronTime", Some(Method::POST), Endpoint::ResetNextCronTime),
    ("subscribe", Some(Method::GET), Endpoint::Subscribe),
    ("unsubscribe", Some(Method::GET), Endpoint::Unsubscribe),
    ("topic/", Some(Method::DELETE), Endpoint::DeleteTopic),
    ("scanKV", Some(Method::GET), Endpoint::ScanKv),
    ("queryKV", Some(Method::GET), Endpoint::QueryKv),
    ("version", Some(Method::GET), Endpoint::Version),
    ("/api/ping", None, Endpoint::Ping),
    ("/api/metrics", Some(Method::GET), Endpoint::Metrics),
    ("registerBranch", None, Endpoint::Unsupported),
    ("registerXaBranch", None, Endpoint::Unsupported),
    ("registerTccBranch", None, Endpoint::Unsupported),
    ("prepareWorkflow", None, Endpoint::Unsupported),
    ("/api/json-rpc", None, Endpoint::Unsupported),
];

impl Endpoint {
    /// The endpoint of a request, or [`Endpoint::Unknown`]; and whether it takes the method.
    pub fn find(method: &Method, path: &str) -> (Self, bool) {
        let name = path.strip_prefix(BASE).unwrap_or(if path.starts_with('/') { path } else { "" });
        let is_it = |known: &str| match known.ends_with('/') {
            true => name.strip_prefix(known).is_some_and(|rest| !rest.is_empty()),
            false => name == known,
        };
        let found = ENDPOINTS.iter().find(|(known, ..)| is_it(known));
        found.map_or((Endpoint::Unknown, true), |(_, taken, endpoint)| {
            (*endpoint, taken.as_ref().is_none_or(|taken| taken == method))
        })
    }

    /// What metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Unsupported => "unsupported",
            Endpoint::Unknown => "unknown",
            _ => {
                let known = ENDPOINTS.iter().find(|(_, _, endpoint)| *endpoint == self);
                known.map_or("unknown", |(path, ..)| path.trim_matches('/').trim_start_matches("api/"))
            }
        }
    }
}

/// The name of the topic in the path of [`Endpoint::DeleteTopic`].
pub fn topic_of(path: &str) -> String {
    let encoded = path.strip_prefix(BASE).and_then(|name| name.strip_prefix("topic/")).unwrap_or_default();
    // In a path a plus is a plus.
    let pair = format!("topic={}", encoded.replace('+', "%2B"));
    form_urlencoded::parse(pair.as_bytes()).next().map(|(_, topic)| topic.into_owned()).unwrap_or_default()
}

/// What stands behind the question mark. An empty value counts as absent.
pub struct Query(BTreeMap<String, String>);

impl Query {
    /// Of a URL.
    pub fn of(uri: &Uri) -> Self {
        let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
        Query(
            pairs
                .filter(|(_, value)| !value.is_empty())
                .map(|(n, v)| (n.into_owned(), v.into_owned()))
                .collect(),
        )
    }

    /// A value.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A value that is a number.
    pub fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        let read = |text: &str| {
            let number = text.parse().ok().filter(|number: &i64| *number >= 0);
            number.ok_or_else(|| {
                Refusal::error(StatusCode::BAD_REQUEST, format!("{name}: {text:?} is no number"))
            })
        };
        self.text(name).map(read).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_found_by_path_and_take_their_method() {
        for (method, path, endpoint, taken) in [
            (Method::POST, "/api/dtmsvr/submit", Endpoint::Submit, true),
            (Method::GET, "/api/dtmsvr/submit", Endpoint::Submit, false),
            (Method::GET, "/api/dtmsvr/submit/", Endpoint::Unknown, true),
            (Method::GET, "/submit", Endpoint::Unknown, true),
            (Method::DELETE, "/api/dtmsvr/topic/a", Endpoint::DeleteTopic, true),
            (Method::DELETE, "/api/dtmsvr/topic/", Endpoint::Unknown, true),
            (Method::HEAD, "/api/ping", Endpoint::Ping, true),
            (Method::POST, "/api/json-rpc", Endpoint::Unsupported, true),
        ] {
            assert_eq!(Endpoint::find(&method, path), (endpoint, taken), "{method} {path}");
        }
        assert_eq!(Endpoint::Metrics.name(), "metrics");
        assert_eq!(Endpoint::DeleteTopic.name(), "topic");
        assert_eq!(topic_of("/api/dtmsvr/topic/a+b%20c"), "a+b c");
    }

    #[test]
    fn numbers_are_numbers_or_absent() {
        let query = Query::of(&"/x?limit=7&position=&gid=a%3Bb&timeout=x".parse().unwrap());
        assert_eq!(query.number("limit"), Ok(Some(7)));
        assert_eq!(query.number("position"), Ok(None));
        assert_eq!(query.text("gid"), Some("a;b"));
        assert!(query.number("timeout").is_err());
    }
}
