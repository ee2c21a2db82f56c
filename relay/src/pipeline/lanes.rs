// SPDX-License-Identifier: PostgreSQL
//! Who may go next: the events of one key one after the other, everything else side by side.

use std::collections::{HashMap, VecDeque};

use bytestring::ByteString;
use dtm_core::options::Ordering;

/// Events on their way to the sink. `T` is an event.
///
/// A key is busy from the moment its event is added until that event is [`finished`](Lanes::finished): also while it waits
/// to be sent again.
#[derive(Debug)]
pub struct Lanes<T> {
    ordering: Ordering,
    max_in_flight: usize,
    in_flight: usize,
    /// May go out as soon as there is room.
    ready: VecDeque<T>,
    /// Busy keys, and what waits behind each.
    busy: HashMap<ByteString, VecDeque<T>>,
}

impl<T> Lanes<T> {
    /// No events yet.
    pub fn new(ordering: Ordering, max_in_flight: u32) -> Self {
        let (ready, busy) = (VecDeque::new(), HashMap::new());
        Lanes { ordering, max_in_flight: max_in_flight as usize, in_flight: 0, ready, busy }
    }

    /// Adds an event behind all others of its key.
    pub fn push(&mut self, key: Option<&ByteString>, event: T) {
        match self.lane(key) {
            None => self.ready.push_back(event),
            Some(key) => match self.busy.get_mut(key) {
                Some(waiting) => waiting.push_back(event),
                None => {
                    // A copy: a slice of its page would keep that in memory for as long as the key is busy.
                    self.busy.insert(ByteString::from(&**key), VecDeque::new());
                    self.ready.push_back(event);
                }
            },
        }
    }

    /// The next event that may be sent now.
    pub fn take(&mut self) -> Option<T> {
        if self.in_flight >= self.max_in_flight {
            return None;
        }
        let event = self.ready.pop_front()?;
        self.in_flight += 1;
        Some(event)
    }

    /// An event that was sent has come to its end: the next one of its key may go.
    pub fn finished(&mut self, key: Option<&ByteString>) {
        self.in_flight -= 1;
        let Some(key) = self.lane(key) else { return };
        match self.busy.get_mut(key).map(VecDeque::pop_front) {
            Some(Some(event)) => self.ready.push_back(event),
            Some(None) => {
                self.busy.remove(key);
            }
            None => {}
        }
    }

    /// An event that was sent has to be sent again later: others may go, those of its key may not.
    pub fn set_aside(&mut self) {
        self.in_flight -= 1;
    }

    /// An event that was set aside may go again.
    pub fn again(&mut self, event: T) {
        self.ready.push_back(event);
    }

    fn lane<'a>(&self, key: Option<&'a ByteString>) -> Option<&'a ByteString> {
        key.filter(|_| self.ordering == Ordering::Key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Item = (Option<ByteString>, u32);

    fn push(lanes: &mut Lanes<Item>, key: Option<&str>, n: u32) {
        let key = key.map(ByteString::from);
        lanes.push(key.clone().as_ref(), (key, n));
    }

    fn drain(lanes: &mut Lanes<Item>) -> Vec<u32> {
        std::iter::from_fn(|| lanes.take().map(|(_, n)| n)).collect()
    }

    #[test]
    fn a_key_goes_one_by_one_and_the_rest_side_by_side() {
        let mut lanes = Lanes::new(Ordering::Key, 10);
        for (key, n) in [(Some("a"), 1), (Some("a"), 2), (None, 3), (Some("b"), 4), (None, 5)] {
            push(&mut lanes, key, n);
        }
        assert_eq!(drain(&mut lanes), [1, 3, 4, 5]);
        lanes.set_aside();
        assert!(drain(&mut lanes).is_empty(), "what is set aside keeps its key busy");
        lanes.again((Some("a".into()), 1));
        assert_eq!(drain(&mut lanes), [1]);
        lanes.finished(Some(&"a".into()));
        assert_eq!(drain(&mut lanes), [2]);
        lanes.finished(Some(&"a".into()));
        assert!(!lanes.busy.contains_key("a"), "an idle key costs nothing");
    }

    #[test]
    fn without_order_keys_do_not_matter() {
        let mut lanes = Lanes::new(Ordering::None, 2);
        (1..=3).for_each(|n| push(&mut lanes, Some("a"), n));
        assert_eq!(drain(&mut lanes), [1, 2], "only so many at once");
        lanes.finished(Some(&"a".into()));
        assert_eq!(drain(&mut lanes), [3]);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Push(Option<u8>),
        Send,
        End(prop::sample::Index, bool),
        Again(prop::sample::Index),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let index = any::<prop::sample::Index>;
        let act = prop_oneof![
            3 => prop::option::of(0..4_u8).prop_map(Act::Push),
            4 => Just(Act::Send),
            4 => (index(), any::<bool>()).prop_map(|(i, delivered)| Act::End(i, delivered)),
            2 => index().prop_map(Act::Again),
        ];
        prop::collection::vec(act, 0..400)
    }

    proptest! {
        #[test]
        fn no_event_is_lost_and_none_overtakes_on_its_key(acts in acts(), limit in 1..5_u32) {
            let mut lanes = Lanes::<Item>::new(Ordering::Key, limit);
            let (mut sent, mut aside, mut delivered) = (Vec::<Item>::new(), Vec::<Item>::new(), Vec::<Item>::new());
            let mut pushed = 0;
            for act in acts {
                match act {
                    Act::Push(key) => {
                        pushed += 1;
                        push(&mut lanes, key.map(|key| key.to_string()).as_deref(), pushed);
                    }
                    Act::Send => sent.extend(lanes.take()),
                    Act::End(which, success) if !sent.is_empty() => {
                        let item = sent.swap_remove(which.index(sent.len()));
                        if success {
                            lanes.finished(item.0.as_ref());
                            delivered.push(item);
                        } else {
                            lanes.set_aside();
                            aside.push(item);
                        }
                    }
                    Act::Again(which) if !aside.is_empty() => {
                        lanes.again(aside.swap_remove(which.index(aside.len())));
                    }
                    Act::End(..) | Act::Again(_) => {}
                }
                prop_assert!(sent.len() <= limit as usize);
                let mut keys: Vec<_> = sent.iter().chain(&aside).filter_map(|(key, _)| key.as_ref()).collect();
                keys.sort();
                prop_assert!(keys.windows(2).all(|pair| pair[0] != pair[1]), "two of one key are under way");
            }
            aside.into_iter().for_each(|item| lanes.again(item));
            loop {
                sent.extend(lanes.take());
                let Some(item) = sent.pop() else { break };
                lanes.finished(item.0.as_ref());
                delivered.push(item);
            }
            prop_assert_eq!(delivered.len(), pushed as usize);
            prop_assert!(lanes.busy.is_empty());
            for key in 0..4_u8 {
                let of_key = delivered.iter().filter(|(k, _)| k.as_deref() == Some(&key.to_string()));
                prop_assert!(of_key.is_sorted_by_key(|(_, n)| n), "key {} out of order", key);
            }
        }
    }
}
