// SPDX-License-Identifier: PostgreSQL
//! How many requests came and how long they took, and how many transactions wait, in Prometheus' text format. Labels have few
//! values, whatever clients send.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::source::dtm_api::Waiting;

/// Upper bounds of the histogram's buckets, in seconds.
const BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0];

/// What was counted since the start.
#[derive(Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    requests: BTreeMap<(&'static str, u16), u64>,
    durations: BTreeMap<&'static str, Durations>,
}

#[derive(Clone, Copy, Default)]
struct Durations {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Metrics {
    /// A request was answered.
    pub fn count(&self, endpoint: &'static str, status: u16, took: Duration) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.requests.entry((endpoint, status)).or_default() += 1;
        let durations = counts.durations.entry(endpoint).or_default();
        let seconds = took.as_secs_f64();
        for (bucket, bound) in durations.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= bound);
        }
        durations.count += 1;
        durations.sum += seconds;
    }

    /// All of it. `waiting`: what the database has, if it answers.
    pub fn text(&self, waiting: Option<Waiting>) -> String {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::from(
            "# HELP dtm_server_requests_total Requests of DTM's clients.\n# TYPE dtm_server_requests_total counter\n",
        );
        // Writing to a string does not fail.
        for ((endpoint, status), count) in &counts.requests {
            let _ = writeln!(
                text,
                "dtm_server_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\"}} {count}"
            );
        }
        let name = "dtm_server_request_duration_seconds";
        let _ = writeln!(text, "# HELP {name} How long they took.\n# TYPE {name} histogram");
        for (endpoint, durations) in &counts.durations {
            for (bound, count) in BUCKETS.iter().zip(durations.buckets) {
                let _ = writeln!(text, "{name}_bucket{{endpoint=\"{endpoint}\",le=\"{bound}\"}} {count}");
            }
            let Durations { count, sum, .. } = durations;
            let _ = writeln!(text, "{name}_bucket{{endpoint=\"{endpoint}\",le=\"+Inf\"}} {count}");
            let _ = writeln!(text, "{name}_sum{{endpoint=\"{endpoint}\"}} {sum}");
            let _ = writeln!(text, "{name}_count{{endpoint=\"{endpoint}\"}} {count}");
        }
        for (name, help, value) in waiting.iter().flat_map(|waiting| {
            [
                ("dtm_transactions_waiting", "Transactions that wait for an attempt.", waiting.waiting),
                ("dtm_transactions_stuck", "Transactions that wait for somebody's decision.", waiting.stuck),
            ]
        }) {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_all_that_was_quicker() {
        let metrics = Metrics::default();
        metrics.count("submit", 200, Duration::from_millis(4));
        metrics.count("submit", 409, Duration::from_secs(60));
        let text = metrics.text(Some(Waiting { waiting: 7, stuck: 1 }));
        for line in [
            "dtm_server_requests_total{endpoint=\"submit\",status=\"200\"} 1",
            "dtm_server_request_duration_seconds_bucket{endpoint=\"submit\",le=\"0.0025\"} 0",
            "dtm_server_request_duration_seconds_bucket{endpoint=\"submit\",le=\"10\"} 1",
            "dtm_server_request_duration_seconds_bucket{endpoint=\"submit\",le=\"+Inf\"} 2",
            "dtm_server_request_duration_seconds_sum{endpoint=\"submit\"} 60.004",
            "dtm_transactions_waiting 7",
            "dtm_transactions_stuck 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
