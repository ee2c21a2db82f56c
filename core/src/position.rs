// SPDX-License-Identifier: PostgreSQL
//! Positions in the log: what a reader has seen, whatever the order in which transactions commit.

use std::fmt;
use std::str::FromStr;

/// A PostgreSQL snapshot over 64-bit transaction ids, as `pg_snapshot` prints it: `xmin:xmax:xip,…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below this one has ended.
    pub xmin: u64,
    /// The latest completed transaction + 1. It is *not* the next id to be given out: a transaction at or above it may
    /// have begun long ago.
    pub xmax: u64,
    /// Transactions in `[xmin, xmax)` that had not ended, ascending.
    pub xip: Vec<u64>,
}

impl Snapshot {
    /// Whether the transaction had ended when the snapshot was taken (the rule of `pg_visible_in_snapshot`).
    pub fn sees(&self, xid: u64) -> bool {
        if xid < self.xmin {
            return true;
        }
        xid < self.xmax && self.xip.binary_search(&xid).is_err()
    }

    /// Takes a transaction out of what the snapshot sees. PostgreSQL never lists the transaction that takes a snapshot:
    /// a position read inside a transaction that publishes has to add it by hand.
    pub fn hide(&mut self, xid: u64) {
        if !self.sees(xid) {
            return;
        }
        if let Err(at) = self.xip.binary_search(&xid) {
            self.xip.insert(at, xid);
        }
        self.xmin = self.xmin.min(xid);
    }
}

/// Above `seq` lie all rows of transaction `xid`, which had published, or was about to, and had not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    /// The top-level transaction.
    pub xid: u64,
    /// All its rows have a greater sequence number.
    pub seq: i64,
}

/// How far a reader has come: everything that `snapshot` sees has been read, nothing else has.
///
/// Its text, `era|seq|top|xmin:xmax:xip,…|xid>floor,…`, is what the database stores and what the relay hands back; only the
/// extension and this crate look inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// Transaction ids compare only within one era: a restored database begins a new one.
    pub era: i32,
    /// The last sequence number given out when the position was read.
    pub seq: i64,
    /// No row that `snapshot` sees has a greater sequence number.
    pub top: i64,
    /// What had ended when the position was read.
    pub snapshot: Snapshot,
    /// For each publisher that `snapshot` does not see and that may have rows at or below `seq`.
    pub floors: Vec<Floor>,
}

impl Position {
    /// The position before every row of an era.
    pub fn start_of_era(era: i32) -> Self {
        let snapshot = Snapshot { xmin: 3, xmax: 3, xip: Vec::new() };
        Position { era, seq: 0, top: 0, snapshot, floors: Vec::new() }
    }

    /// The position behind every row of an era that is over: all its transactions have ended.
    pub fn end_of_era(era: i32) -> Self {
        let snapshot = Snapshot { xmin: u64::MAX, xmax: u64::MAX, xip: Vec::new() };
        Position { era, seq: i64::MAX, top: i64::MAX, snapshot, floors: Vec::new() }
    }

    /// Whether this is [`Position::end_of_era`] of some era.
    pub fn is_end_of_era(&self) -> bool {
        self.seq == i64::MAX
    }

    /// The sequence number at and below which this position needs no row any more.
    pub fn low(&self) -> i64 {
        self.floors.iter().map(|floor| floor.seq).fold(self.seq, i64::min)
    }

    /// Positions of one era were read in the order of this: of two with the same numbers and the same newest transaction,
    /// that which saw more transactions running is the earlier.
    pub fn order(&self) -> [i64; 4] {
        let xmax = i64::try_from(self.snapshot.xmax).unwrap_or(i64::MAX);
        [self.seq, self.top, xmax, -(self.snapshot.xip.len() as i64)]
    }

    /// Reads the text of a position. The error says which part is malformed.
    pub fn parse(text: &str) -> Result<Self, MalformedPosition> {
        text.parse()
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, xid) in self.xip.iter().enumerate() {
            write!(f, "{}{xid}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}|{}|{}|{}|", self.era, self.seq, self.top, self.snapshot)?;
        for (i, floor) in self.floors.iter().enumerate() {
            write!(f, "{}{}>{}", if i == 0 { "" } else { "," }, floor.xid, floor.seq)?;
        }
        Ok(())
    }
}

/// A text that is no position: which part of it, and the part itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed position: {part} in {text:?}")]
pub struct MalformedPosition {
    part: &'static str,
    text: String,
}

fn malformed(part: &'static str, text: &str) -> MalformedPosition {
    MalformedPosition { part, text: text.to_owned() }
}

fn number<T: FromStr>(part: &'static str, text: &str) -> Result<T, MalformedPosition> {
    text.parse().map_err(|_| malformed(part, text))
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|item| !item.is_empty())
}

impl FromStr for Snapshot {
    type Err = MalformedPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().ok_or_else(|| malformed("snapshot", text));
        let (xmin, xmax) = (number("xmin", part()?)?, number("xmax", part()?)?);
        let xip = list(part()?).map(|xid| number("xip", xid)).collect::<Result<Vec<u64>, _>>()?;
        if xmin > xmax || !xip.is_sorted_by(|a, b| a < b) {
            return Err(malformed("snapshot", text));
        }
        Ok(Snapshot { xmin, xmax, xip })
    }
}

impl FromStr for Position {
    type Err = MalformedPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('|');
        let mut part = |name| parts.next().ok_or_else(|| malformed(name, text));
        let era = number("era", part("era")?)?;
        let seq = number("seq", part("seq")?)?;
        let top = number("top", part("top")?)?;
        let snapshot = part("snapshot")?.parse()?;
        let floors = list(part("floors")?)
            .map(|floor| {
                let (xid, seq) = floor.split_once('>').ok_or_else(|| malformed("floor", floor))?;
                Ok(Floor { xid: number("floor", xid)?, seq: number("floor", seq)? })
            })
            .collect::<Result<Vec<_>, MalformedPosition>>()?;
        if parts.next().is_some() {
            return Err(malformed("a sixth part", text));
        }
        Ok(Position { era, seq, top, snapshot, floors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_its_text() {
        for text in ["7|0|0|3:3:|", "-12|42|44|100:110:100,105|100>7,105>40", "1|9|9|5:9:6|"] {
            assert_eq!(Position::parse(text).unwrap().to_string(), text);
        }
        let end = Position::end_of_era(3);
        assert_eq!(Position::parse(&end.to_string()).unwrap(), end);
        assert!(end.is_end_of_era());
    }

    #[test]
    fn positions_of_an_era_have_an_order() {
        let ascending = [
            "7|0|0|3:3:|",
            "7|4|4|9:12:9,10|",
            "7|4|4|10:12:10|",
            "7|4|4|10:13:10|",
            "7|4|5|10:13:10|",
            "7|6|6|10:13:10|",
        ];
        let order = |text: &&str| Position::parse(text).unwrap().order();
        assert!(ascending.iter().map(order).is_sorted_by(|a, b| a < b));
        assert!(Position::end_of_era(7).order() > order(&ascending[5]));
        assert_eq!(Position::start_of_era(7).order(), order(&ascending[0]));
    }

    #[test]
    fn a_malformed_position_is_refused() {
        for text in
            ["", "1|2|3", "x|1|1|3:3:|", "1|1|1|4:3:|", "1|1|1|3:9:5,4|", "1|1|1|3:3:|5", "1|1|1|3:3:||"]
        {
            assert!(Position::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_hidden_transaction_is_not_seen_and_the_others_are_as_before() {
        let mut snapshot = Snapshot { xmin: 10, xmax: 14, xip: vec![11] };
        snapshot.hide(8);
        assert_eq!(snapshot, Snapshot { xmin: 8, xmax: 14, xip: vec![8, 11] });
        assert!(snapshot.sees(9) && snapshot.sees(10) && !snapshot.sees(11) && snapshot.sees(12));
        snapshot.hide(20);
        assert_eq!(snapshot.xip, vec![8, 11], "what lies past xmax is unseen already");
    }
}
