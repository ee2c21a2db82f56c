// SPDX-License-Identifier: PostgreSQL

use dtm_core::position::Position;
use futures_util::FutureExt as _;

use super::super::settlement::Leave;
use super::*;

fn mark() -> Arc<Mark> {
    Mark::new(Position::start_of_era(1))
}

fn owner(subscription: i64) -> Owner {
    Owner { subscription, shard: 0, epoch: 1, token: 1, fenced: CancellationToken::new() }
}

fn cursor(acked: i64) -> Cursor {
    Cursor { position: mark(), target: None, acked, ahead: Vec::new(), windows: Vec::new() }
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
    cursors.moved(&owner(1), cursor(0), Vec::new(), 0);
    cursors.moved(&owner(2), cursor(0), Vec::new(), 1);
    cursors.moved(&owner(3), cursor(0), vec![done(1)], 0);
    let due = cursors.take(Instant::now());
    let mut subscriptions: Vec<i64> = due.iter().map(|entry| entry.owner.subscription).collect();
    subscriptions.sort_unstable();
    assert_eq!(subscriptions, [2, 3]);
    assert!(cursors.take(Instant::now()).is_empty());
    assert_eq!(cursors.take(Instant::now() + IDLE_EVERY).len(), 1);
}

#[test]
fn a_later_move_replaces_an_earlier_cursor_and_settles_in_order() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], 1);
    cursors.moved(&owner(1), cursor(2), vec![done(2)], 0);
    let due = cursors.take(Instant::now());
    assert_eq!((due.len(), due[0].cursor.acked, seqs(&due[0])), (1, 2, vec![1, 2]));
}

#[test]
fn what_could_not_be_stored_comes_before_what_came_since() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], 1);
    cursors.moved(&owner(2), cursor(1), vec![done(9)], 1);
    let failed = cursors.take(Instant::now());
    cursors.moved(&owner(1), cursor(2), vec![done(2)], 1);
    cursors.ended(failed, Instant::now());
    let due = cursors.take(Instant::now());
    let first = due.iter().find(|entry| entry.owner.subscription == 1).unwrap();
    assert_eq!((due.len(), first.cursor.acked, seqs(first)), (2, 2, vec![1, 2]));
}

#[test]
fn what_an_earlier_owner_left_is_void() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), vec![done(1)], 1);
    let failed = cursors.take(Instant::now());
    let later = Owner { token: 2, ..owner(1) };
    cursors.moved(&later, cursor(2), vec![done(2)], 1);
    cursors.ended(failed, Instant::now());
    cursors.moved(&Owner { token: 3, ..owner(1) }, cursor(3), vec![done(3)], 1);
    let due = cursors.take(Instant::now());
    assert_eq!((due.len(), due[0].cursor.acked, seqs(&due[0])), (1, 3, vec![3]));
}

#[test]
fn only_the_refused_are_fenced() {
    let cursors = Cursors::default();
    for subscription in [1, 2] {
        cursors.moved(&owner(subscription), cursor(1), Vec::new(), 1);
    }
    let moves = cursors.take(Instant::now());
    refuse(&moves, &[2]);
    assert!(!moves[0].owner.fenced.is_cancelled() && moves[1].owner.fenced.is_cancelled());
}

#[test]
fn what_is_delivered_and_not_stored_is_known() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(1), Vec::new(), 0);
    assert!(!cursors.has_unstored(), "nothing for it came by");
    cursors.moved(&owner(1), cursor(2), Vec::new(), 1);
    assert!(cursors.has_unstored());
    let moves = cursors.take(Instant::now());
    assert!(cursors.has_unstored(), "it is under way");
    cursors.ended(moves, Instant::now());
    assert!(cursors.has_unstored());
    cursors.take(Instant::now());
    cursors.ended(Vec::new(), Instant::now());
    assert!(!cursors.has_unstored());
}

#[tokio::test]
async fn a_barrier_waits_for_its_own_moves_and_for_no_others() {
    let cursors = Cursors::default();
    let is_passed = async |owner: &Owner| cursors.barrier(owner).now_or_never().is_some();
    cursors.moved(&owner(1), cursor(1), Vec::new(), 0);
    cursors.moved(&owner(2), cursor(1), Vec::new(), 1);
    assert!(is_passed(&owner(3)).await && !is_passed(&owner(1)).await);
    let taken = cursors.take(Instant::now());
    assert_eq!(taken.len(), 2, "a barrier makes its move due");
    cursors.moved(&owner(1), cursor(2), Vec::new(), 1);
    let (busy, stored): (Vec<Move>, Vec<Move>) =
        taken.into_iter().partition(|entry| entry.owner.subscription == 2);
    drop(stored);
    cursors.ended(busy, Instant::now());
    assert!(!is_passed(&owner(2)).await, "somebody works on its subscription");
    assert!(!is_passed(&owner(1)).await, "what came since was left before this barrier");
    cursors.take(Instant::now());
    cursors.ended(Vec::new(), Instant::now());
    assert!(is_passed(&owner(1)).await && is_passed(&owner(2)).await);
}
