// SPDX-License-Identifier: PostgreSQL
//! What each endpoint does.

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::answer::{Answer, Refusal};
use super::endpoints::{Endpoint, Query, topic_of};
use super::metrics::Metrics;
use super::request::TransRequest;
use super::{topics, wait};
use crate::calls::secrets::Secret;
use crate::source::dtm_api::{Filter, Transactions};

/// A page, unless a client says how long it is, and at the most.
const PAGE: i64 = 100;
const PAGE_MAX: i64 = 1_000;

/// What `resetCronTime` leaves alone unless it is told: three times DTM's default of `timeout_to_fail`.
const RESET_SECONDS: i64 = 105;

/// Clients that wait for the result of what they have submitted.
const WAITERS_MAX: usize = 512;

/// The transactions of one database, and who may ask about them.
pub struct Api {
    transactions: Transactions,
    token: Option<Secret>,
    /// See there.
    pub metrics: Metrics,
    stop: CancellationToken,
    /// Of the connections that there may be, so many may be kept waiting.
    waiters: Semaphore,
}

impl Api {
    /// With a token only those who know it are answered. `stop` ends what waits.
    pub fn new(transactions: Transactions, token: Option<Secret>, stop: CancellationToken) -> Self {
        Api { transactions, token, metrics: Metrics::default(), stop, waiters: Semaphore::new(WAITERS_MAX) }
    }

    /// Refuses who does not know the token: as bearer, or as the password of the server's URL, which is all that DTM's clients
    /// can be given. That the server is there everybody may know.
    pub fn admit(&self, endpoint: Endpoint, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(token) = &self.token else { return local(headers) };
        if endpoint == Endpoint::Ping {
            return Ok(());
        }
        let refuse = |why: &str| Err(Refusal::error(StatusCode::UNAUTHORIZED, why));
        let Some(given) = headers.get(AUTHORIZATION) else {
            return refuse(
                "a token is needed: authorization: Bearer TOKEN, or http://dtm:TOKEN@… as the server's URL",
            );
        };
        match presented(given.as_bytes()) {
            None => refuse(
                "the header authorization is neither Bearer TOKEN nor Basic with the token as password",
            ),
            Some(given) if bool::from(given.ct_eq(token.reveal().as_bytes())) => Ok(()),
            Some(_) => refuse("the token is wrong"),
        }
    }

    /// Does what a request asks for.
    pub async fn answer(&self, endpoint: Endpoint, parts: &Parts, body: &Bytes) -> Result<Answer, Refusal> {
        let query = Query::of(&parts.uri);
        let transactions = &self.transactions;
        match endpoint {
            Endpoint::NewGid => {
                Ok(Answer::object(json!({"dtm_result": "SUCCESS", "gid": Uuid::now_v7().to_string()})))
            }
            Endpoint::Prepare => self.prepare(&TransRequest::read(body)?).await,
            Endpoint::Submit => self.submit(&TransRequest::read(body)?).await,
            Endpoint::Abort => self.abort(&TransRequest::read(body)?).await,
            Endpoint::ForceStop => self.force_stop(&TransRequest::read(body)?).await,
            Endpoint::ResetNextCronTime => self.reset(&TransRequest::read(body)?).await,
            Endpoint::ResetCronTime => self.reset_all(&query).await,
            Endpoint::Query => match query.text("gid") {
                Some(gid) => Ok(Answer::object(transactions.query(gid).await?)),
                None => Err(Refusal::wrong("no gid specified")),
            },
            Endpoint::All => self.all(&query).await,
            Endpoint::Subscribe => topics::subscribe(transactions, &query).await,
            Endpoint::Unsubscribe => topics::unsubscribe(transactions, &query).await,
            Endpoint::DeleteTopic => topics::delete(transactions, &topic_of(parts.uri.path())).await,
            Endpoint::ScanKv => topics::scan(transactions, &query, limit(&query)?).await,
            Endpoint::QueryKv => topics::query(transactions, &query, PAGE_MAX as i32).await,
            Endpoint::Version => {
                Ok(Answer::object(json!({"version": concat!("v", env!("CARGO_PKG_VERSION"))})))
            }
            Endpoint::Ping => Ok(Answer::object(json!({"msg": "pong"}))),
            // Without a database there are requests to count all the same.
            Endpoint::Metrics => Ok(Answer::text(self.metrics.text(transactions.waiting().await.ok()))),
            Endpoint::Unsupported => {
                let why = "not supported yet: this server has 2-phase messages over HTTP";
                Err(Refusal::error(StatusCode::NOT_IMPLEMENTED, why))
            }
            Endpoint::Unknown => Err(Refusal::error(StatusCode::NOT_FOUND, "there is no such endpoint")),
        }
    }

    async fn prepare(&self, request: &TransRequest) -> Result<Answer, Refusal> {
        request.check_supported()?;
        let message = request.message(self.token.is_some())?;
        match self.transactions.prepare(&message, request.query_prepared()?).await?.as_deref() {
            None | Some("prepared") => Ok(Answer::success()),
            Some(old) => Err(cannot("prepare", old)),
        }
    }

    /// One that is submitted already is not submitted anew: the client may not have had the answer to its first call.
    async fn submit(&self, request: &TransRequest) -> Result<Answer, Refusal> {
        request.check_supported()?;
        let message = request.message(self.token.is_some())?;
        match self.transactions.submit(&message).await?.as_deref() {
            None | Some("prepared" | "submitted") if request.waits() => {
                let Ok(_place) = self.waiters.try_acquire() else {
                    return Ok(Answer::ongoing("too many clients wait for results; the transaction goes on"));
                };
                wait::result(&self.transactions, &message.gid, &self.stop).await
            }
            None | Some("prepared" | "submitted") => Ok(Answer::success()),
            Some(old) => Err(cannot("submit", old)),
        }
    }

    async fn abort(&self, request: &TransRequest) -> Result<Answer, Refusal> {
        let gid = request.gid()?;
        match self.transactions.abort(&gid, request.reason()).await?.as_deref() {
            Some("prepared" | "failed") => Ok(Answer::success()),
            Some(old) => {
                let kind = request.kind();
                Err(Refusal::failure(format!(
                    "trans type: '{kind}' current status '{old}', cannot abort. FAILURE"
                )))
            }
            None => Err(no_transaction()),
        }
    }

    async fn force_stop(&self, request: &TransRequest) -> Result<Answer, Refusal> {
        match self.transactions.force_stop(&request.gid()?).await?.as_deref() {
            Some(old @ ("succeed" | "failed")) => Err(cannot("force stop", old)),
            Some(_) => Ok(Answer::success()),
            None => Err(no_transaction()),
        }
    }

    async fn reset(&self, request: &TransRequest) -> Result<Answer, Refusal> {
        match self.transactions.retry(&request.gid()?).await? {
            true => Ok(Answer::success()),
            false => Err(no_transaction()),
        }
    }

    async fn reset_all(&self, query: &Query) -> Result<Answer, Refusal> {
        let seconds = query.number("timeout")?.unwrap_or(RESET_SECONDS).min(i64::from(u32::MAX));
        let most = limit(query)?;
        let count = self.transactions.retry_all(seconds as f64, most).await?;
        Ok(Answer::object(json!({"succeed_count": count, "has_remaining": count == most})))
    }

    async fn all(&self, query: &Query) -> Result<Answer, Refusal> {
        let text = |name: &str| query.text(name).map(str::to_owned);
        let filter = Filter {
            gid: text("gid"),
            position: query.number("position")?,
            status: text("status"),
            trans_type: text("transType"),
            from: query.number("createTimeStart")?,
            until: query.number("createTimeEnd")?,
            limit: limit(query)?,
        };
        let mut found: Value = self.transactions.all(&filter).await?;
        if filter.gid.is_some() {
            found["next_position"] = "".into();
        }
        Ok(Answer::object(found))
    }
}

fn cannot(what: &str, status: &str) -> Refusal {
    Refusal::failure(format!("current status '{status}', cannot {what}. FAILURE"))
}

fn no_transaction() -> Refusal {
    Refusal::wrong("there is no such transaction")
}

fn limit(query: &Query) -> Result<i32, Refusal> {
    let limit = query.number("limit")?.unwrap_or(PAGE).clamp(1, PAGE_MAX);
    Ok(i32::try_from(limit).unwrap_or(i32::MAX))
}

/// The token in the value of the header `authorization`.
fn presented(header: &[u8]) -> Option<Vec<u8>> {
    let at = header.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = (&header[..at], header[at..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(rest.to_vec());
    }
    let decoded = scheme.eq_ignore_ascii_case(b"basic").then(|| BASE64.decode(rest).ok()).flatten()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(decoded[colon + 1..].to_vec())
}

/// Without a token the server trusts this machine, but not the pages that a browser on it shows: they can send requests here, with
/// their origin, or under a name of their own that leads here.
fn local(headers: &HeaderMap) -> Result<(), Refusal> {
    let refuse = |why: &str| Err(Refusal::error(StatusCode::FORBIDDEN, why));
    if headers.contains_key(ORIGIN) {
        return refuse("a browser sent it for a page: the server takes that only with a token");
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let is_local = host.is_none_or(|host| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost")
            || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    });
    if is_local { Ok(()) } else { refuse("it was sent to another name than this machine's own") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_bearers_or_a_password() {
        assert_eq!(presented(b"Bearer abc").as_deref(), Some(&b"abc"[..]));
        assert_eq!(presented(b"bearer  a:b").as_deref(), Some(&b"a:b"[..]));
        let basic = format!("Basic {}", BASE64.encode("dtm:a:b"));
        assert_eq!(presented(basic.as_bytes()).as_deref(), Some(&b"a:b"[..]));
        for bad in ["abc", "Digest abc", "Basic ???", ""] {
            assert_eq!(presented(bad.as_bytes()), None, "{bad}");
        }
    }
}
