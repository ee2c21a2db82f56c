// SPDX-License-Identifier: PostgreSQL
//! The task of a subscription whose events reach Kafka exactly once: one writer after the other, each of which finds out how far the
//! one before has come.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::once::Once;
use super::run::{Pipeline, TELL_EVERY};
use crate::sink::kafka::KafkaSink;
use crate::source::error::SourceError;

/// After a refusal so many transactions are of such requests: the more, the sooner one refusal follows the other, since it takes
/// about a second to begin anew.
const SINGLES_MIN: usize = 1;
const SINGLES_MAX: usize = 256;
/// So many transactions without a refusal make it a rare thing again.
const RARE: usize = 64;
/// Between two attempts, while the cluster or a topic is away.
const AGAIN_MIN: Duration = Duration::from_millis(200);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// Why a writer is given up.
pub(super) enum Ended {
    /// The pipeline is to end.
    Stopped,
    /// Another one is to go on, from what is stored.
    Again {
        /// What went wrong, unless nothing did.
        why: Option<String>,
        /// How its records are to go.
        next: Next,
    },
    /// The connection to the database.
    Source(SourceError),
}

/// How the next writer sends records.
pub(super) enum Next {
    /// As this one.
    Same,
    /// In batches.
    Batches,
    /// Each in a batch of its own, until it has got past what is refused.
    Singles,
}

impl From<SourceError> for Ended {
    fn from(error: SourceError) -> Self {
        Ended::Source(error)
    }
}

impl Ended {
    /// Something went wrong.
    pub(super) fn again(why: impl Into<String>) -> Self {
        Ended::Again { why: Some(why.into()), next: Next::Same }
    }
}

/// Delivers until the pipeline is asked to stop or is fenced. An error is one of the database connection.
pub(super) async fn run(mut pipeline: Pipeline, sink: Arc<KafkaSink>) -> Result<(), SourceError> {
    let (mut attempts, mut told) = (0, None::<(String, Instant)>);
    let (mut singles, mut next_singles) = (0, SINGLES_MIN);
    loop {
        let ended = match Once::begin(&mut pipeline, sink.clone(), singles).await {
            Ok(mut once) => {
                let Err(ended) = once.deliver().await;
                if once.committed > 0 {
                    attempts = 0;
                }
                if singles == 0 && once.committed >= RARE {
                    next_singles = SINGLES_MIN;
                }
                ended
            }
            Err(ended) => ended,
        };
        let again_at = match ended {
            Ended::Stopped => return Ok(()),
            Ended::Source(error) => pipeline.unreadable(error)?,
            Ended::Again { why, next } => {
                match next {
                    Next::Same => {}
                    Next::Batches => singles = 0,
                    Next::Singles => {
                        singles = next_singles;
                        next_singles = (4 * next_singles).min(SINGLES_MAX);
                        tracing::info!(
                            subscription = pipeline.name,
                            "a batch is refused: its records go one by one, until it is known whose fault that is"
                        );
                    }
                }
                let Some(why) = why else { continue };
                let now = Instant::now();
                if !told.as_ref().is_some_and(|(before, at)| *before == why && now < *at + TELL_EVERY) {
                    tracing::error!(
                        subscription = pipeline.name,
                        "nothing is written to Kafka, and it is tried again until it works: {why}"
                    );
                    told = Some((why, now));
                }
                let bound = AGAIN_MIN.saturating_mul(1 << u32::min(attempts, 6)).min(AGAIN_MAX);
                attempts += 1;
                now + bound.mul_f64(0.5 + rand::random::<f64>() / 2.0)
            }
        };
        if !pause(&pipeline, again_at).await {
            return Ok(());
        }
    }
}

/// Waits until a time; false: the pipeline is to end before.
async fn pause(pipeline: &Pipeline, until: Instant) -> bool {
    tokio::select! {
        () = tokio::time::sleep_until(until) => true,
        () = pipeline.drain.cancelled() => false,
        () = pipeline.owner.fenced.cancelled() => false,
    }
}
