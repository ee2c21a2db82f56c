// SPDX-License-Identifier: PostgreSQL
//! How many tests passed and failed, read from what the test programs print.

use std::ops::AddAssign;

/// Numbers of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed, and steps without tests of their own that did.
    pub failed: u32,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl Tally {
    /// A step that is one test by itself.
    pub fn of_step(ok: bool) -> Self {
        Self { passed: u32::from(ok), failed: u32::from(!ok) }
    }

    /// Sums up the lines `test result: ok. 3 passed; 0 failed; ...`. A program that failed without a failed test, because it
    /// did not compile or was killed, counts as one failure.
    pub fn of_output(output: &str, ok: bool) -> Self {
        let mut tally = Self::default();
        for line in output.lines().filter_map(|line| line.trim().strip_prefix("test result: ")) {
            tally.passed += number_before(line, " passed");
            tally.failed += number_before(line, " failed");
        }
        if !ok && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }
}

fn number_before(line: &str, word: &str) -> u32 {
    let before = line.split(word).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_up_all_programs() {
        let output = "test a ... ok\n\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                      test result: FAILED. 12 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(Tally::of_output(output, false), Tally { passed: 15, failed: 2 });
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        assert_eq!(Tally::of_output("error: could not compile", false), Tally { passed: 0, failed: 1 });
        assert_eq!(Tally::of_output("", true), Tally::default());
    }
}
