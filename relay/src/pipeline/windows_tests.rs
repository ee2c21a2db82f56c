// SPDX-License-Identifier: PostgreSQL

use proptest::prelude::*;

use super::*;

type Plain<M> = Progress<M, (), char>;

fn progress<M: Clone>(position: M) -> Plain<M> {
    Progress::new(position, Ahead::delivered([]))
}

/// One more event, which nobody has settled yet.
fn push<M: Clone>(progress: &mut Plain<M>, seq: i64) -> Ticket {
    progress.push(seq, ()).expect("it is not settled yet")
}

fn at<M: Clone>(progress: &mut Plain<M>) -> (M, Option<M>, i64) {
    progress.advance(&mut Vec::new());
    let Frontier { position, target, acked, .. } = progress.frontier();
    (position, target, acked)
}

#[test]
fn the_frontier_moves_in_order_whatever_the_order_of_acknowledgement() {
    let mut progress = progress('a');
    progress.open('b', None);
    let tickets: Vec<Ticket> = [5, 6, 9].map(|seq| push(&mut progress, seq)).into();
    progress.scanned(9, true);
    progress.open('c', None);
    let later = push(&mut progress, 7);
    progress.scanned(7, true);
    progress.ack(later);
    progress.ack(tickets[1]);
    assert_eq!(at(&mut progress), ('a', None, 0), "the first event is still out");
    progress.ack(tickets[0]);
    assert_eq!(at(&mut progress), ('a', Some('b'), 6));
    progress.ack(tickets[2]);
    assert_eq!(at(&mut progress), ('c', None, 0), "the second window was done before");
    assert_eq!((progress.held(), progress.frontier().covered), (0, 4));
}

#[test]
fn what_leaves_is_told_when_the_frontier_passes_it_and_not_before() {
    let mut progress = progress('a');
    progress.open('b', None);
    let tickets: Vec<Ticket> = [5, 6].map(|seq| push(&mut progress, seq)).into();
    progress.scanned(6, true);
    let mut left = Vec::new();
    progress.leave(tickets[1], 'x');
    assert_eq!(progress.advance(&mut left).map(|(ticket, seq, ())| (ticket, seq)), Some((tickets[0], 5)));
    assert!(left.is_empty());
    progress.ack(tickets[0]);
    assert!(progress.advance(&mut left).is_none());
    assert_eq!((left, at(&mut progress)), (vec!['x'], ('b', None, 0)));
}

#[test]
fn what_is_settled_beyond_the_frontier_stays_so_when_it_is_read_again() {
    let mut progress = progress('a');
    progress.open('b', None);
    let tickets: Vec<Ticket> = [5, 6, 7, 8].map(|seq| push(&mut progress, seq)).into();
    progress.ack(tickets[0]);
    progress.ack(tickets[2]);
    progress.leave(tickets[3], 'x');
    assert_eq!(at(&mut progress), ('a', Some('b'), 5));
    assert_eq!(progress.delivered_ahead(), [7]);
    let mut again = Progress::new('a', progress.into_ahead());
    again.resume('b', None, 5);
    let ticket = push(&mut again, 6);
    assert_eq!(again.delivered_ahead(), [7], "also before it is read");
    assert_eq!((again.push(7, ()), again.push(8, ())), (None, None));
    again.scanned(8, true);
    again.ack(ticket);
    let mut left = Vec::new();
    again.advance(&mut left);
    assert_eq!((left, at(&mut again)), (vec!['x'], ('b', None, 0)));
}

#[test]
fn stretches_in_which_nothing_matches_move_the_frontier_too() {
    let mut progress = progress('a');
    progress.open('b', None);
    progress.scanned(50_000, false);
    assert_eq!(at(&mut progress), ('a', Some('b'), 50_000));
    let ticket = push(&mut progress, 60_000);
    progress.scanned(100_000, false);
    progress.scanned(150_000, false);
    assert_eq!(progress.held(), 2, "one stretch behind the event");
    progress.ack(ticket);
    assert_eq!(at(&mut progress), ('a', Some('b'), 150_000));
    progress.scanned(150_000, true);
    assert_eq!(at(&mut progress), ('b', None, 0));
}

#[test]
fn a_window_goes_on_where_it_was_left() {
    let mut progress = progress('a');
    progress.resume('b', None, 41);
    assert_eq!(at(&mut progress), ('a', Some('b'), 41));
    progress.scanned(41, true);
    assert_eq!(at(&mut progress), ('b', None, 0));
}

#[test]
fn behind_the_last_window_of_an_era_the_next_one_begins() {
    let mut progress = progress('a');
    progress.open('z', Some('A'));
    progress.scanned(9, true);
    assert_eq!(at(&mut progress), ('A', None, 0));
}

#[test]
fn empty_windows_do_not_pile_up_behind_a_slow_event() {
    let mut progress = progress(0);
    progress.open(1, None);
    let slow = push(&mut progress, 5);
    progress.scanned(5, true);
    for to in 2..1_000 {
        progress.open(to, None);
        progress.scanned(5, true);
    }
    assert_eq!(progress.windows.len(), 2);
    progress.open(1_000, None);
    let ticket = push(&mut progress, 8);
    progress.ack(slow);
    progress.ack(ticket);
    assert_eq!(
        at(&mut progress),
        (1, Some(1_000), 8),
        "events of the last window count from where the first ended"
    );
}

#[test]
fn an_empty_window_at_the_end_of_an_era_is_not_joined_with_the_next_era() {
    let mut progress = progress(0);
    progress.open(1, None);
    let slow = push(&mut progress, 5);
    progress.scanned(5, true);
    progress.open(9, Some(10));
    progress.scanned(5, true);
    progress.open(11, None);
    let next_era = push(&mut progress, 1);
    progress.ack(slow);
    progress.ack(next_era);
    assert_eq!(at(&mut progress), (10, Some(11), 1));
}

/// A log as windows of matching sequence numbers, delivered in a random order, read in pages of random sizes.
#[derive(Clone, Debug)]
enum Act {
    Read(usize),
    Ack(prop::sample::Index),
    Crash,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => (0..4_usize).prop_map(Act::Read),
        6 => any::<prop::sample::Index>().prop_map(Act::Ack),
        1 => Just(Act::Crash),
    ];
    prop::collection::vec(act, 0..300)
}

fn log() -> impl Strategy<Value = Vec<Vec<i64>>> {
    let window = prop::collection::btree_set(1..40_i64, 0..6).prop_map(|set| set.into_iter().collect());
    prop::collection::vec(window, 1..8)
}

/// The reader over a given log: window `i` leads from position `i` to `i + 1`.
struct Model<'a> {
    log: &'a [Vec<i64>],
    progress: Plain<usize>,
    window: usize,
    after: i64,
    opened: bool,
    out: Vec<(Ticket, usize, i64)>,
    delivered: Vec<Vec<i64>>,
}

impl Model<'_> {
    fn read(&mut self, rows: usize) {
        let Some(window) = self.log.get(self.window) else { return };
        if !self.opened {
            self.progress.open(self.window + 1, None);
            self.opened = true;
        }
        let left: Vec<i64> = window.iter().copied().filter(|&seq| seq > self.after).collect();
        for &seq in left.iter().take(rows) {
            self.out.push((push(&mut self.progress, seq), self.window, seq));
            self.after = seq;
        }
        let done = left.len() <= rows;
        self.progress.scanned(self.after, done);
        if done {
            (self.window, self.after, self.opened) = (self.window + 1, 0, false);
        }
    }

    fn ack(&mut self, which: &prop::sample::Index) {
        if !self.out.is_empty() {
            let (ticket, window, seq) = self.out.swap_remove(which.index(self.out.len()));
            self.delivered[window].push(seq);
            self.progress.ack(ticket);
        }
    }

    /// Nothing that the frontier covers is undelivered.
    fn check(&mut self) {
        self.progress.advance(&mut Vec::new());
        let Frontier { position, target, acked, .. } = self.progress.frontier();
        let to = target.unwrap_or(position);
        for (window, seqs) in self.log.iter().enumerate() {
            // A window that was joined with empty ones begins before its own position.
            let covered = |seq: i64| window < position || window < to && window + 1 == to && seq <= acked;
            for &seq in seqs.iter().filter(|&&seq| covered(seq)) {
                assert!(self.delivered[window].contains(&seq), "window {window} seq {seq} is lost");
            }
            assert!(window < position || window + 1 >= to || seqs.is_empty(), "a joined window had events");
        }
    }

    fn crash(&mut self) {
        let Frontier { position, target, acked, .. } = self.progress.frontier();
        self.progress = progress(position);
        self.out.clear();
        (self.window, self.after, self.opened) = (position, 0, false);
        if let Some(target) = target {
            self.progress.resume(target, None, acked);
            (self.window, self.after, self.opened) = (target - 1, acked, true);
        }
    }
}

proptest! {
    #[test]
    fn nothing_is_lost_whatever_the_order_and_the_crashes(log in log(), acts in acts()) {
        let delivered = vec![Vec::new(); log.len()];
        let progress = progress(0);
        let mut model = Model { log: &log, progress, window: 0, after: 0, opened: false, out: Vec::new(), delivered };
        for act in &acts {
            match act {
                Act::Read(rows) => model.read(*rows),
                Act::Ack(which) => model.ack(which),
                Act::Crash => model.crash(),
            }
            model.check();
        }
        while model.window < log.len() {
            model.read(3);
        }
        while let Some((ticket, window, seq)) = model.out.pop() {
            model.delivered[window].push(seq);
            model.progress.ack(ticket);
        }
        model.check();
        prop_assert_eq!(model.progress.frontier().position, log.len());
        prop_assert_eq!(model.progress.held(), 0);
    }
}
