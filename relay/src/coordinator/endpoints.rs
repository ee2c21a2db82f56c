// SPDX-License-Identifier: PostgreSQL
//! Which services work: calls to one that is down are not made, but for a few that find out, so that it takes no room from the
//! others. What waits for one goes on as soon as it works again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::calls::circuit::Circuit;
use crate::calls::schedule::Schedule;

/// Services that are known at once; those that work are forgotten first.
const KNOWN_MAX: usize = 10_000;
const PROBE_BASE: Duration = Duration::from_millis(250);
const PROBE_CAP: Duration = Duration::from_secs(2);

struct Endpoint {
    circuit: Circuit<String>,
    in_flight: usize,
    /// It was down since it last worked: somebody may wait for it.
    was_down: bool,
}

/// All services that were called lately, by scheme and authority, or cluster.
#[derive(Default)]
pub struct Endpoints {
    known: Mutex<HashMap<String, Endpoint>>,
}

/// What came of a call, as far as the service is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has answered as it should.
    Works,
    /// It has not.
    Fails,
    /// It could not be reached.
    Away,
}

/// How a service stands after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It works, whatever came of this call.
    Up,
    /// It works again: what waits for it may go on.
    Revived,
    /// It is down: what was called is not to blame.
    Down,
}

impl Endpoints {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Endpoint>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a transaction may call it now. If so, [`Endpoints::ended`] has to follow.
    pub fn admit(&self, endpoint: &str, gid: &str, now: Instant) -> bool {
        let mut known = self.lock();
        if let Some(found) = known.get_mut(endpoint) {
            let admitted = found.circuit.admits(&gid.to_owned(), found.in_flight, now);
            if !admitted && found.circuit.may_probe(now) && found.in_flight == 0 {
                // All that come by have had their turn.
                found.circuit.begin_turns();
            }
            found.in_flight += usize::from(admitted);
            return admitted;
        }
        if known.len() >= KNOWN_MAX {
            known.retain(|_, endpoint| endpoint.in_flight > 0 || endpoint.was_down);
        }
        let circuit = Circuit::new(Schedule::exponential(PROBE_BASE, PROBE_CAP, None));
        known.insert(endpoint.to_owned(), Endpoint { circuit, in_flight: 1, was_down: false });
        true
    }

    /// Whether it works, as far as is known.
    pub fn is_up(&self, endpoint: &str) -> bool {
        self.lock().get(endpoint).is_none_or(|known| !known.circuit.is_open())
    }

    /// A call has ended.
    pub fn ended(&self, endpoint: &str, gid: &str, health: Health, now: Instant, random: f64) -> Standing {
        let mut known = self.lock();
        let Some(found) = known.get_mut(endpoint) else { return Standing::Up };
        found.in_flight = found.in_flight.saturating_sub(1);
        let gid = gid.to_owned();
        match health {
            Health::Works => {
                found.circuit.succeeded(&gid);
                return if std::mem::take(&mut found.was_down) { Standing::Revived } else { Standing::Up };
            }
            Health::Fails => {
                let waiting = found.in_flight + 1;
                found.circuit.failed(&gid, waiting, now, random);
            }
            Health::Away => {
                found.circuit.trip(&gid, now, random);
            }
        }
        found.was_down |= found.circuit.is_open();
        if found.circuit.is_open() { Standing::Down } else { Standing::Up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_is_away_is_left_alone_but_for_probes_until_it_works() {
        let (endpoints, begin) = (Endpoints::default(), Instant::now());
        assert!(endpoints.admit("http://a", "1", begin));
        assert_eq!(endpoints.ended("http://a", "1", Health::Away, begin, 0.0), Standing::Down);
        assert!(!endpoints.admit("http://a", "1", begin), "it is down");
        assert!(endpoints.admit("http://b", "1", begin), "others are not");
        let later = begin + PROBE_BASE;
        assert!(endpoints.admit("http://a", "7", later));
        assert_eq!(endpoints.ended("http://a", "7", Health::Works, later, 0.0), Standing::Revived);
        assert!(endpoints.is_up("http://a"));
        assert!(endpoints.admit("http://a", "1", later) && endpoints.admit("http://a", "2", later));
        assert_eq!(endpoints.ended("http://a", "1", Health::Works, later, 0.0), Standing::Up, "once");
    }

    #[test]
    fn one_that_fails_among_others_that_do_not_brings_nobody_to_try_again_at_once() {
        let (endpoints, now) = (Endpoints::default(), Instant::now());
        for _ in 0..20 {
            assert!(endpoints.admit("http://a", "bad", now) && endpoints.admit("http://a", "good", now));
            assert_eq!(endpoints.ended("http://a", "bad", Health::Fails, now, 0.0), Standing::Up);
            assert_eq!(endpoints.ended("http://a", "good", Health::Works, now, 0.0), Standing::Up);
        }
    }

    #[test]
    fn one_that_waits_alone_is_tried_again_and_again() {
        let (endpoints, mut now) = (Endpoints::default(), Instant::now());
        let mut calls = 0;
        for _ in 0..100 {
            if endpoints.admit("http://a", "1", now) {
                calls += 1;
                endpoints.ended("http://a", "1", Health::Away, now, 0.5);
            }
            now += Duration::from_secs(1);
        }
        assert!(calls > 20, "{calls}");
    }
}
