// SPDX-License-Identifier: PostgreSQL
//! When a failed call is made again.

use std::time::Duration;

/// The delays between attempts, and how many attempts there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    delays: Delays,
    attempts: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Delays {
    /// Bounds that double from `base` up to `cap`.
    Exponential { base: Duration, cap: Duration },
    /// One bound after each attempt.
    Listed(Box<[Duration]>),
}

impl Schedule {
    /// Bounds that double from `base` up to `cap`; without a number of attempts they never end.
    pub const fn exponential(base: Duration, cap: Duration, attempts: Option<u32>) -> Self {
        Schedule { delays: Delays::Exponential { base, cap }, attempts }
    }

    /// One bound after each attempt; the last attempt comes after the last of them.
    pub fn listed(delays: Vec<Duration>) -> Self {
        let attempts = u32::try_from(delays.len()).unwrap_or(u32::MAX).saturating_add(1);
        Schedule { delays: Delays::Listed(delays.into()), attempts: Some(attempts) }
    }

    /// Whether there is no attempt after so many failed ones.
    pub fn is_over(&self, failed_attempts: u32) -> bool {
        self.attempts.is_some_and(|attempts| failed_attempts >= attempts)
    }

    /// The delay after so many failed attempts, with full jitter: retries of many spread out instead of coming in waves.
    /// `random` is drawn evenly from `[0, 1)`.
    pub fn delay(&self, failed_attempts: u32, random: f64) -> Duration {
        self.bound(failed_attempts).mul_f64(random)
    }

    fn bound(&self, failed_attempts: u32) -> Duration {
        let nth = failed_attempts.saturating_sub(1);
        match &self.delays {
            Delays::Exponential { base, cap } => base.saturating_mul(1 << nth.min(31)).min(*cap),
            Delays::Listed(delays) => {
                let last = delays.len().saturating_sub(1);
                delays.get((nth as usize).min(last)).copied().unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_bound_doubles_up_to_the_cap() {
        let schedule = Schedule::exponential(SECOND, 3_600 * SECOND, Some(25));
        let bounds: Vec<u64> = [1, 2, 3, 12, 13, 1_000].map(|n| schedule.bound(n).as_secs()).into();
        assert_eq!(bounds, [1, 2, 4, 2_048, 3_600, 3_600]);
        assert_eq!(schedule.delay(3, 0.5), 2 * SECOND);
        assert!(!schedule.is_over(24) && schedule.is_over(25));
        assert!(!Schedule::exponential(SECOND, SECOND, None).is_over(u32::MAX));
    }

    #[test]
    fn a_listed_schedule_ends_with_its_list() {
        let schedule = Schedule::listed(vec![5 * SECOND, 60 * SECOND]);
        let bounds: Vec<u64> = [1, 2, 3].map(|n| schedule.bound(n).as_secs()).into();
        assert_eq!(bounds, [5, 60, 60]);
        assert!(!schedule.is_over(2) && schedule.is_over(3));
        assert!(Schedule::listed(Vec::new()).is_over(1));
    }

    proptest! {
        #[test]
        fn a_delay_is_never_beyond_the_cap(base in 1..10_000_u64, more in 0..u32::MAX, n: u32, random in 0.0..1.0) {
            let base = Duration::from_millis(base);
            let cap = base.saturating_mul(more.saturating_add(1));
            prop_assert!(Schedule::exponential(base, cap, None).delay(n, random) <= cap);
        }
    }
}
