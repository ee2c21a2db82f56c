// SPDX-License-Identifier: PostgreSQL
//! Which piece of the log a subscription reads next.

use std::sync::Arc;

use dtm_core::position::Position;

use super::delivery::LaneName;
use super::windows::{Ahead, Progress};
use crate::source::mark::Mark;
use crate::source::pages::StoredCursor;
use crate::source::settlement::Settlement;

/// What a subscription that was restored or adopted can meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its cursor lies in era {0}, which the database does not know")]
pub struct UnknownEra(i32);

/// The progress of a pipeline, which its reader tells of its windows.
pub type FlowProgress = Progress<Arc<Mark>, LaneName, Settlement>;

/// A piece of a window.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where the window begins.
    pub from: Arc<Mark>,
    /// Where it ends.
    pub to: Arc<Mark>,
    /// The piece begins after this sequence number.
    pub after: i64,
}

/// A window that is being read.
struct Open {
    to: Arc<Mark>,
    leads_to: Option<Arc<Mark>>,
    after: i64,
}

/// Reads windows one after the other: first what older eras have left, then up to each new head.
pub struct Reader {
    position: Arc<Mark>,
    open: Option<Open>,
    eras: Arc<[i32]>,
}

impl Reader {
    /// Goes on from a cursor; what lies `ahead` of it counts as settled. `eras`: all that the log has, oldest first, the last
    /// is the current one.
    pub fn new(
        cursor: StoredCursor,
        ahead: Ahead<Settlement>,
        eras: Arc<[i32]>,
    ) -> Result<(Self, FlowProgress), UnknownEra> {
        let mut reader = Reader { position: cursor.position, open: None, eras };
        let era = reader.position.era();
        if !reader.eras.contains(&era) {
            return Err(UnknownEra(era));
        }
        if reader.position.position().is_end_of_era() {
            reader.position = reader.era_after(era).ok_or(UnknownEra(era))?;
        }
        let mut progress = Progress::new(reader.position.clone(), ahead);
        if let Some(to) = cursor.target {
            let leads_to = if to.position().is_end_of_era() { reader.era_after(era) } else { None };
            progress.resume(to.clone(), leads_to.clone(), cursor.acked);
            reader.open = Some(Open { to, leads_to, after: cursor.acked });
        }
        Ok((reader, progress))
    }

    /// The piece to read next; `None`: nothing before the head moves.
    pub fn next(&mut self, head: Option<&Arc<Mark>>, progress: &mut FlowProgress) -> Option<Piece> {
        if self.open.is_none() {
            let (to, leads_to) = self.window(head)?;
            progress.open(to.clone(), leads_to.clone());
            self.open = Some(Open { to, leads_to, after: 0 });
        }
        let from = &self.position;
        self.open.as_ref().map(|open| Piece { from: from.clone(), to: open.to.clone(), after: open.after })
    }

    /// Where it stands, if it is between two windows of the current era.
    pub fn stands_at(&self) -> Option<&Arc<Mark>> {
        let between = self.open.is_none() && self.era_after(self.position.era()).is_none();
        between.then_some(&self.position)
    }

    /// Opens the window up to a position that somebody else has read.
    pub fn open(&mut self, to: Arc<Mark>, progress: &mut FlowProgress) {
        progress.open(to.clone(), None);
        self.open = Some(Open { to, leads_to: None, after: 0 });
    }

    /// A piece was read: up to this sequence number, or to the window's end.
    pub fn read(&mut self, scanned: i64, to_the_end: bool) {
        let Some(mut open) = self.open.take() else { return };
        if to_the_end {
            self.position = open.leads_to.unwrap_or(open.to);
        } else {
            open.after = scanned;
            self.open = Some(open);
        }
    }

    fn window(&self, head: Option<&Arc<Mark>>) -> Option<(Arc<Mark>, Option<Arc<Mark>>)> {
        let era = self.position.era();
        match self.era_after(era) {
            // An era that is over is drained to its end.
            Some(next) => Some((Mark::new(Position::end_of_era(era)), Some(next))),
            None => {
                let head = head.filter(|head| is_past(head.position(), self.position.position()))?;
                Some((head.clone(), None))
            }
        }
    }

    fn era_after(&self, era: i32) -> Option<Arc<Mark>> {
        let at = self.eras.iter().position(|&known| known == era)?;
        self.eras.get(at + 1).map(|&next| Mark::new(Position::start_of_era(next)))
    }
}

/// Whether `head` was read after `position`: it sees everything that `position` sees, and is not the same. The head that the
/// relay holds can be older than a cursor: a subscription made since, or taken over from another relay. Reading on from
/// such a head would deliver again what lies between.
pub fn is_past(head: &Position, position: &Position) -> bool {
    let (later, earlier) = (&head.snapshot, &position.snapshot);
    head.era == position.era
        && head != position
        && head.seq >= position.seq
        && later.xmax >= earlier.xmax
        && later.xip.iter().all(|&xid| !earlier.sees(xid))
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
