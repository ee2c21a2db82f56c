// SPDX-License-Identifier: PostgreSQL
//! Which services work, and how much they have to do: calls to one that is down are not made, but for a few that find out, and one
//! that is slow gets no more at a time than its share, so that neither takes room from the others. What waits for one goes on as
//! soon as it works again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::calls::circuit::{Blame, Circuit};
use crate::calls::schedule::Schedule;

/// Services that are known at once; those that work are forgotten first.
const KNOWN_MAX: usize = 10_000;
const PROBE_BASE: Duration = Duration::from_millis(250);
const PROBE_CAP: Duration = Duration::from_secs(2);
/// Calls of one service at a time.
pub const PLACES: usize = 128;
/// How long a call waits for a place: one that works has a free one sooner.
const PATIENCE: Duration = Duration::from_millis(500);

struct Endpoint {
    circuit: Circuit<String>,
    places: Arc<Semaphore>,
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
    /// Nothing was said of it: what was to be sent could not be.
    Unknown,
}

/// How a service stands after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It works, whatever came of this call.
    Up,
    /// It works again: what waits for it may go on.
    Revived,
    /// It is down from now on: what was called is not to blame.
    Opened,
    /// It is down as it was before.
    Down,
}

/// Whether a call may be made.
#[derive(Debug)]
pub enum Admission {
    /// It may, for as long as it holds this; [`Endpoints::ended`] has to follow.
    Place(OwnedSemaphorePermit),
    /// The service is down.
    Down,
    /// It has as many calls as it may have at a time.
    Full,
}

impl Endpoints {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Endpoint>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a transaction may call it now. Waits a little for a place.
    pub async fn admit(&self, endpoint: &str, gid: &str) -> Admission {
        let places = self.places(endpoint);
        let Ok(Ok(place)) = timeout(PATIENCE, places.acquire_owned()).await else { return Admission::Full };
        if self.lets_pass(endpoint, gid, Instant::now()) { Admission::Place(place) } else { Admission::Down }
    }

    fn places(&self, endpoint: &str) -> Arc<Semaphore> {
        let mut known = self.lock();
        if known.len() >= KNOWN_MAX && !known.contains_key(endpoint) {
            known.retain(|_, endpoint| endpoint.in_flight > 0 || endpoint.was_down);
        }
        let new = || Endpoint {
            circuit: Circuit::new(Schedule::exponential(PROBE_BASE, PROBE_CAP, None)),
            places: Arc::new(Semaphore::new(PLACES)),
            in_flight: 0,
            was_down: false,
        };
        known.entry(endpoint.to_owned()).or_insert_with(new).places.clone()
    }

    fn lets_pass(&self, endpoint: &str, gid: &str, now: Instant) -> bool {
        let mut known = self.lock();
        // Forgotten since its place was taken: it worked.
        let Some(found) = known.get_mut(endpoint) else { return true };
        let admitted = found.circuit.admits(&gid.to_owned(), found.in_flight, now);
        if !admitted && found.circuit.may_probe(now) && found.in_flight == 0 {
            // All that come by have had their turn.
            found.circuit.begin_turns();
        }
        found.in_flight += usize::from(admitted);
        admitted
    }

    /// Those that take no more calls than so many now; the others take [`PLACES`].
    pub fn rooms(&self, now: Instant) -> Vec<(String, i32)> {
        let room = |known: &Endpoint| {
            let free = PLACES.saturating_sub(known.in_flight);
            let room = known.circuit.room(known.in_flight, now).map_or(free, |probes| probes.min(free));
            i32::try_from(room).unwrap_or(i32::MAX)
        };
        let known = self.lock();
        let known = known.iter().filter(|(_, known)| known.in_flight > 0 || known.circuit.is_open());
        known.map(|(endpoint, known)| (endpoint.clone(), room(known))).collect()
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
            Health::Unknown => return if found.circuit.is_open() { Standing::Down } else { Standing::Up },
            Health::Fails | Health::Away => {}
        }
        let blame = match health {
            Health::Away => found.circuit.trip(&gid, now, random),
            _ => found.circuit.failed(&gid, found.in_flight + 1, now, random),
        };
        found.was_down |= found.circuit.is_open();
        match blame {
            Blame::Call => Standing::Up,
            Blame::Opened => Standing::Opened,
            Blame::Service => Standing::Down,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether one that has a place may call.
    fn admits(endpoints: &Endpoints, endpoint: &str, gid: &str, now: Instant) -> bool {
        endpoints.places(endpoint);
        endpoints.lets_pass(endpoint, gid, now)
    }

    #[tokio::test]
    async fn a_service_that_does_not_answer_takes_no_more_than_its_share() {
        let endpoints = Endpoints::default();
        let mut held = Vec::new();
        for _ in 0..PLACES {
            held.push(endpoints.admit("http://slow", "1").await);
        }
        assert!(held.iter().all(|admission| matches!(admission, Admission::Place(_))));
        assert!(matches!(endpoints.admit("http://slow", "1").await, Admission::Full));
        assert!(matches!(endpoints.admit("http://b", "1").await, Admission::Place(_)));
        let rooms = endpoints.rooms(Instant::now());
        assert!(rooms.contains(&("http://slow".to_owned(), 0)), "{rooms:?}");
        held.pop();
        endpoints.ended("http://slow", "1", Health::Works, Instant::now(), 0.0);
        assert!(matches!(endpoints.admit("http://slow", "1").await, Admission::Place(_)));
    }

    #[test]
    fn of_what_waits_for_one_that_is_down_a_few_are_taken_up_when_it_may_be_tried() {
        let (endpoints, begin) = (Endpoints::default(), Instant::now());
        for gid in ["1", "2", "3"] {
            assert!(admits(&endpoints, "http://a", gid, begin));
        }
        for gid in ["1", "2", "3"] {
            endpoints.ended("http://a", gid, Health::Away, begin, 1.0);
        }
        assert_eq!(endpoints.rooms(begin), [("http://a".to_owned(), 0)]);
        assert_eq!(endpoints.rooms(begin + PROBE_BASE), [("http://a".to_owned(), 3)]);
        assert!(admits(&endpoints, "http://a", "4", begin + PROBE_BASE));
        endpoints.ended("http://a", "4", Health::Works, begin + PROBE_BASE, 1.0);
        assert_eq!(endpoints.rooms(begin + PROBE_BASE), [], "it takes what any other takes");
    }

    #[test]
    fn a_service_that_is_away_is_left_alone_but_for_probes_until_it_works() {
        let (endpoints, begin) = (Endpoints::default(), Instant::now());
        assert!(admits(&endpoints, "http://a", "1", begin));
        assert_eq!(endpoints.ended("http://a", "1", Health::Away, begin, 0.0), Standing::Opened);
        assert!(!admits(&endpoints, "http://a", "1", begin), "it is down");
        assert!(admits(&endpoints, "http://b", "1", begin), "others are not");
        let later = begin + PROBE_BASE;
        assert!(admits(&endpoints, "http://a", "7", later));
        assert_eq!(endpoints.ended("http://a", "7", Health::Works, later, 0.0), Standing::Revived);
        assert!(endpoints.is_up("http://a"));
        assert!(admits(&endpoints, "http://a", "1", later) && admits(&endpoints, "http://a", "2", later));
        assert_eq!(endpoints.ended("http://a", "1", Health::Works, later, 0.0), Standing::Up, "once");
    }

    #[test]
    fn one_that_fails_among_others_that_do_not_brings_nobody_to_try_again_at_once() {
        let (endpoints, now) = (Endpoints::default(), Instant::now());
        for _ in 0..20 {
            assert!(
                admits(&endpoints, "http://a", "bad", now) && admits(&endpoints, "http://a", "good", now)
            );
            assert_eq!(endpoints.ended("http://a", "bad", Health::Fails, now, 0.0), Standing::Up);
            assert_eq!(endpoints.ended("http://a", "good", Health::Works, now, 0.0), Standing::Up);
        }
    }

    #[test]
    fn one_that_waits_alone_is_tried_again_and_again() {
        let (endpoints, mut now) = (Endpoints::default(), Instant::now());
        let mut calls = 0;
        for _ in 0..100 {
            if admits(&endpoints, "http://a", "1", now) {
                calls += 1;
                endpoints.ended("http://a", "1", Health::Away, now, 0.5);
            }
            now += Duration::from_secs(1);
        }
        assert!(calls > 20, "{calls}");
    }
}
