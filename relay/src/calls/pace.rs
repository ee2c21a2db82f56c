// SPDX-License-Identifier: PostgreSQL
//! How many calls may be made: at once, in a second, and not before when.

use std::time::Duration;

use tokio::time::Instant;

/// A rate limit lets so long a time's calls go in a burst.
const BURST: Duration = Duration::from_millis(100);
/// A service that asked for less is left alone for so long at the least.
const BREATHER: Duration = Duration::from_millis(500);
/// However long a service asks to be left alone, it is asked again after this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// The pace of calls to one service.
#[derive(Debug)]
pub struct Pace {
    at_once_max: usize,
    /// Half as many after each word of overload, one more after each round of successes.
    at_once: f64,
    not_before: Option<Instant>,
    /// Between two calls, if there is a rate limit; and when the next one would come if all came evenly.
    interval: Option<Duration>,
    even: Option<Instant>,
}

impl Pace {
    /// `at_once`: calls in flight; `per_second`: a rate limit.
    pub fn new(at_once: usize, per_second: Option<f64>) -> Self {
        let interval = per_second.map(|rate| Duration::from_secs_f64(1.0 / rate));
        Pace { at_once_max: at_once, at_once: at_once as f64, not_before: None, interval, even: None }
    }

    /// When the next call may be made, if not now; `None`: as soon as one in flight has ended.
    pub fn free(&self, in_flight: usize, now: Instant) -> Result<(), Option<Instant>> {
        if in_flight >= self.at_once as usize {
            return Err(None);
        }
        match self.earliest() {
            Some(at) if at > now => Err(Some(at)),
            _ => Ok(()),
        }
    }

    fn earliest(&self) -> Option<Instant> {
        let burst = self.interval.map(|interval| BURST.max(interval) - interval);
        let by_rate = self.even.zip(burst).map(|(even, burst)| even.checked_sub(burst).unwrap_or(even));
        self.not_before.into_iter().chain(by_rate).max()
    }

    /// A call is made.
    pub fn made(&mut self, now: Instant) {
        if let Some(interval) = self.interval {
            self.even = Some(self.even.map_or(now, |even| even.max(now)) + interval);
        }
    }

    /// A call was a success.
    pub fn succeeded(&mut self) {
        self.at_once = (self.at_once + 1.0 / self.at_once).min(self.at_once_max as f64);
    }

    /// The service asks for less. Words that come together count once.
    pub fn slow_down(&mut self, retry_after: Option<Duration>, now: Instant) {
        if self.not_before.is_none_or(|at| at <= now) {
            self.at_once = (self.at_once / 2.0).max(1.0);
        }
        let at = now + retry_after.unwrap_or_default().clamp(BREATHER, RETRY_AFTER_MAX);
        self.not_before = Some(self.not_before.map_or(at, |before| before.max(at)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_service_that_asks_for_less_gets_less_and_slowly_more_again() {
        let (mut pace, now) = (Pace::new(8, None), Instant::now());
        assert_eq!((pace.free(7, now), pace.free(8, now)), (Ok(()), Err(None)));
        pace.slow_down(Some(2 * SECOND), now);
        pace.slow_down(Some(SECOND), now);
        assert_eq!(pace.free(0, now), Err(Some(now + 2 * SECOND)), "the longest word counts");
        let later = now + 2 * SECOND;
        assert_eq!((pace.free(3, later), pace.free(4, later)), (Ok(()), Err(None)), "half, once");
        for _ in 0..5 {
            pace.succeeded();
        }
        assert_eq!(pace.free(4, later), Ok(()));
        for _ in 0..100 {
            pace.succeeded();
        }
        assert_eq!((pace.free(7, later), pace.free(8, later)), (Ok(()), Err(None)));
        pace.slow_down(Some(Duration::MAX), now);
        assert_eq!(pace.free(0, now), Err(Some(now + RETRY_AFTER_MAX)));
    }

    #[test]
    fn a_rate_limit_holds_over_time_with_short_bursts() {
        let mut pace = Pace::new(1_000, Some(100.0));
        let begin = Instant::now();
        let (mut now, mut made) = (begin, 0);
        while now < begin + 10 * SECOND {
            match pace.free(0, now) {
                Ok(()) => {
                    pace.made(now);
                    made += 1;
                }
                Err(at) => now = at.unwrap(),
            }
        }
        assert!((1_000..=1_011).contains(&made), "{made} in 10 s");
        let mut slow = Pace::new(1, Some(0.5));
        assert_eq!(slow.free(0, begin), Ok(()));
        slow.made(begin);
        assert_eq!(slow.free(0, begin), Err(Some(begin + 2 * SECOND)));
    }
}
