// SPDX-License-Identifier: PostgreSQL
//! The checks behind `dtm.subscribe`: each error says what is wrong and what would be right.

use dtm_core::destination::{Destination, DestinationError, SCHEMES};
use dtm_core::options::{OPTIONS, OnLag, Options};
use dtm_core::topic::{Pattern, RESERVED_SEGMENT};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::refusal::{Refusal, quoted};

const NAME_BYTES_MAX: usize = 128;
const PATTERNS_MAX: usize = 64;

#[pg_extern]
fn check_subscription(
    name: Option<&str>,
    topics: Option<Vec<Option<String>>>,
    destination: Option<&str>,
    options: Option<pgrx::JsonB>,
) -> Result<(), ErrorReport> {
    check_name(name)?;
    check_topics(topics)?;
    let destination = check_destination(destination)?;
    check_options(options, &destination)?;
    Ok(())
}

fn shown(argument: Option<&str>) -> String {
    argument.map_or_else(|| "null".to_owned(), quoted)
}

fn check_name(given: Option<&str>) -> Result<(), Refusal> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    let name = given.unwrap_or_default();
    let reserved = name.split('.').next() == Some(RESERVED_SEGMENT);
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed) && !reserved {
        return Ok(());
    }
    let detail = format!("The name is {}.", shown(given));
    let hint = "A name has 1 to 128 letters, digits, \"_\", \"-\" and \".\"; those that begin with dtm. are reserved.";
    Err(Refusal::argument("malformed name of a subscription", detail, hint))
}

const PATTERN_HINT: &str = "A pattern is dot-separated segments of letters, digits, \"_\" and \"-\", in which * stands for one \
     segment and a final > for the rest: orders.created, orders.*, orders.>";

fn parse_pattern(given: Option<&str>) -> Result<Pattern, Refusal> {
    Pattern::parse(given.unwrap_or_default()).map_err(|error| {
        let detail = format!("The pattern is {}: {error}.", shown(given));
        Refusal::argument("malformed topic pattern", detail, PATTERN_HINT)
    })
}

/// Whether a topic matches a pattern, which is refused where it is none.
#[pg_extern]
fn topic_matches(pattern: &str, topic: &str) -> Result<bool, ErrorReport> {
    Ok(parse_pattern(Some(pattern))?.matches(topic))
}

fn check_topics(topics: Option<Vec<Option<String>>>) -> Result<(), Refusal> {
    let topics = topics.unwrap_or_default();
    if topics.is_empty() || topics.len() > PATTERNS_MAX {
        let detail = format!("There are {}, 1 to {PATTERNS_MAX} are allowed.", topics.len());
        return Err(Refusal::argument("wrong number of topics", detail, PATTERN_HINT));
    }
    topics.iter().try_for_each(|topic| parse_pattern(topic.as_deref()).map(drop))
}

fn check_destination(destination: Option<&str>) -> Result<Destination, Refusal> {
    let text = destination.unwrap_or_default();
    let error = match Destination::parse(text) {
        Ok(destination) => return Ok(destination),
        Err(error) => error,
    };
    // One that may have credentials in it, well-formed or not, is not repeated: error messages are logged.
    let shown = if text.contains('@') { String::new() } else { format!(" {}", shown(destination)) };
    let detail = format!("The destination{shown}: {error}.");
    match error {
        DestinationError::Scheme(_) => {
            let hint = format!("Schemes with a sink are: {}.", SCHEMES.join(", "));
            Err(Refusal::new(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "no sink for this destination",
                detail,
                hint,
            ))
        }
        DestinationError::Credentials => Err(Refusal::argument(
            "credentials in a destination",
            detail,
            "Leave user and password out of the URI.",
        )),
        _ => Err(Refusal::argument(
            "malformed destination",
            detail,
            "Pass a URI such as https://billing.internal/events or kafka://main/orders.",
        )),
    }
}

/// How far a subscription with these options may lag behind, and whether it is dropped then.
#[pg_extern]
fn lag_policy(
    options: pgrx::JsonB,
) -> TableIterator<'static, (name!(drops, bool), name!(max_seconds, f64), name!(max_bytes, Option<i64>))> {
    // They were checked when they were stored.
    let options = Options::from_json(&options.0).unwrap_or_default();
    let bytes = options.max_lag_bytes.and_then(|bytes| i64::try_from(bytes).ok());
    TableIterator::once((options.on_lag == OnLag::Drop, options.max_lag.as_secs_f64(), bytes))
}

fn check_options(options: Option<pgrx::JsonB>, destination: &Destination) -> Result<(), Refusal> {
    let json = options.map_or(serde_json::Value::Null, |options| options.0);
    Options::for_destination(&json, destination).map(|_| ()).map_err(|error| {
        Refusal::argument(
            "wrong options of a subscription",
            format!("{error}."),
            format!("Options are: {OPTIONS}."),
        )
    })
}
