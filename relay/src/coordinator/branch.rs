// SPDX-License-Identifier: PostgreSQL
//! Calls of branches: what is sent, as DTM sends it, and what the answer means.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dtm_core::destination::Destination;
use dtm_core::page::Event;
use dtm_core::topic_template::TopicTemplate;
use dtm_core::transaction::{Action, Decider, Options};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, USER_AGENT};
use http::{Method, Uri};
use tokio::time::Instant;
use tracing::{info, warn};
use uuid::Uuid;

use super::endpoints::{Admission, Endpoints, Health, Standing};
use super::machine::{Answer, Report};
use crate::calls::http::{self as calls, Endpoint, Wanted};
use crate::calls::outcome::{Class, Outcome};
use crate::calls::secrets::Echoes;
use crate::postgres::target::{Branch, Function};
use crate::sink::headers::{self, HeaderProblem};
use crate::sink::kafka::{KafkaSender, KafkaSink};
use crate::sink::{Outlets, SinkError};

/// Servers whose connections are kept; past that all are forgotten.
const SERVERS_MAX: usize = 1_000;

/// One call of a transaction.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Of the transaction.
    pub gid: &'a str,
    /// Of the transaction, as DTM names it.
    pub trans_type: &'a str,
    /// Of the branch; `00` for asking whether it is committed.
    pub branch_id: &'a str,
    /// What the branch is to do.
    pub op: &'a str,
    /// The destination.
    pub action: &'a str,
    /// The body; without one HTTP's method is GET.
    pub payload: Option<&'a Bytes>,
    /// Of a Kafka record.
    pub key: Option<&'a str>,
    /// Of a Kafka record: a JSON object of strings.
    pub headers: Option<&'a str>,
    /// It was made before, and was no success.
    pub is_repeated: bool,
}

/// Makes calls.
pub struct Caller {
    outlets: Outlets,
    endpoints: Endpoints,
    /// By scheme and authority.
    servers: Mutex<BTreeMap<String, Arc<Endpoint>>>,
    /// What database the transactions are from, for Kafka records.
    source: String,
}

/// What is called.
enum Callee {
    /// As a step names it.
    Destination(Destination),
    /// `postgres://TARGET`: a database that knows whether a message of this age is committed.
    Decider(String, Duration),
}

impl Callee {
    fn parse(action: &str) -> Option<Self> {
        match Action::parse(action) {
            Ok(Action::Call(destination)) => Some(Callee::Destination(destination)),
            Ok(Action::Topic(_)) | Err(_) => None,
        }
    }

    fn of_decider(text: &str, age: Duration) -> Option<Self> {
        match Decider::parse(text).ok()? {
            Decider::Http(uri) => Some(Callee::Destination(Destination::Http(uri))),
            Decider::Postgres(target) => Some(Callee::Decider(target, age)),
        }
    }

    /// What works or does not as a whole.
    fn endpoint(&self) -> String {
        match self {
            Callee::Destination(Destination::Http(uri)) => server_of(uri),
            Callee::Destination(Destination::Kafka { cluster, .. }) => format!("kafka://{cluster}"),
            Callee::Destination(Destination::Postgres { target, .. }) | Callee::Decider(target, _) => {
                format!("postgres://{target}")
            }
        }
    }
}

/// What came of a call, and whether what waits for its endpoint may go on.
pub struct Called {
    /// See there.
    pub report: Report,
    /// The endpoint works again.
    pub revived: Option<String>,
}

impl Caller {
    /// Calls go out by these.
    pub fn new(outlets: Outlets, source: String) -> Self {
        Caller { outlets, endpoints: Endpoints::default(), servers: Mutex::default(), source }
    }

    /// Makes a call, unless its endpoint is down or has enough to do.
    pub async fn call(&self, call: Call<'_>, options: &Options) -> Called {
        self.make(Callee::parse(call.action), call, options).await
    }

    /// Asks whoever knows whether a message is committed that was prepared so long ago.
    pub async fn ask_whether_committed(&self, call: Call<'_>, age: Duration, options: &Options) -> Called {
        self.make(Callee::of_decider(call.action, age), call, options).await
    }

    async fn make(&self, callee: Option<Callee>, call: Call<'_>, options: &Options) -> Called {
        let Some(callee) = callee else {
            let error = format!("{} cannot be called", call.action);
            let report = Report {
                answer: Answer::Unknown,
                was_called: true,
                status: None,
                error,
                endpoint: None,
                not_before: None,
            };
            return Called { report, revived: None };
        };
        let endpoint = callee.endpoint();
        let bytes = call.payload.map_or(0, Bytes::len);
        match self.endpoints.admit(&endpoint, call.gid, bytes).await {
            Admission::Admitted => {}
            Admission::Down => return not_called(endpoint, "is down"),
            Admission::Full => return not_called(endpoint, "has enough to do"),
        }
        let ended = Ended { endpoints: &self.endpoints, endpoint: &endpoint, gid: call.gid, bytes };
        let Some((outcome, answer)) = self.outcome(callee, call, options).await else {
            ended.with(Health::Unknown);
            return not_called(endpoint, "has enough to do");
        };
        let standing = ended.with(health(&outcome, &answer, call.is_repeated));
        let error = match outcome.body.as_str() {
            "" => outcome.to_string(),
            body => format!("{outcome}: {body}"),
        };
        match standing {
            Standing::Opened => warn!(endpoint, "it is down, and left alone but for a few calls: {error}"),
            Standing::Revived => info!(endpoint, "it works again"),
            Standing::Up | Standing::Down => {}
        }
        let is_down = matches!(standing, Standing::Opened | Standing::Down);
        let report = Report {
            answer,
            was_called: true,
            status: outcome.status,
            error,
            endpoint: is_down.then(|| endpoint.clone()),
            not_before: outcome.retry_after,
        };
        Called { report, revived: (standing == Standing::Revived).then_some(endpoint) }
    }

    /// Makes a call; `None`: its turn did not come.
    async fn outcome(&self, callee: Callee, call: Call<'_>, options: &Options) -> Option<(Outcome, Answer)> {
        let outcome = match callee {
            Callee::Destination(Destination::Http(uri)) => return Some(self.http(uri, call, options).await),
            Callee::Destination(Destination::Kafka { cluster, topic }) => {
                let outcome = self.kafka(&cluster, topic, call).await;
                outcome.unwrap_or_else(|problem| unsendable(problem.to_string()))
            }
            Callee::Destination(Destination::Postgres { target, schema, function }) => {
                let function = Function { schema, name: function };
                self.postgres(&target, &function, call, options).await?
            }
            Callee::Decider(target, age) => match self.outlets.postgres.get(&target) {
                Some(known) => known.query_prepared(call.gid, age, options.request_timeout).await?,
                None => unsendable(SinkError::NoTarget(target).to_string()),
            },
        };
        let answer = judge(&outcome, options);
        Some((outcome, answer))
    }

    /// Endpoints that take no more calls than so many now, and how many any other takes.
    pub fn rooms(&self) -> (Vec<(String, i32)>, i32) {
        self.endpoints.rooms(Instant::now())
    }

    /// Whether an endpoint works, as far as is known.
    pub fn is_up(&self, endpoint: &str) -> bool {
        self.endpoints.is_up(endpoint)
    }

    /// A function behind the barrier. `None`: all connections are busy.
    async fn postgres(
        &self,
        target: &str,
        function: &Function,
        call: Call<'_>,
        options: &Options,
    ) -> Option<Outcome> {
        let Some(known) = self.outlets.postgres.get(target) else {
            return Some(unsendable(SinkError::NoTarget(target.to_owned()).to_string()));
        };
        if !known.lets_call(function) {
            return Some(unsendable(SinkError::Unlisted(target.to_owned()).to_string()));
        }
        let payload = call.payload.map(|payload| std::str::from_utf8(payload)).transpose();
        let Ok(payload) = payload else {
            return Some(unsendable("the payload is no text"));
        };
        let Call { gid, trans_type, branch_id, op, .. } = call;
        let branch = Branch { trans_type, gid, branch_id, op, payload };
        known.call_branch(function, branch, options.request_timeout).await
    }

    async fn http(&self, uri: Uri, call: Call<'_>, options: &Options) -> (Outcome, Answer) {
        let unsendable = |error: String| (unsendable(error), Answer::Unknown);
        let (server, uri) = match self.server(&uri).and_then(|server| Ok((server, with_query(&uri, &call)?)))
        {
            Ok(found) => found,
            Err(error) => return unsendable(error),
        };
        let (headers, echoes) = match self.headers(&uri, options) {
            Ok(found) => found,
            Err(problem) => return unsendable(problem.to_string()),
        };
        let (method, body) = match call.payload {
            Some(payload) if !payload.is_empty() => (Method::POST, payload.clone()),
            _ => (Method::GET, Bytes::new()),
        };
        let wanted = if options.outcome_in_body { Wanted::All } else { Wanted::Start };
        let outcome = server.at(uri).call(method, headers, body, options.request_timeout, wanted).await;
        // By the whole of it, before it is cut for people.
        let answer = judge(&outcome, options);
        (outcome.without(&echoes), answer)
    }

    fn server(&self, uri: &Uri) -> Result<Arc<Endpoint>, String> {
        let name = server_of(uri);
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = servers.get(&name) {
            return Ok(found.clone());
        }
        if servers.len() >= SERVERS_MAX {
            servers.clear();
        }
        let made = self.outlets.http.endpoint(uri.clone()).map_err(|error| error.to_string())?;
        Ok(servers.entry(name).or_insert_with(|| Arc::new(made)).clone())
    }

    fn headers(&self, uri: &Uri, options: &Options) -> Result<(HeaderMap, Echoes), HeaderProblem> {
        headers::check_servers(&options.branch_headers, &self.outlets.secrets, uri, false)?;
        let set = headers::filled(&options.branch_headers, &self.outlets.secrets)?;
        let mut headers = headers::map(&set)?;
        headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
        headers.entry(USER_AGENT).or_insert_with(calls::agent);
        Ok((headers, headers::echoes(&set)))
    }

    /// A record with DTM's names of the call among its headers.
    async fn kafka(&self, cluster: &str, topic: TopicTemplate, call: Call<'_>) -> Result<Outcome, SinkError> {
        let known =
            self.outlets.kafka.get(cluster).ok_or_else(|| SinkError::NoCluster(cluster.to_owned()))?;
        let options = dtm_core::options::Options::default();
        let sink = KafkaSink::new(known.clone(), topic, &options, &self.outlets.secrets, &self.source)?;
        let mut sender = KafkaSender::new(Arc::new(sink));
        sender.send(Record(event_of(&call)));
        // It has to find the topic first, and a producer.
        loop {
            if let Some((_, outcome)) = sender.answers().await.pop() {
                return Ok(outcome);
            }
        }
    }
}

struct Record(Event);

impl AsRef<Event> for Record {
    fn as_ref(&self) -> &Event {
        &self.0
    }
}

/// A call as an event: its id is the same each time that it is sent.
fn event_of(call: &Call<'_>) -> Event {
    let mut headers: BTreeMap<String, String> =
        call.headers.and_then(|headers| serde_json::from_str(headers).ok()).unwrap_or_default();
    for (name, value) in names(call) {
        headers.insert(format!("dtm-{name}"), value.to_owned());
    }
    let name = format!("{}/{}/{}", call.gid, call.branch_id, call.op);
    Event {
        seq: 0,
        published_at_us: jiff::Timestamp::now().as_microsecond(),
        id: Uuid::new_v5(&Uuid::NAMESPACE_URL, name.as_bytes()),
        topic: dtm_core::transaction::TOPIC.into(),
        key: Some(call.key.unwrap_or(call.gid).into()),
        content_type: "application/json".into(),
        headers: serde_json::to_string(&headers).ok().map(Into::into),
        payload: call.payload.cloned(),
    }
}

fn names<'a>(call: &Call<'a>) -> [(&'static str, &'a str); 4] {
    [("gid", call.gid), ("trans_type", call.trans_type), ("branch_id", call.branch_id), ("op", call.op)]
}

/// A call is over, also where it was given up: then it failed.
struct Ended<'a> {
    endpoints: &'a Endpoints,
    endpoint: &'a str,
    gid: &'a str,
    bytes: usize,
}

impl Ended<'_> {
    fn with(self, health: Health) -> Standing {
        std::mem::ManuallyDrop::new(self).end(health)
    }

    fn end(&self, health: Health) -> Standing {
        let (now, random) = (Instant::now(), rand::random());
        self.endpoints.ended(self.endpoint, self.gid, self.bytes, health, now, random)
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.end(Health::Fails);
    }
}

fn unsendable(error: impl Into<String>) -> Outcome {
    Outcome::without_answer(Class::Unsendable, error)
}

fn not_called(endpoint: String, why: &str) -> Called {
    let report = Report {
        answer: Answer::Unknown,
        was_called: false,
        status: None,
        error: format!("{endpoint} {why}: it was not called"),
        endpoint: Some(endpoint),
        not_before: None,
    };
    Called { report, revived: None }
}

/// What an outcome means to a transaction (DTM's rules; 2xx is success unless the options say otherwise).
fn judge(outcome: &Outcome, options: &Options) -> Answer {
    let says = |word: &str| options.outcome_in_body && outcome.body.contains(word);
    match outcome.status {
        Some(425) => Answer::Ongoing,
        _ if says("ONGOING") => Answer::Ongoing,
        Some(409) => Answer::Failure,
        _ if says("FAILURE") => Answer::Failure,
        Some(status) if options.strict_success && status != 200 => Answer::Unknown,
        _ if outcome.class == Class::Accepted => Answer::Success,
        _ => Answer::Unknown,
    }
}

/// Whether the service works: if it says no or later, it does.
fn health(outcome: &Outcome, answer: &Answer, is_repeated: bool) -> Health {
    match (answer, outcome.class) {
        (Answer::Success | Answer::Failure | Answer::Ongoing, _) => Health::Works,
        // The service itself has said so, or nothing was sent.
        (_, Class::Unsendable) => Health::Unknown,
        (_, Class::Unsent) => Health::Away,
        (_, Class::Overloaded | Class::Throttled) => Health::Fails,
        _ if is_repeated && outcome.status.is_some() => Health::FailsAgain,
        _ => Health::Fails,
    }
}

fn server_of(uri: &Uri) -> String {
    format!("{}://{}", uri.scheme_str().unwrap_or_default(), uri.authority().map_or("", |a| a.as_str()))
}

/// The URL with DTM's names of the call in its query.
fn with_query(uri: &Uri, call: &Call<'_>) -> Result<Uri, String> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(names(call));
    let added = query.finish();
    let path = uri.path();
    let target = match uri.query() {
        Some(own) if !own.is_empty() => format!("{path}?{own}&{added}"),
        _ => format!("{path}?{added}"),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(target.parse().map_err(|error| format!("{uri}: {error}"))?);
    Uri::from_parts(parts).map_err(|error| format!("{uri}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call<'a>(gid: &'a str, action: &'a str) -> Call<'a> {
        Call {
            gid,
            trans_type: "msg",
            branch_id: "01",
            op: "action",
            action,
            payload: None,
            key: None,
            headers: None,
            is_repeated: false,
        }
    }

    #[test]
    fn a_url_keeps_its_query_and_gets_the_names_of_the_call() {
        let url =
            |text: &str, gid: &str| with_query(&text.parse().unwrap(), &call(gid, text)).unwrap().to_string();
        assert_eq!(
            url("http://h:8/a?x=1", "g"),
            "http://h:8/a?x=1&gid=g&trans_type=msg&branch_id=01&op=action"
        );
        assert_eq!(
            url("https://h", "a b&c=ü"),
            "https://h/?gid=a+b%26c%3D%C3%BC&trans_type=msg&branch_id=01&op=action"
        );
    }

    #[test]
    fn answers_mean_what_they_mean_to_dtm() {
        let (ours, strict) = (Options::default(), Options { strict_success: true, ..Options::default() });
        let words = Options { outcome_in_body: true, ..Options::default() };
        let answer = |status, body: &str, options: &Options| {
            judge(&Outcome::of_status(status, "", body.to_owned(), None), options)
        };
        for (status, body, options, expected) in [
            (200, "", &ours, Answer::Success),
            (204, "", &ours, Answer::Success),
            (204, "", &strict, Answer::Unknown),
            (200, "", &strict, Answer::Success),
            (409, "", &ours, Answer::Failure),
            (425, "", &strict, Answer::Ongoing),
            (500, "FAILURE", &ours, Answer::Unknown),
            (500, "FAILURE", &words, Answer::Failure),
            (200, "{\"dtm_result\":\"ONGOING\"}", &words, Answer::Ongoing),
            (200, "FAILURE", &ours, Answer::Success),
            (404, "", &ours, Answer::Unknown),
        ] {
            assert_eq!(answer(status, body, options), expected, "{status} {body}");
        }
        let unsent = Outcome::without_answer(Class::Unsent, "x");
        assert_eq!(judge(&unsent, &ours), Answer::Unknown);
        assert_eq!(health(&unsent, &Answer::Unknown, true), Health::Away);
        let failed = Outcome::of_status(500, "", String::new(), None);
        assert_eq!(health(&failed, &Answer::Unknown, false), Health::Fails);
        assert_eq!(health(&failed, &Answer::Unknown, true), Health::FailsAgain);
    }

    #[test]
    fn a_record_has_the_same_id_each_time_and_the_names_of_the_call() {
        let (once, again) = (event_of(&call("g", "kafka://m/t")), event_of(&call("g", "kafka://m/t")));
        assert_eq!(once.id, again.id);
        assert_ne!(once.id, event_of(&call("h", "kafka://m/t")).id);
        assert!(once.headers.as_deref().is_some_and(|headers| headers.contains("\"dtm-gid\":\"g\"")));
    }
}
