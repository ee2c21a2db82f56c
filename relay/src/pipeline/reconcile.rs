// SPDX-License-Identifier: PostgreSQL
//! Where the position in Kafka and the cursor in PostgreSQL differ when an exactly-once writer begins: which of them is right.

use crate::kafka::position::Position;
use crate::source::pages::StoredCursor;

/// Takes over from Kafka's position what PostgreSQL's cursor does not say. Answers which parked events were delivered.
pub fn reconcile(cursor: &mut StoredCursor, position: Option<Position>, epoch: i64, name: &str) -> Vec<i64> {
    let known = match (&position, cursor.windows.as_slice()) {
        // Nothing has been committed yet: not even the first window's first batch.
        (None, []) => return Vec::new(),
        (None, [_]) if cursor.target.is_some() => return Vec::new(),
        (None, _) => None,
        (Some(position), _) if position.epoch != epoch => None,
        (Some(position), []) => position.window.is_nil().then_some(position),
        (Some(position), windows) => windows.contains(&position.window).then_some(position),
    };
    let Some(position) = known else {
        let hint = "what was delivered beyond PostgreSQL's cursor is delivered again; after a rewind that is meant so";
        tracing::error!(
            subscription = name,
            hint,
            "the position in Kafka is of no window that PostgreSQL knows: it falls back to PostgreSQL's cursor"
        );
        return Vec::new();
    };
    if cursor.target.is_some() && cursor.windows.last() == Some(&position.window) {
        cursor.acked = cursor.acked.max(position.last_seq);
    }
    position.done.clone()
}

#[cfg(test)]
mod tests {
    use dtm_core::position::Position as LogPosition;
    use uuid::Uuid;

    use super::*;
    use crate::source::mark::Mark;

    const FIRST: Uuid = Uuid::from_u128(1);
    const SECOND: Uuid = Uuid::from_u128(2);

    fn cursor(windows: &[Uuid], is_open: bool) -> StoredCursor {
        let mark = || Mark::new(LogPosition::start_of_era(1));
        StoredCursor {
            position: mark(),
            target: is_open.then(mark),
            acked: 10,
            ahead: Vec::new(),
            windows: windows.to_vec(),
        }
    }

    fn reconciled(mut cursor: StoredCursor, window: Uuid, epoch: i64, last_seq: i64) -> (i64, Vec<i64>) {
        let position = Position { window, epoch, last_seq, done: vec![3] };
        let done = reconcile(&mut cursor, Some(position), 1, "s");
        (cursor.acked, done)
    }

    #[test]
    fn kafka_is_believed_only_of_the_window_that_is_open() {
        assert_eq!(reconciled(cursor(&[FIRST, SECOND], true), SECOND, 1, 20), (20, vec![3]));
        assert_eq!(
            reconciled(cursor(&[FIRST, SECOND], true), SECOND, 1, 5),
            (10, vec![3]),
            "PostgreSQL is ahead"
        );
        // Numbers of another window say nothing: a late transaction's lie below them.
        assert_eq!(reconciled(cursor(&[FIRST, SECOND], true), FIRST, 1, 20), (10, vec![3]));
        assert_eq!(reconciled(cursor(&[FIRST], false), FIRST, 1, 20), (10, vec![3]));
    }

    #[test]
    fn an_unknown_window_or_an_earlier_epoch_falls_back_to_the_cursor() {
        let unknown = Uuid::from_u128(9);
        assert_eq!(reconciled(cursor(&[FIRST, SECOND], true), unknown, 1, 20), (10, vec![]));
        assert_eq!(reconciled(cursor(&[FIRST, SECOND], true), SECOND, 0, 20), (10, vec![]));
        assert_eq!(reconciled(cursor(&[], true), FIRST, 1, 20), (10, vec![]));
        assert_eq!(
            reconciled(cursor(&[], false), Uuid::nil(), 1, 0),
            (10, vec![3]),
            "only parked events so far"
        );
        let mut stored = cursor(&[FIRST, SECOND], true);
        assert!(reconcile(&mut stored, None, 1, "s").is_empty());
        assert_eq!(stored.acked, 10);
    }
}
