// SPDX-License-Identifier: PostgreSQL
//! What is seen of the demo while it runs.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub const GREEN: u8 = 32;
pub const YELLOW: u8 = 33;
pub const BLUE: u8 = 34;
pub const CYAN: u8 = 36;
pub const GREY: u8 = 90;

/// Prints what happens, with the time since the start.
#[derive(Clone)]
pub struct Stage {
    pub begun: Instant,
    pub coloured: bool,
    /// Ids whose delivery was refused at least once.
    pub refused: Arc<Mutex<HashSet<String>>>,
}

impl Stage {
    pub fn say(&self, colour: u8, what: &str, more: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        if self.coloured {
            println!("{seconds:6.2} s  \x1b[{colour}m{what:<12}\x1b[0m {more}");
        } else {
            println!("{seconds:6.2} s  {what:<12} {more}");
        }
    }
}
