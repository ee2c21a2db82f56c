// SPDX-License-Identifier: PostgreSQL

use dtm_core::position::Position;

use super::super::settlement::Leave;
use super::*;

fn mark() -> Arc<Mark> {
    Mark::new(Position::start_of_era(1))
}

fn owner(subscription: i64) -> Owner {
    Owner { subscription, shard: 0, epoch: 1, token: 1, fenced: CancellationToken::new() }
}

fn cursor(acked: i64) -> Cursor {
    Cursor { position: mark(), target: None, acked, ahead: Vec::new() }
}

fn done(seq: i64) -> Settlement {
    Settlement { seq, what: Leave::Done, attempts: 0, history: Vec::new(), next: None }
}

fn seqs(entry: &Move) -> Vec<i64> {
    entry.settlements.iter().map(|settlement| settlement.seq).collect()
}

#[test]
fn what_was_delivered_is_due_at_once_and_the_rest_later() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(0), Vec::new(), false);
    cursors.moved(&owner(2), cursor(0), Vec::new(), true);
    cursors.moved(&owner(3), cursor(0), vec![done(1)], false);
    let (due, _) = cursors.take(Instant::now());
    let mut subscriptions: Vec<i64> = due.iter().map(|entry| entry.owner.subscription).collect();
    subscriptions.sort_unstable();
    assert_eq!(subscriptions, [2, 3]);
    assert!(cursors.take(Instant::now()).0.is_empty());
    assert_eq!(cursors.take(Instant::now() + IDLE_EVERY).0.len(), 1);
}

#[test]
fn a_later_move_replaces_an_earlier_cursor_and_settles_in_order() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], true);
    cursors.moved(&owner(1), cursor(2), vec![done(2)], false);
    let (due, _) = cursors.take(Instant::now());
    assert_eq!((due.len(), due[0].cursor.acked, seqs(&due[0])), (1, 2, vec![1, 2]));
}

#[test]
fn what_could_not_be_stored_comes_before_what_came_since() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], true);
    cursors.moved(&owner(2), cursor(1), vec![done(9)], true);
    let (failed, _) = cursors.take(Instant::now());
    cursors.moved(&owner(1), cursor(2), vec![done(2)], true);
    cursors.put_back(failed, Instant::now());
    let (due, _) = cursors.take(Instant::now());
    let first = due.iter().find(|entry| entry.owner.subscription == 1).unwrap();
    assert_eq!((due.len(), first.cursor.acked, seqs(first)), (2, 2, vec![1, 2]));
}

#[test]
fn what_an_earlier_owner_left_is_void() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], true);
    let (failed, _) = cursors.take(Instant::now());
    let later = Owner { token: 2, ..owner(1) };
    cursors.moved(&later, cursor(2), vec![done(2)], true);
    cursors.put_back(failed, Instant::now());
    cursors.moved(&Owner { token: 3, ..owner(1) }, cursor(3), vec![done(3)], true);
    let (due, _) = cursors.take(Instant::now());
    assert_eq!((due.len(), due[0].cursor.acked, seqs(&due[0])), (1, 3, vec![3]));
}

#[test]
fn only_the_refused_are_fenced() {
    let cursors = Cursors::default();
    for subscription in [1, 2] {
        cursors.moved(&owner(subscription), cursor(1), Vec::new(), true);
    }
    let (moves, _) = cursors.take(Instant::now());
    refuse(&moves, &[2]);
    assert!(!moves[0].owner.fenced.is_cancelled() && moves[1].owner.fenced.is_cancelled());
}

#[test]
fn what_is_delivered_and_not_stored_is_known() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), Vec::new(), false);
    assert!(!cursors.has_unstored(), "nothing for it came by");
    cursors.moved(&owner(1), cursor(2), Vec::new(), true);
    assert!(cursors.has_unstored());
    let (moves, barriers) = cursors.take(Instant::now());
    assert!(cursors.has_unstored(), "it is under way");
    cursors.put_back(moves, Instant::now());
    assert!(cursors.has_unstored());
    let (_, _) = cursors.take(Instant::now());
    cursors.settled(barriers);
    assert!(!cursors.has_unstored());
}
