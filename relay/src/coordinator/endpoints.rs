// SPDX-License-Identifier: PostgreSQL
//! Which services work, and how much they have to do: calls to one that is down are not made, but for a few that find out, and one
//! that is slow gets no more at a time than its share, so that neither takes room from the others. What waits for one goes on as
//! soon as it works again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::calls::circuit::{Blame, Circuit};
use crate::calls::schedule::Schedule;

/// Services that are known at once; those that work are forgotten first.
const KNOWN_MAX: usize = 10_000;
const PROBE_BASE: Duration = Duration::from_millis(250);
const PROBE_CAP: Duration = Duration::from_secs(2);
/// Calls at a time, and bytes of their payloads. No service takes more than a quarter of what the others leave, so that however
/// many of them are slow there is room for one that is not.
const CALLS: usize = 512;
const BYTES: usize = 24 << 20;
const PART: usize = 4;
/// How long a call waits for a place: at a service that works one is free sooner.
const PATIENCE: Duration = Duration::from_millis(500);

struct Endpoint {
    circuit: Circuit<String>,
    load: Load,
    /// A place is free.
    freed: Arc<Notify>,
    /// It was down since it last worked: somebody may wait for it.
    was_down: bool,
}

/// Calls on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    calls: usize,
    bytes: usize,
}

impl Load {
    /// How many calls more may go to one service that has this load, while all of them together have that. One call may always
    /// go, whatever its size.
    fn room(self, all: Load) -> usize {
        (CALLS.saturating_sub(all.calls) / PART).max(1).saturating_sub(self.calls)
    }

    fn with(self, bytes: usize) -> Self {
        Load { calls: self.calls + 1, bytes: self.bytes + bytes }
    }

    fn without(self, bytes: usize) -> Self {
        Load { calls: self.calls.saturating_sub(1), bytes: self.bytes.saturating_sub(bytes) }
    }

    fn takes(self, bytes: usize, all: Load) -> bool {
        let bytes_left = BYTES.saturating_sub(all.bytes) / PART;
        self.calls == 0 || self.room(all) > 0 && self.bytes + bytes <= bytes_left
    }
}

/// All services that were called lately, by scheme and authority, or cluster.
#[derive(Default)]
pub struct Endpoints {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    endpoints: HashMap<String, Endpoint>,
    /// Of all of them.
    load: Load,
}

/// What came of a call, as far as the service is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has answered as it should.
    Works,
    /// It has not.
    Fails,
    /// It has answered that it failed once more at what it had failed at before: that may be the fault of what was sent.
    FailsAgain,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may; [`Endpoints::ended`] has to follow.
    Admitted,
    /// The service is down.
    Down,
    /// It has as many calls as it may have at a time.
    Full,
}

impl Endpoints {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a transaction may call it now with a payload of so many bytes. Waits a little for a place.
    pub async fn admit(&self, endpoint: &str, gid: &str, bytes: usize) -> Admission {
        let until = Instant::now() + PATIENCE;
        loop {
            let freed = self.lock().endpoint(endpoint).freed.clone();
            let freed = freed.notified();
            let admission = self.try_admit(endpoint, gid, bytes, Instant::now());
            if admission != Admission::Full || timeout_at(until, freed).await.is_err() {
                return admission;
            }
        }
    }

    fn try_admit(&self, endpoint: &str, gid: &str, bytes: usize, now: Instant) -> Admission {
        let mut known = self.lock();
        let all = known.load;
        let found = known.endpoint(endpoint);
        let gid = gid.to_owned();
        if !found.circuit.admits(&gid, found.load.calls, now) {
            if !found.circuit.may_probe(now) || found.load.calls > 0 {
                return Admission::Down;
            }
            // All that come by have had their turn.
            found.circuit.begin_turns();
        }
        if !found.load.takes(bytes, all) {
            return Admission::Full;
        }
        found.load = found.load.with(bytes);
        known.load = all.with(bytes);
        Admission::Admitted
    }

    /// Those that are down or have calls on their way, how many more each takes now, and how many any other does.
    pub fn rooms(&self, now: Instant) -> (Vec<(String, i32)>, i32) {
        let number = |room: usize| i32::try_from(room).unwrap_or(i32::MAX);
        let known = self.lock();
        let room = |endpoint: &Endpoint| {
            let room = endpoint.load.room(known.load);
            endpoint.circuit.room(endpoint.load.calls, now).map_or(room, |probes| probes.min(room))
        };
        let limited =
            known.endpoints.iter().filter(|(_, known)| known.load.calls > 0 || known.circuit.is_open());
        let limited = limited.map(|(name, endpoint)| (name.clone(), number(room(endpoint)))).collect();
        (limited, number(Load::default().room(known.load)))
    }

    /// Whether it works, as far as is known.
    pub fn is_up(&self, endpoint: &str) -> bool {
        self.lock().endpoints.get(endpoint).is_none_or(|known| !known.circuit.is_open())
    }

    /// A call has ended that was admitted with so many bytes.
    pub fn ended(
        &self,
        endpoint: &str,
        gid: &str,
        bytes: usize,
        health: Health,
        now: Instant,
        random: f64,
    ) -> Standing {
        let mut known = self.lock();
        known.load = known.load.without(bytes);
        let found = known.endpoint(endpoint);
        found.load = found.load.without(bytes);
        found.freed.notify_one();
        let gid = gid.to_owned();
        let is_open = found.circuit.is_open();
        let blame = match health {
            Health::Works => {
                found.circuit.succeeded(&gid);
                return if std::mem::take(&mut found.was_down) { Standing::Revived } else { Standing::Up };
            }
            Health::Unknown => return if is_open { Standing::Down } else { Standing::Up },
            Health::FailsAgain if !is_open => return Standing::Up,
            Health::Fails | Health::FailsAgain => {
                found.circuit.failed(&gid, found.load.calls + 1, now, random)
            }
            Health::Away => found.circuit.trip(&gid, now, random),
        };
        found.was_down |= found.circuit.is_open();
        match blame {
            Blame::Call => Standing::Up,
            Blame::Opened => Standing::Opened,
            Blame::Service => Standing::Down,
        }
    }
}

impl Known {
    fn endpoint(&mut self, name: &str) -> &mut Endpoint {
        if self.endpoints.len() >= KNOWN_MAX && !self.endpoints.contains_key(name) {
            self.endpoints.retain(|_, endpoint| endpoint.load.calls > 0 || endpoint.was_down);
            if self.endpoints.len() >= KNOWN_MAX {
                self.endpoints.retain(|_, endpoint| endpoint.load.calls > 0);
            }
        }
        self.endpoints.entry(name.to_owned()).or_insert_with(|| Endpoint {
            circuit: Circuit::new(Schedule::exponential(PROBE_BASE, PROBE_CAP, None)),
            load: Load::default(),
            freed: Arc::default(),
            was_down: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(endpoints: &Endpoints, endpoint: &str, gid: &str, now: Instant) -> bool {
        endpoints.try_admit(endpoint, gid, 100, now) == Admission::Admitted
    }

    fn end(endpoints: &Endpoints, endpoint: &str, gid: &str, health: Health, now: Instant) -> Standing {
        endpoints.ended(endpoint, gid, 100, health, now, 0.0)
    }

    #[test]
    fn a_service_that_is_away_is_left_alone_but_for_probes_until_it_works() {
        let (endpoints, begin) = (Endpoints::default(), Instant::now());
        assert!(admits(&endpoints, "http://a", "1", begin));
        assert_eq!(end(&endpoints, "http://a", "1", Health::Away, begin), Standing::Opened);
        assert!(!admits(&endpoints, "http://a", "1", begin), "it is down");
        assert!(admits(&endpoints, "http://b", "1", begin), "others are not");
        let later = begin + PROBE_BASE;
        assert!(admits(&endpoints, "http://a", "7", later));
        assert_eq!(end(&endpoints, "http://a", "7", Health::Works, later), Standing::Revived);
        assert!(endpoints.is_up("http://a"));
        assert!(admits(&endpoints, "http://a", "1", later) && admits(&endpoints, "http://a", "2", later));
        assert_eq!(end(&endpoints, "http://a", "1", Health::Works, later), Standing::Up, "once");
    }

    #[test]
    fn what_fails_again_and_again_by_its_own_fault_takes_its_service_away_from_nobody() {
        let (endpoints, now) = (Endpoints::default(), Instant::now());
        for n in 0..100 {
            let gid = n.to_string();
            assert!(admits(&endpoints, "http://a", &gid, now));
            assert_eq!(end(&endpoints, "http://a", &gid, Health::FailsAgain, now), Standing::Up);
        }
        for n in 0..4 {
            assert!(admits(&endpoints, "http://a", "x", now), "{n}");
            assert_eq!(end(&endpoints, "http://a", &n.to_string(), Health::Fails, now), Standing::Up);
        }
        assert!(admits(&endpoints, "http://a", "x", now));
        assert_eq!(end(&endpoints, "http://a", "x", Health::Fails, now), Standing::Opened);
    }

    #[test]
    fn one_that_waits_alone_is_tried_again_and_again() {
        let (endpoints, mut now) = (Endpoints::default(), Instant::now());
        let mut calls = 0;
        for _ in 0..100 {
            if admits(&endpoints, "http://a", "1", now) {
                calls += 1;
                endpoints.ended("http://a", "1", 100, Health::Away, now, 0.5);
            }
            now += Duration::from_secs(1);
        }
        assert!(calls > 20, "{calls}");
    }

    #[test]
    fn however_many_services_do_not_answer_there_is_room_for_one_that_does() {
        for bytes in [100, 1 << 20] {
            let (endpoints, now) = (Endpoints::default(), Instant::now());
            for service in 0..50 {
                let name = format!("http://slow-{service}");
                while endpoints.try_admit(&name, "1", bytes, now) == Admission::Admitted {}
            }
            assert_eq!(endpoints.try_admit("http://works", "1", bytes, now), Admission::Admitted);
            let load = endpoints.lock().load;
            // One call of each, whatever there is.
            assert!(load.calls < CALLS + 50 && load.bytes < BYTES + (50 << 20), "{load:?}");
        }
    }

    #[tokio::test]
    async fn a_call_waits_a_little_for_a_place() {
        let endpoints = Arc::new(Endpoints::default());
        let now = Instant::now();
        while admits(&endpoints, "http://slow", "1", now) {}
        assert_eq!(endpoints.admit("http://slow", "2", 100).await, Admission::Full);
        let (rooms, usual) = endpoints.rooms(now);
        assert_eq!(rooms, [("http://slow".to_owned(), 0)]);
        assert!(usual > 50, "{usual}");
        let waiting = tokio::spawn({
            let endpoints = endpoints.clone();
            async move { endpoints.admit("http://slow", "2", 100).await }
        });
        tokio::task::yield_now().await;
        // Two: the first makes up for what the others' load has grown by since.
        for _ in 0..2 {
            end(&endpoints, "http://slow", "1", Health::Works, now);
        }
        assert_eq!(waiting.await.unwrap(), Admission::Admitted);
    }

    #[test]
    fn of_what_waits_for_one_that_is_down_a_few_are_taken_up_when_it_may_be_tried() {
        let (endpoints, begin) = (Endpoints::default(), Instant::now());
        for gid in ["1", "2", "3"] {
            assert!(admits(&endpoints, "http://a", gid, begin));
        }
        for gid in ["1", "2", "3"] {
            endpoints.ended("http://a", gid, 100, Health::Away, begin, 1.0);
        }
        let room = |now| endpoints.rooms(now).0;
        assert_eq!(room(begin), [("http://a".to_owned(), 0)]);
        assert_eq!(room(begin + PROBE_BASE), [("http://a".to_owned(), 3)]);
        assert!(admits(&endpoints, "http://a", "4", begin + PROBE_BASE));
        end(&endpoints, "http://a", "4", Health::Works, begin + PROBE_BASE);
        assert_eq!(room(begin + PROBE_BASE), [], "it takes what any other takes");
    }
}
