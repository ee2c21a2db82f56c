// SPDX-License-Identifier: PostgreSQL
//! Moves of cursors, and the settlements that go with them, as the arguments of one statement.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;
use tokio_postgres::types::ToSql;

use super::cursors::Move;
use super::error::SourceError;
use super::mark::Mark;
use super::settlement::{Attempt, Settlement};

/// The statement.
pub(super) const SQL: &str = "SELECT position_ids, fenced, busy, broken, stale FROM \
     dtm.relay_store($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)";

/// The arguments, column by column.
#[derive(Default)]
pub(super) struct Batch {
    new_marks: Vec<Arc<Mark>>,
    new_positions: Vec<String>,
    subscriptions: Vec<i64>,
    shards: Vec<i32>,
    epochs: Vec<i64>,
    tokens: Vec<i64>,
    positions: Vec<i64>,
    targets: Vec<Option<i64>>,
    acked: Vec<i64>,
    ahead: Vec<Option<String>>,
    windows: Vec<Option<String>>,
    /// The move, counted from 1, that each settlement belongs to.
    of: Vec<i32>,
    seqs: Vec<i64>,
    what: Vec<&'static str>,
    attempts: Vec<i32>,
    next_in: Vec<Option<f64>>,
    histories: Vec<Value>,
}

impl Batch {
    /// `is_utf8`: the database can store every text; if not, what is not ASCII is left out of histories.
    pub(super) fn of(moves: &[Move], now: Instant, is_utf8: bool) -> Self {
        let mut batch = Batch::default();
        let mut places = HashMap::new();
        for Move { owner, cursor, settlements, .. } in moves {
            batch.subscriptions.push(owner.subscription);
            batch.shards.push(owner.shard);
            batch.epochs.push(owner.epoch);
            batch.tokens.push(owner.token);
            let position = batch.refer(&cursor.position, &mut places);
            batch.positions.push(position);
            let target = cursor.target.as_ref().map(|target| batch.refer(target, &mut places));
            batch.targets.push(target);
            batch.acked.push(cursor.acked);
            batch.ahead.push(array(&cursor.ahead));
            batch.windows.push(array(&cursor.windows));
            settlements.iter().for_each(|settlement| batch.settle(settlement, now, is_utf8));
        }
        batch
    }

    /// One more of the last move.
    fn settle(&mut self, settlement: &Settlement, now: Instant, is_utf8: bool) {
        let Settlement { seq, what, attempts, history, next } = settlement;
        self.of.push(i32::try_from(self.subscriptions.len()).unwrap_or(i32::MAX));
        self.seqs.push(*seq);
        self.what.push(what.as_str());
        self.attempts.push(i32::try_from(*attempts).unwrap_or(i32::MAX));
        self.next_in.push(next.map(|next| next.saturating_duration_since(now).as_secs_f64()));
        let ascii: Vec<Attempt>;
        let history = if is_utf8 {
            history
        } else {
            ascii = history.iter().map(Attempt::in_ascii).collect();
            &ascii
        };
        self.histories.push(serde_json::to_value(history).unwrap_or_else(|_| Value::Array(Vec::new())));
    }

    /// The id that a mark is stored under; else -k, and it goes along as the k-th new one.
    fn refer(&mut self, mark: &Arc<Mark>, places: &mut HashMap<*const Mark, i64>) -> i64 {
        mark.id().unwrap_or_else(|| {
            *places.entry(Arc::as_ptr(mark)).or_insert_with(|| {
                self.new_marks.push(mark.clone());
                self.new_positions.push(mark.text().to_owned());
                -(self.new_marks.len() as i64)
            })
        })
    }

    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 16] {
        [
            &self.new_positions,
            &self.subscriptions,
            &self.shards,
            &self.epochs,
            &self.tokens,
            &self.positions,
            &self.targets,
            &self.acked,
            &self.ahead,
            &self.of,
            &self.seqs,
            &self.what,
            &self.attempts,
            &self.next_in,
            &self.histories,
            &self.windows,
        ]
    }

    /// The new positions are stored under these ids.
    pub(super) fn stored(&self, ids: Vec<i64>) -> Result<(), SourceError> {
        if ids.len() != self.new_marks.len() {
            let problem = format!("{} ids for {} new positions", ids.len(), self.new_marks.len());
            return Err(SourceError::Answer { what: "moving cursors", problem });
        }
        self.new_marks.iter().zip(ids).for_each(|(mark, id)| mark.stored(id));
        Ok(())
    }
}

/// An array as PostgreSQL reads it; none where there is nothing in it.
fn array(values: &[impl ToString]) -> Option<String> {
    let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
    (!texts.is_empty()).then(|| format!("{{{}}}", texts.join(",")))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dtm_core::position::Position;

    use super::super::cursors::{Cursor, Cursors, Owner};
    use super::super::settlement::Leave;
    use super::*;

    fn mark() -> Arc<Mark> {
        Mark::new(Position::start_of_era(1))
    }

    fn owner(subscription: i64) -> Owner {
        Owner { subscription, shard: 0, epoch: 1, token: 1, fenced: Default::default() }
    }

    fn moves(all: Vec<(i64, Cursor, Vec<Settlement>)>) -> Vec<Move> {
        let cursors = Cursors::default();
        for (subscription, cursor, settlements) in all {
            cursors.moved(&owner(subscription), cursor, settlements, 1);
        }
        let mut moves = cursors.take(Instant::now());
        moves.sort_by_key(|entry| entry.owner.subscription);
        moves
    }

    #[test]
    fn a_position_is_stored_once_for_all_that_stand_at_it() {
        let (shared, target) = (mark(), mark());
        let cursor = |target: Option<&Arc<Mark>>| Cursor {
            position: shared.clone(),
            target: target.cloned(),
            acked: 0,
            ahead: Vec::new(),
            windows: Vec::new(),
        };
        let moves = moves(vec![
            (1, cursor(None), Vec::new()),
            (2, cursor(Some(&target)), Vec::new()),
            (3, cursor(Some(&shared)), Vec::new()),
        ]);
        let batch = Batch::of(&moves, Instant::now(), true);
        assert_eq!(batch.positions, [-1, -1, -1]);
        assert_eq!(batch.targets, [None, Some(-2), Some(-1)]);
        batch.stored(vec![70, 71]).unwrap();
        let again = Batch::of(&moves, Instant::now(), true);
        assert_eq!((again.new_positions.len(), again.positions), (0, vec![70, 70, 70]));
        assert_eq!(again.targets, [None, Some(71), Some(70)]);
        assert!(batch.stored(vec![1]).is_err());
    }

    #[test]
    fn settlements_name_their_move_and_how_soon_they_are_due() {
        let now = Instant::now();
        let attempt = Attempt { at: "t".into(), status: Some(500), error: "e".into(), body: String::new() };
        let park = Settlement {
            seq: 7,
            what: Leave::Park,
            attempts: 2,
            history: vec![attempt],
            next: Some(now + Duration::from_secs(3)),
        };
        let done = Settlement { seq: 8, what: Leave::Done, attempts: 0, history: Vec::new(), next: None };
        let cursor =
            |ahead: Vec<i64>| Cursor { position: mark(), target: None, acked: 0, ahead, windows: Vec::new() };
        let moves =
            moves(vec![(1, cursor(vec![4, 9]), Vec::new()), (2, cursor(Vec::new()), vec![park, done])]);
        let batch = Batch::of(&moves, now, true);
        assert_eq!(batch.ahead, [Some("{4,9}".to_owned()), None]);
        assert_eq!((batch.of, batch.seqs, batch.what), (vec![2, 2], vec![7, 8], vec!["park", "done"]));
        assert_eq!((batch.attempts, batch.next_in), (vec![2, 0], vec![Some(3.0), None]));
        assert_eq!(batch.histories[0][0]["status"], 500);
        assert_eq!(batch.histories[1], Value::Array(Vec::new()));
    }
}
