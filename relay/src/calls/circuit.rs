// SPDX-License-Identifier: PostgreSQL
//! Whose fault a failure is: a status does not tell, other calls do.
//!
//! A circuit is closed while a service works: then a failure is charged to what was sent. It opens when calls of several
//! parties failed in a row without a success between: then the service is down, and nobody is charged. A party is what
//! fails by itself, such as a key. While it is open, a few calls of different parties are let through from time to time, of
//! one that has not had its turn before one that has; one success closes it.

use std::collections::HashSet;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

use super::schedule::Schedule;

/// So many failures in a row open it …
const FAILURES: u32 = 5;
/// … if they are of so many parties, or of all that wait where those are fewer.
const PARTIES: usize = 3;
/// Calls that are let through at once while it is open.
const PROBES: usize = 3;
/// Of so many parties it is known that they had their turn as probes; then the turns begin anew.
const TURNS: usize = 10_000;

/// A circuit; `P` names a party.
#[derive(Debug)]
pub struct Circuit<P> {
    probes: Schedule,
    /// Failures since the last success.
    failures: u32,
    /// Some of the parties that failed since the last success: no more than [`PARTIES`].
    failed: HashSet<P>,
    /// The party of the last success, if no failure came after it.
    succeeded: Option<P>,
    /// When it is open: when the next probes may go, and how many rounds of them have failed.
    open: Option<(Instant, u32)>,
    /// So many of the last round are not known to have failed: they may still go.
    left: usize,
    /// Parties that failed while it is open, in this round of turns.
    probed: HashSet<P>,
}

/// Whom a failure is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// What was sent.
    Call,
    /// The service, and with this failure it counts as down.
    Opened,
    /// The service, which was down already.
    Service,
}

impl<P: Clone + Eq + Hash> Circuit<P> {
    /// A closed circuit. `probes`: the pauses between rounds of probes once it is open.
    pub fn new(probes: Schedule) -> Self {
        let (failed, probed) = (HashSet::new(), HashSet::new());
        Circuit { probes, failures: 0, failed, succeeded: None, open: None, left: 0, probed }
    }

    /// Whether the service counts as down.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether probes may go now.
    pub fn may_probe(&self, now: Instant) -> bool {
        self.open.is_some_and(|(at, _)| at <= now)
    }

    /// When the next probes may go; `None` while it is closed.
    pub fn next_probe(&self) -> Option<Instant> {
        self.open.map(|(at, _)| at)
    }

    /// Whether a call of this party may be made. While it is open for few parties only, one that has not failed may always
    /// try: it can tell that the others are to blame.
    pub fn admits(&self, party: &P, in_flight: usize, now: Instant) -> bool {
        match self.open {
            None => true,
            Some((at, _)) => {
                let is_new = self.failed.len() < PARTIES && !self.failed.contains(party);
                in_flight < PROBES && is_new || in_flight < self.probes_at(at, now) && self.has_turn(party)
            }
        }
    }

    /// How many probes may be on their way.
    fn probes_at(&self, next: Instant, now: Instant) -> usize {
        if next <= now { PROBES } else { self.left }
    }

    /// How many calls may be made now beside those in flight; `None`: as many as there are.
    pub fn room(&self, in_flight: usize, now: Instant) -> Option<usize> {
        let (at, _) = self.open?;
        let most = if self.failed.len() < PARTIES { PROBES } else { self.probes_at(at, now) };
        Some(most.saturating_sub(in_flight))
    }

    /// Whether a party has not been heard yet in this round of turns, which goes on over all rounds of probes: among parties
    /// that fail by their own fault, the one that does not is found however many they are.
    pub fn has_turn(&self, party: &P) -> bool {
        !self.probed.contains(party)
    }

    /// All that wait have had their turn.
    pub fn begin_turns(&mut self) {
        self.probed.clear();
    }

    /// A call of a party was a success: the service works.
    pub fn succeeded(&mut self, party: &P) {
        self.failures = 0;
        self.failed.clear();
        self.probed.clear();
        (self.open, self.left) = (None, 0);
        if self.succeeded.as_ref() != Some(party) {
            self.succeeded = Some(party.clone());
        }
    }

    /// Whether another party had a success since the last failure: if this one fails now, it is its own fault.
    pub fn vouches_against(&self, party: &P) -> bool {
        self.succeeded.as_ref().is_some_and(|other| other != party)
    }

    /// A call of a party failed; `waiting` parties have something to send, this one included. `random` is drawn evenly from
    /// `[0, 1)`.
    pub fn failed(&mut self, party: &P, waiting: usize, now: Instant, random: f64) -> Blame {
        self.succeeded = None;
        self.failures = self.failures.saturating_add(1);
        if self.failed.len() < PARTIES {
            self.failed.insert(party.clone());
        }
        if self.open.is_some() {
            self.probe_failed(party, now, random);
            return Blame::Service;
        }
        if self.failures >= FAILURES && self.failed.len() >= PARTIES.min(waiting) {
            self.open = Some((now + self.pause(1, random), 1));
            return Blame::Opened;
        }
        Blame::Call
    }

    /// Nothing could be sent: the service is down, whoever wanted to send.
    pub fn trip(&mut self, party: &P, now: Instant, random: f64) -> Blame {
        self.succeeded = None;
        if self.failed.len() < PARTIES {
            self.failed.insert(party.clone());
        }
        if self.open.is_some() {
            self.probe_failed(party, now, random);
            return Blame::Service;
        }
        self.open = Some((now + self.pause(1, random), 1));
        Blame::Opened
    }

    /// The first of a round of probes that fails puts off the next round, whether the others are on their way already or not.
    fn probe_failed(&mut self, party: &P, now: Instant, random: f64) {
        if self.probed.len() >= TURNS {
            self.probed.clear();
        }
        self.probed.insert(party.clone());
        if let Some((at, rounds)) = self.open
            && at <= now
        {
            let rounds = rounds.saturating_add(1);
            self.open = Some((now + self.pause(rounds, random), rounds));
            self.left = PROBES;
        }
        self.left = self.left.saturating_sub(1);
    }

    /// At least half of the schedule's bound: probes are not to come in a burst.
    fn pause(&self, rounds: u32, random: f64) -> Duration {
        self.probes.delay(rounds, 0.5 + random / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circuit() -> Circuit<u8> {
        let second = Duration::from_secs(1);
        Circuit::new(Schedule::exponential(second, 8 * second, None))
    }

    fn fail(circuit: &mut Circuit<u8>, parties: &[u8], waiting: usize, now: Instant) -> Vec<Blame> {
        parties.iter().map(|party| circuit.failed(party, waiting, now, 0.0)).collect()
    }

    #[test]
    fn one_party_that_fails_among_others_that_do_not_is_to_blame() {
        let (mut circuit, now) = (circuit(), Instant::now());
        for _ in 0..100 {
            assert_eq!(fail(&mut circuit, &[1, 1], 9, now), [Blame::Call; 2]);
            circuit.succeeded(&2);
        }
        assert_eq!(fail(&mut circuit, &[1; 50], 9, now), [Blame::Call; 50], "two more have not been heard");
    }

    #[test]
    fn failures_of_three_in_a_row_are_the_services() {
        let (mut circuit, now) = (circuit(), Instant::now());
        let blames = fail(&mut circuit, &[1, 2, 3, 1, 2, 4], 9, now);
        assert_eq!(
            blames,
            [Blame::Call, Blame::Call, Blame::Call, Blame::Call, Blame::Opened, Blame::Service]
        );
        assert!(circuit.is_open() && !circuit.admits(&7, 0, now));
    }

    #[test]
    fn where_fewer_wait_all_that_wait_are_enough_and_a_newcomer_may_try() {
        let (mut circuit, now) = (circuit(), Instant::now());
        assert_eq!(fail(&mut circuit, &[1; 5], 1, now)[4], Blame::Opened);
        assert!(!circuit.admits(&1, 0, now) && circuit.admits(&2, 0, now));
        circuit.succeeded(&2);
        assert!(!circuit.is_open() && circuit.vouches_against(&1) && !circuit.vouches_against(&2));
        assert_eq!(fail(&mut circuit, &[1], 1, now), [Blame::Call]);
        assert!(!circuit.vouches_against(&1), "a failure came after");
    }

    #[test]
    fn a_probe_that_fails_soon_takes_no_turn_from_the_others_of_its_round() {
        let (mut circuit, begin) = (circuit(), Instant::now());
        fail(&mut circuit, &[1, 2, 3, 1, 2], 9, begin);
        let at = begin + Duration::from_millis(500);
        for (party, left) in [(4, 2), (5, 1), (6, 0)] {
            assert!(circuit.admits(&party, 0, at));
            fail(&mut circuit, &[party], 9, at);
            assert_eq!(circuit.room(0, at), Some(left));
        }
        assert!(!circuit.admits(&7, 0, at));
    }

    #[test]
    fn probes_go_in_rounds_that_become_rarer() {
        let (mut circuit, begin) = (circuit(), Instant::now());
        assert_eq!(circuit.trip(&1, begin, 0.0), Blame::Opened);
        let ms = Duration::from_millis;
        let mut at = begin + ms(500);
        for pause in [1_000, 2_000, 4_000, 4_000] {
            assert_eq!(circuit.next_probe(), Some(at));
            assert!(!circuit.may_probe(at - ms(1)) && circuit.may_probe(at));
            assert!(circuit.admits(&1, PROBES - 1, at) && !circuit.admits(&1, PROBES, at));
            fail(&mut circuit, &[1, 2, 3], 3, at);
            at += ms(pause);
            assert!(!circuit.admits(&1, 0, at) && circuit.admits(&4, 0, at), "others have their turn first");
            circuit.begin_turns();
        }
        circuit.succeeded(&1);
        assert!(circuit.admits(&1, 1_000, at));
    }
}
