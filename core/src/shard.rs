// SPDX-License-Identifier: PostgreSQL
//! Which shard of a subscription an event belongs to: decided alike by the extension and by the relay, for ever.

/// The shard, 0 to `shards - 1`: by hash of the key (FNV-1a, 64 bits, of its UTF-8 bytes), so that a key's events stay together; by
/// sequence number where there is no key.
pub fn shard_of(key: Option<&[u8]>, seq: i64, shards: i32) -> i32 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = match key {
        Some(key) => key.iter().fold(OFFSET, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(PRIME)),
        None => seq as u64,
    };
    // FNV mixes its high bits better than its low ones.
    let mixed = if key.is_some() { hash ^ (hash >> 32) } else { hash };
    i32::try_from(mixed % u64::from(shards.max(1).unsigned_abs())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_shard_that_they_always_had() {
        let found: Vec<i32> =
            ["", "a", "customer-7", "Zürich"].map(|key| shard_of(Some(key.as_bytes()), 0, 8)).into();
        assert_eq!(found, EXPECTED);
        assert_eq!([1, 2, 9].map(|seq| shard_of(None, seq, 8)), [1, 2, 1]);
        assert_eq!(shard_of(Some(b"x"), 5, 1), 0);
    }

    /// Another result would send a key's events to two shards while relays of two versions run.
    const EXPECTED: [i32; 4] = [1, 0, 2, 1];

    #[test]
    fn shards_are_used_evenly() {
        let mut counts = [0; 16];
        for n in 0..16_000 {
            counts[shard_of(Some(format!("customer-{n}").as_bytes()), 0, 16) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }
}
