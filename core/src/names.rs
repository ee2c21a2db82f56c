// SPDX-License-Identifier: PostgreSQL
//! Names that the relay's configuration resolves: of secrets, of Kafka clusters.

/// What a name is, for people.
pub const RULE: &str = "a name has 1 to 64 letters, digits, _, - and .";

/// Whether a text is such a name: 1 to 64 letters, digits, `_`, `-` and `.`.
pub fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        assert!(is_name("main") && is_name("eu-1.b_2"));
        for bad in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
