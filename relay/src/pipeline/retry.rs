// SPDX-License-Identifier: PostgreSQL
//! When a failed delivery is tried again.

use std::time::Duration;

/// Exponential back-off with full jitter: retries of many events spread out instead of coming in waves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The bound of the first delay; it doubles from there.
    pub base: Duration,
    /// The greatest bound.
    pub cap: Duration,
}

impl Schedule {
    /// The delay after so many failed attempts. `random` is drawn evenly from `[0, 1)`.
    pub fn delay(&self, failed_attempts: u32, random: f64) -> Duration {
        self.bound(failed_attempts).mul_f64(random)
    }

    fn bound(&self, failed_attempts: u32) -> Duration {
        let doublings = failed_attempts.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bound_doubles_up_to_the_cap() {
        let schedule = Schedule { base: Duration::from_secs(1), cap: Duration::from_secs(3_600) };
        let bounds: Vec<u64> = [1, 2, 3, 12, 13, 1_000].map(|n| schedule.bound(n).as_secs()).into();
        assert_eq!(bounds, [1, 2, 4, 2_048, 3_600, 3_600]);
        assert_eq!(schedule.delay(3, 0.5), Duration::from_secs(2));
    }

    proptest! {
        #[test]
        fn a_delay_is_never_beyond_the_cap(base in 1..10_000_u64, more in 0..u32::MAX, n: u32, random in 0.0..1.0) {
            let base = Duration::from_millis(base);
            let schedule = Schedule { base, cap: base.saturating_mul(more.saturating_add(1)) };
            prop_assert!(schedule.delay(n, random) <= schedule.cap);
        }
    }
}
