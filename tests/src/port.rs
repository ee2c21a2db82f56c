// SPDX-License-Identifier: PostgreSQL
//! Ports for servers that stop and come back: none that the system gives to others meanwhile.

use std::net::TcpListener;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// From here on ports are free for everybody, and few services are configured to use them.
const FIRST: u32 = 10_000;

/// A port outside the range from which the system takes ports for outgoing connections and for who does not care. No two
/// calls of one process answer the same one.
pub fn free() -> u16 {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let ours = ours(ephemeral());
    let count = ours.end - ours.start;
    // Processes begin far from each other.
    let begin = std::process::id().wrapping_mul(7_919);
    for _ in 0..count {
        let at = begin.wrapping_add(CALLS.fetch_add(1, Ordering::Relaxed)) % count;
        let port = u16::try_from(ours.start + at).expect("a port");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port of {ours:?} is free");
}

/// The system's range; what Linux has by default where it does not say.
fn ephemeral() -> Range<u32> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let bounds: Vec<u32> = text.split_whitespace().filter_map(|bound| bound.parse().ok()).collect();
    match bounds[..] {
        [first, last] => first..last + 1,
        _ => 32_768..61_000,
    }
}

/// The larger of the two ranges beside the system's; all there are if it has left none.
fn ours(ephemeral: Range<u32>) -> Range<u32> {
    let (below, above) = (FIRST..ephemeral.start.max(FIRST), ephemeral.end..65_536.max(ephemeral.end));
    let larger = if below.len() >= above.len() { below } else { above };
    if larger.len() < 100 { FIRST..65_536 } else { larger }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_lie_beside_those_that_the_system_gives_away() {
        assert_eq!(ours(32_768..61_000), 10_000..32_768);
        assert_eq!(ours(1_024..30_000), 30_000..65_536);
        assert_eq!(ours(1_024..65_536), 10_000..65_536);
    }

    #[test]
    fn no_port_is_given_twice() {
        assert_ne!(free(), free());
    }
}
