// SPDX-License-Identifier: PostgreSQL
//! The checks behind `dtm.msg_send` and its relatives: each error says what is wrong and what would be right.

use dtm_core::destination::DestinationError;
use dtm_core::transaction::{self, Action, Decider, OPTIONS, Options, TransactionError};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::id;
use crate::refusal::{Refusal, quoted};

/// The longest gid, in characters: DTM's.
const GID_CHARS_MAX: usize = 128;

const STEPS_HINT: &str = "Pass an array such as [{\"action\": \"https://stock.internal/take\", \"payload\": {\"id\": 7}}]; \
     an action is https://…, kafka://CLUSTER/TOPIC, postgres://TARGET/schema.function or topic://NAME.";

const TOPICS_HINT: &str = "Mend it in dtm.msg_topics: a url is https://…, kafka://CLUSTER/TOPIC or postgres://TARGET/schema.function.";

/// A gid that nobody has had: a UUIDv7 as text.
#[pg_extern]
fn new_gid() -> String {
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    uuid::Uuid::from_bytes(id::new(now)).to_string()
}

#[pg_extern]
fn check_gid(gid: Option<&str>) -> Result<(), ErrorReport> {
    let found = gid.unwrap_or_default();
    if (1..=GID_CHARS_MAX).contains(&found.chars().count())
        && !found.chars().any(|c| c.is_control() || c == ';')
    {
        return Ok(());
    }
    let detail = format!("It is {}.", gid.map_or_else(|| "null".to_owned(), quoted));
    let message = "a gid has 1 to 128 characters, without control characters and semicolons";
    Err(Refusal::argument(message, detail, "SELECT dtm.new_gid() makes one.").into())
}

#[pg_extern]
fn check_steps(steps: Option<pgrx::JsonB>) -> Result<(), ErrorReport> {
    let json = steps.map_or(serde_json::Value::Null, |steps| steps.0);
    transaction::check_steps(&json).map_err(|error| wrong_steps(error).into())
}

/// Checks what a message topic's subscriber is called by.
#[pg_extern]
fn check_action(action: &str) -> Result<(), ErrorReport> {
    match Action::parse(action) {
        Ok(Action::Call(_)) => Ok(()),
        Ok(Action::Topic(_)) => {
            let detail = "A message topic is subscribed to another one.";
            Err(Refusal::argument("wrong subscriber of a message topic", detail, TOPICS_HINT).into())
        }
        Err(error) => {
            let detail = format!("The url of a subscriber: {error}.");
            Err(Refusal::argument("wrong subscriber of a message topic", detail, TOPICS_HINT).into())
        }
    }
}

/// Checks who is asked whether a prepared message is committed.
#[pg_extern]
fn check_query_prepared(query_prepared: Option<&str>) -> Result<(), ErrorReport> {
    Decider::parse(query_prepared.unwrap_or_default()).map(drop).map_err(|error| {
        let message = "a prepared message needs somebody to be asked whether it is committed";
        let hint = "Pass a URL that answers as DTM's query-prepared does, or postgres://TARGET, without credentials.";
        Refusal::argument(message, format!("{error}."), hint).into()
    })
}

fn wrong_steps(error: TransactionError) -> Refusal {
    // What may have credentials in it is not repeated: error messages are logged.
    let detail = format!("{error}.");
    match error {
        TransactionError::Action { error: DestinationError::Scheme(_), .. } => {
            let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
            Refusal::new(code, "no way to call this action", detail, STEPS_HINT)
        }
        _ => Refusal::argument("wrong steps of a transaction", detail, STEPS_HINT),
    }
}

/// Checks options; answers what of them concerns the database, in seconds.
#[pg_extern]
fn check_transaction_options(
    options: Option<pgrx::JsonB>,
) -> Result<TableIterator<'static, (name!(delay, f64), name!(timeout_to_fail, f64))>, ErrorReport> {
    let json = options.map_or(serde_json::Value::Null, |options| options.0);
    let options = Options::from_json(&json).map_err(|error| {
        let hint = format!("Options are: {OPTIONS}.");
        Refusal::argument("wrong options of a transaction", format!("{error}."), hint)
    })?;
    Ok(TableIterator::once((options.delay.as_secs_f64(), options.timeout_to_fail.as_secs_f64())))
}
