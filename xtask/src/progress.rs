// SPDX-License-Identifier: PostgreSQL
//! Progress lines on standard error, with the time since the start.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();

/// Starts the clock of the progress lines.
pub fn start() {
    START.get_or_init(Instant::now);
}

/// Prints one progress line.
pub fn say(text: &str) {
    let elapsed = START.get_or_init(Instant::now).elapsed();
    eprintln!("[{:>8}] {text}", seconds(elapsed));
}

/// A duration as the progress lines show it: `12.3 s`.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
