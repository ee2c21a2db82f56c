// SPDX-License-Identifier: PostgreSQL
//! Which moves are stored, when, and what becomes of those that are refused.

use dtm_core::position::Position;

use super::*;

fn mark() -> Arc<Mark> {
    Mark::new(Position::start_of_era(1))
}

fn owner(subscription: i64) -> Owner {
    Owner { subscription, shard: 0, epoch: 1, token: 1, fenced: CancellationToken::new() }
}

fn cursor(position: &Arc<Mark>, target: Option<&Arc<Mark>>) -> Cursor {
    Cursor { position: position.clone(), target: target.cloned(), acked: 0 }
}

#[test]
fn what_was_delivered_is_due_at_once_and_the_rest_later() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(&mark(), None), false);
    cursors.moved(&owner(2), cursor(&mark(), None), true);
    let (due, _) = cursors.take(Instant::now());
    assert_eq!(due.iter().map(|entry| entry.owner.subscription).collect::<Vec<_>>(), [2]);
    assert!(cursors.take(Instant::now()).0.is_empty());
    assert_eq!(cursors.take(Instant::now() + IDLE_EVERY).0.len(), 1);
}

#[test]
fn a_later_move_replaces_an_earlier_one_and_does_not_put_it_off() {
    let cursors = Cursors::default();
    let newest = mark();
    cursors.moved(&owner(1), cursor(&mark(), None), true);
    cursors.moved(&owner(1), cursor(&newest, None), false);
    let (due, _) = cursors.take(Instant::now());
    assert_eq!(due.len(), 1);
    assert!(Arc::ptr_eq(&due[0].cursor.position, &newest));
}

#[test]
fn what_could_not_be_stored_is_due_again_and_never_replaces_a_newer_move() {
    let cursors = Cursors::default();
    let (older, newest) = (mark(), mark());
    cursors.moved(&owner(1), cursor(&older, None), true);
    cursors.moved(&owner(2), cursor(&older, None), true);
    let (taken, _) = cursors.take(Instant::now());
    assert_eq!(taken.len(), 2);
    cursors.moved(&owner(1), cursor(&newest, None), false);
    cursors.put_back(taken, Instant::now());
    let (mut again, _) = cursors.take(Instant::now());
    again.sort_by_key(|entry| entry.owner.subscription);
    assert_eq!(again.len(), 2);
    assert!(Arc::ptr_eq(&again[0].cursor.position, &newest), "and the newer one is not put off");
    assert!(Arc::ptr_eq(&again[1].cursor.position, &older));
}

#[test]
fn a_barrier_is_passed_only_by_what_is_stored() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(&mark(), None), false);
    cursors.lock().barriers += 1;
    let (taken, barriers) = cursors.take(Instant::now());
    cursors.put_back(taken, Instant::now());
    assert_eq!((barriers, *cursors.passed.borrow()), (1, 0));
    let (taken, barriers) = cursors.take(Instant::now());
    assert_eq!(taken.len(), 1, "somebody waits for it still");
    cursors.settled(barriers);
    assert_eq!(*cursors.passed.borrow(), 1);
}

#[test]
fn deliveries_are_unstored_until_the_database_has_answered() {
    let cursors = Cursors::default();
    cursors.moved(&owner(1), cursor(&mark(), None), false);
    assert!(!cursors.has_unstored(), "no event is covered");
    cursors.moved(&owner(1), cursor(&mark(), None), true);
    assert!(cursors.has_unstored());
    let (taken, barriers) = cursors.take(Instant::now());
    assert!(cursors.has_unstored(), "on its way");
    cursors.put_back(taken, Instant::now());
    assert!(cursors.has_unstored(), "put back");
    cursors.take(Instant::now());
    cursors.settled(barriers);
    assert!(!cursors.has_unstored());
}

#[test]
fn a_position_is_stored_once_for_all_that_stand_at_it() {
    let (shared, target) = (mark(), mark());
    let owners = [owner(1), owner(2), owner(3)];
    let targets = [None, Some(&target), Some(&shared)];
    let moves: Vec<Move> = std::iter::zip(&owners, targets)
        .map(|(owner, target)| Move {
            owner: owner.clone(),
            cursor: cursor(&shared, target),
            due: Instant::now(),
            delivered: true,
        })
        .collect();
    let batch = Batch::of(&moves);
    assert_eq!(batch.positions, [-1, -1, -1]);
    assert_eq!(batch.targets, [None, Some(-2), Some(-1)]);
    batch.stored(vec![70, 71]).unwrap();
    let again = Batch::of(&moves);
    assert_eq!((again.new_positions.len(), again.positions), (0, vec![70, 70, 70]));
    assert_eq!(again.targets, [None, Some(71), Some(70)]);
    assert!(batch.stored(vec![1]).is_err());
}

#[test]
fn only_the_refused_are_fenced() {
    let moves: Vec<Move> = [1, 2]
        .map(|id| {
            let (owner, cursor) = (owner(id), cursor(&mark(), None));
            Move { owner, cursor, due: Instant::now(), delivered: true }
        })
        .into();
    refuse(&moves, vec![2]);
    assert!(!moves[0].owner.fenced.is_cancelled() && moves[1].owner.fenced.is_cancelled());
}
