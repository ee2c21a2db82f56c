// SPDX-License-Identifier: PostgreSQL
//! Telling of what stays wrong: at once or after a while, and again and again.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// What stays wrong is told so often.
pub const TELL_EVERY: Duration = Duration::from_secs(60);

/// What is wrong, since when, and when that was told last.
pub struct Reminders<K> {
    patience: Duration,
    known: HashMap<K, (Instant, Option<Instant>)>,
}

impl<K: Clone + Eq + Hash> Reminders<K> {
    /// Tells of nothing that has not been wrong for so long.
    pub fn after(patience: Duration) -> Self {
        Reminders { patience, known: HashMap::new() }
    }

    /// This, and nothing else, is wrong now. Answers what of it is to be told.
    pub fn due(&mut self, wrong: &[K], now: Instant) -> Vec<K> {
        self.known.retain(|known, _| wrong.contains(known));
        let mut due = Vec::new();
        for one in wrong {
            let (since, told) = self.known.entry(one.clone()).or_insert((now, None));
            if now >= *since + self.patience && told.is_none_or(|at| now >= at + TELL_EVERY) {
                *told = Some(now);
                due.push(one.clone());
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_wrong_is_told_after_a_while_and_again_and_what_was_right_meanwhile_anew() {
        let (second, begin) = (Duration::from_secs(1), Instant::now());
        let mut reminders = Reminders::after(5 * second);
        assert!(reminders.due(&[1, 2], begin).is_empty());
        assert_eq!(reminders.due(&[1, 2], begin + 5 * second), [1, 2]);
        assert!(reminders.due(&[2], begin + 6 * second).is_empty());
        assert_eq!(reminders.due(&[1, 2], begin + 65 * second), [2]);
        assert_eq!(reminders.due(&[1, 2], begin + 70 * second), [1]);
    }
}
