// SPDX-License-Identifier: PostgreSQL
//! `wait_result`: the answer comes after the first pass over a transaction, whichever relay makes it.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::answer::{Answer, Refusal};
use crate::source::dtm_api::Transactions;

/// How long a client is kept waiting at the most.
const LIMIT: Duration = Duration::from_secs(30);

/// Between two looks at a transaction: from the first to the last, doubling.
const PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(200)];

/// Waits for the first pass over a submitted transaction. DTM answers 409 to what goes on after it as to what has failed;
/// here only what has failed is a failure.
pub async fn result(
    transactions: &Transactions,
    gid: &str,
    stop: &CancellationToken,
) -> Result<Answer, Refusal> {
    let until = Instant::now() + LIMIT;
    let [mut pause, longest] = PAUSES;
    loop {
        let progress = transactions.progress(gid).await?;
        if let Some(answer) = judge(progress.as_ref()) {
            return Ok(answer);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return Ok(Answer::ongoing("the server is stopping; the transaction goes on")),
        }
        if Instant::now() >= until {
            return Ok(Answer::ongoing(format!("it has not ended within {} s; it goes on", LIMIT.as_secs())));
        }
        pause = (pause * 2).min(longest);
    }
}

/// `None`: no pass has been made yet.
fn judge(progress: Option<&Value>) -> Option<Answer> {
    let Some(progress) = progress else { return Some(Answer::wrong("the transaction is gone")) };
    let text = |name: &str| progress[name].as_str().filter(|text| !text.is_empty());
    let holds = |name: &str| progress[name].as_bool() == Some(true);
    match text("status") {
        Some("succeed") => Some(Answer::success()),
        Some("failed") => Some(Answer::failure(text("reason").unwrap_or("the transaction has failed"))),
        _ if holds("has_failed") => {
            let error = text("error").unwrap_or("a branch has not succeeded yet");
            Some(Answer::ongoing(format!("the transaction goes on: {error}")))
        }
        _ if holds("is_delayed") => Some(Answer::ongoing("the transaction waits for its time")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_has_failed_is_a_failure() {
        let status = |progress: Value| judge(Some(&progress)).map(|answer| answer.status().as_u16());
        assert_eq!(status(json!({"status": "succeed"})), Some(200));
        assert_eq!(status(json!({"status": "failed", "reason": "no stock"})), Some(409));
        assert_eq!(status(json!({"status": "submitted", "has_failed": true, "error": "FAILURE"})), Some(425));
        assert_eq!(status(json!({"status": "submitted", "is_delayed": true})), Some(425));
        assert_eq!(status(json!({"status": "submitted", "has_failed": false})), None);
        assert_eq!(judge(None).unwrap().status().as_u16(), 500);
    }
}
