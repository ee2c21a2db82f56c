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
fn check_gid(gid: Option<&[u8]>) -> Result<(), ErrorReport> {
    let gid = gid.map(|gid| text(gid, "gid")).transpose()?;
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

/// What came as bytes in UTF-8. A database of the encoding SQL_ASCII holds texts that are none.
fn text<'a>(bytes: &'a [u8], what: &str) -> Result<&'a str, Refusal> {
    std::str::from_utf8(bytes).map_err(|error| {
        Refusal::new(
            PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
            format!("the {what} is no text in UTF-8"),
            format!("At byte {}: {error}.", error.valid_up_to()),
            "Encode it as UTF-8.",
        )
    })
}

/// JSON as the database has it; what it takes for JSON and this does not, such as a number beyond all bounds, is a refusal.
fn json(bytes: Option<&[u8]>, what: &str) -> Result<serde_json::Value, Refusal> {
    let Some(bytes) = bytes else { return Ok(serde_json::Value::Null) };
    serde_json::from_str(text(bytes, what)?).map_err(|error| {
        let message = format!("the {what} cannot be read");
        Refusal::argument(message, format!("{error}."), "Pass less deeply nested JSON with ordinary numbers.")
    })
}

/// Checks steps, and makes branches of them: a JSON array, the payload of each, and whether some call message topics.
#[expect(clippy::type_complexity, reason = "pg_extern reads the type as it stands")]
#[pg_extern]
fn branches_of_steps(
    steps: Option<&[u8]>,
) -> Result<
    TableIterator<
        'static,
        (name!(branches, Vec<u8>), name!(payloads, Vec<Option<Vec<u8>>>), name!(has_topics, bool)),
    >,
    ErrorReport,
> {
    let made = transaction::branches(text(steps.unwrap_or_default(), "steps")?).map_err(wrong_steps)?;
    let payloads = made.payloads.into_iter().map(|payload| payload.map(String::into_bytes)).collect();
    Ok(TableIterator::once((made.json.to_string().into_bytes(), payloads, made.has_topics)))
}

/// Checks what a message topic's subscriber is called by.
#[pg_extern]
fn check_action(action: &[u8]) -> Result<(), ErrorReport> {
    let detail = match Action::parse(text(action, "url of a subscriber")?) {
        Ok(Action::Call(_)) => return Ok(()),
        Ok(Action::Topic(_)) => "A message topic is subscribed to another one.".to_owned(),
        Err(error) => format!("The url of a subscriber: {error}."),
    };
    Err(Refusal::argument("wrong subscriber of a message topic", detail, TOPICS_HINT).into())
}

/// Checks who is asked whether a prepared message is committed.
#[pg_extern]
fn check_query_prepared(query_prepared: Option<&[u8]>) -> Result<(), ErrorReport> {
    let query_prepared = text(query_prepared.unwrap_or_default(), "query_prepared")?;
    Decider::parse(query_prepared).map(drop).map_err(|error| {
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
fn read_transaction_options(
    options: Option<&[u8]>,
) -> Result<TableIterator<'static, (name!(delay, f64), name!(timeout_to_fail, f64))>, ErrorReport> {
    let options = Options::from_json(&json(options, "options")?).map_err(|error| {
        let hint = format!("Options are: {OPTIONS}.");
        Refusal::argument("wrong options of a transaction", format!("{error}."), hint)
    })?;
    Ok(TableIterator::once((options.delay.as_secs_f64(), options.timeout_to_fail.as_secs_f64())))
}
