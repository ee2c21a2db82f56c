// SPDX-License-Identifier: PostgreSQL
//! DTM's message topics, and the key-value store in which DTM keeps them: here a category that is derived from the table.

use dtm_core::destination::Destination;
use dtm_core::names::is_name;
use serde_json::json;

use super::answer::{Answer, Refusal};
use super::endpoints::Query;
use crate::source::dtm_api::Transactions;

/// The only category.
const TOPICS: &str = "topics";

fn topic_and_url(query: &Query) -> Result<(&str, &str), Refusal> {
    let topic = query.text("topic").ok_or_else(|| Refusal::wrong("empty topic"))?;
    let url = query.text("url").ok_or_else(|| Refusal::wrong("empty url"))?;
    Ok((topic, url))
}

/// Adds a subscriber.
pub async fn subscribe(transactions: &Transactions, query: &Query) -> Result<Answer, Refusal> {
    let (topic, url) = topic_and_url(query)?;
    if !is_name(topic) {
        return Err(Refusal::bad("a topic has 1 to 64 letters, digits, _, - and ."));
    }
    Destination::parse(url).map_err(|error| Refusal::bad(format!("url: {error}")))?;
    match transactions.subscribe(topic, url, query.text("remark").unwrap_or_default()).await? {
        true => Ok(Answer::success()),
        false => Err(Refusal::wrong("this url exists")),
    }
}

/// Takes a subscriber away.
pub async fn unsubscribe(transactions: &Transactions, query: &Query) -> Result<Answer, Refusal> {
    let (topic, url) = topic_and_url(query)?;
    match transactions.unsubscribe(topic, url).await? {
        (_, true) => Ok(Answer::success()),
        (0, false) => Err(Refusal::wrong("no such a topic")),
        (_, false) => Err(Refusal::wrong("no such an url")),
    }
}

/// Takes all subscribers away.
pub async fn delete(transactions: &Transactions, topic: &str) -> Result<Answer, Refusal> {
    match transactions.delete_topic(topic).await? {
        true => Ok(Answer::success()),
        false => Err(Refusal::wrong("storage: NotFound")),
    }
}

/// The keys of a category, page by page.
pub async fn scan(transactions: &Transactions, query: &Query, limit: i32) -> Result<Answer, Refusal> {
    match query.text("cat") {
        None | Some(TOPICS) => {
            let position = query.number("position")?;
            Ok(Answer::object(transactions.topics(None, position, limit).await?))
        }
        Some(_) => Ok(Answer::object(json!({"kv": [], "next_position": ""}))),
    }
}

/// One key, or all.
pub async fn query(transactions: &Transactions, query: &Query, limit: i32) -> Result<Answer, Refusal> {
    match query.text("cat") {
        None | Some(TOPICS) => {
            let mut found = transactions.topics(query.text("key"), None, limit).await?;
            Ok(Answer::object(json!({"kv": found["kv"].take()})))
        }
        Some(_) => Ok(Answer::object(json!({"kv": []}))),
    }
}
