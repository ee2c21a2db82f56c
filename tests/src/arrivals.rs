// SPDX-License-Identifier: PostgreSQL
//! Which event arrived when, as a receiving process keeps it and as it tells another.

use std::collections::HashMap;

use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

/// The path that answers how many there are.
pub const COUNT: &str = "/count";
/// The path that answers them, from the number on that its query is.
pub const ARRIVALS: &str = "/arrivals";

/// Sixteen bytes of id, eight of time.
const ENCODED_BYTES: usize = 24;
/// Room for so many is made at once: memory that has to be moved while it is measured would be measured too.
const RESERVED: usize = 1 << 21;

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its id.
    pub id: Uuid,
    /// When it came, see [`monotonic_ns`].
    pub at_ns: u64,
}

/// All of them, in the order in which they came.
pub struct Log(Vec<Arrival>);

impl Default for Log {
    fn default() -> Self {
        Log(Vec::with_capacity(RESERVED))
    }
}

impl Log {
    /// One more.
    pub fn push(&mut self, id: Uuid, at_ns: u64) {
        self.0.push(Arrival { id, at_ns });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those from a number on, for [`decode`].
    pub fn encode(&self, from: usize) -> Vec<u8> {
        let encode = |arrival: &Arrival| [&arrival.id.as_bytes()[..], &arrival.at_ns.to_be_bytes()].concat();
        self.0.iter().skip(from).flat_map(encode).collect()
    }
}

/// What [`Log::encode`] has written.
pub fn decode(bytes: &[u8]) -> Vec<Arrival> {
    let (whole, rest) = bytes.as_chunks::<ENCODED_BYTES>();
    assert!(rest.is_empty(), "an arrival is cut short");
    let decode = |chunk: &[u8; ENCODED_BYTES]| {
        let (id, at) = chunk.split_at(16);
        Arrival {
            id: Uuid::from_slice(id).expect("16 bytes"),
            at_ns: u64::from_be_bytes(at.try_into().expect("8 bytes")),
        }
    };
    whole.iter().map(decode).collect()
}

/// Panics unless each of `ids` has arrived so many times, and nothing else has.
pub fn assert_each(arrivals: &[Arrival], ids: &[Uuid], times: usize) {
    let mut found: HashMap<Uuid, usize> = HashMap::new();
    arrivals.iter().for_each(|arrival| *found.entry(arrival.id).or_default() += 1);
    assert_eq!(found.len(), ids.len(), "something did not arrive, or nobody had sent it");
    assert!(ids.iter().all(|id| found.get(id) == Some(&times)), "an event did not come {times} times");
}

/// Events a second from the first arrival to the last.
pub fn rate(arrivals: &[Arrival]) -> f64 {
    let (first, last) = (arrivals[0].at_ns, arrivals[arrivals.len() - 1].at_ns);
    (arrivals.len() - 1) as f64 / ((last - first) as f64 / 1e9)
}

/// Nanoseconds of a clock that all processes of the machine share.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_survive_the_wire() {
        let mut log = Log::default();
        (0..3).for_each(|n| log.push(Uuid::from_u128(n), n as u64 * 7));
        let found = decode(&log.encode(1));
        assert_eq!(found, [1, 2].map(|n| Arrival { id: Uuid::from_u128(n), at_ns: n as u64 * 7 }));
    }
}
