// SPDX-License-Identifier: PostgreSQL
//! What was committed and what was not, against what arrived.

use std::collections::{HashMap, HashSet};

use crate::receiver::Received;

/// The truth about what was published, kept by who published it.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Ids that were committed, by key (empty: none), in the order of the commits.
    pub committed: HashMap<String, Vec<String>>,
    /// Ids of transactions that were rolled back.
    pub rolled_back: HashSet<String>,
    /// Ids of transactions whose COMMIT got no answer: either may be true, but not half of one transaction.
    pub unknown: Vec<Vec<String>>,
}

/// What a ledger and a receiver's notes say together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Committed and never accepted.
    pub lost: Vec<String>,
    /// Accepted and not committed.
    pub phantoms: Vec<String>,
    /// Accepted again.
    pub duplicates: usize,
    /// Keys whose first arrivals came in another order than they were committed in.
    pub disordered: Vec<String>,
    /// Accepted, each counted once.
    pub delivered: usize,
}

impl Ledger {
    /// Takes note of a commit.
    pub fn commit(&mut self, key: &str, ids: impl IntoIterator<Item = String>) {
        self.committed.entry(key.to_owned()).or_default().extend(ids);
    }

    /// Takes note of a rollback.
    pub fn roll_back(&mut self, ids: impl IntoIterator<Item = String>) {
        self.rolled_back.extend(ids);
    }

    /// How many events were committed for certain.
    pub fn committed_count(&self) -> usize {
        self.committed.values().map(Vec::len).sum()
    }

    /// Adds what another writer has noted; keys are theirs alone or none.
    pub fn merge(&mut self, other: Ledger) {
        for (key, ids) in other.committed {
            self.commit(&key, ids);
        }
        self.rolled_back.extend(other.rolled_back);
        self.unknown.extend(other.unknown);
    }

    /// Whether every committed id is among those accepted.
    pub fn is_complete(&self, received: &[Received]) -> bool {
        let arrived: HashSet<&str> = received.iter().filter(|r| r.accepted).map(Received::id).collect();
        self.committed.values().flatten().all(|id| arrived.contains(id.as_str()))
    }

    /// Holds what arrived against what was committed.
    pub fn verdict(&self, received: &[Received]) -> Verdict {
        let mut first_arrival: HashMap<&str, usize> = HashMap::new();
        let mut verdict = Verdict::default();
        for (at, request) in received.iter().enumerate().filter(|(_, request)| request.accepted) {
            if first_arrival.contains_key(request.id()) {
                verdict.duplicates += 1;
            } else {
                first_arrival.insert(request.id(), at);
            }
        }
        verdict.delivered = first_arrival.len();
        for (key, ids) in &self.committed {
            let arrivals: Vec<usize> =
                ids.iter().filter_map(|id| first_arrival.get(id.as_str()).copied()).collect();
            if !key.is_empty() && !arrivals.is_sorted() {
                verdict.disordered.push(key.clone());
            }
            verdict.lost.extend(ids.iter().filter(|id| !first_arrival.contains_key(id.as_str())).cloned());
        }
        let committed: HashSet<&str> = self.committed.values().flatten().map(String::as_str).collect();
        let unknown: HashSet<&str> = self.unknown.iter().flatten().map(String::as_str).collect();
        let known = |id: &&str| committed.contains(*id) || unknown.contains(*id);
        verdict.phantoms = first_arrival.keys().filter(|id| !known(id)).map(|id| (*id).to_owned()).collect();
        for transaction in &self.unknown {
            let arrived = transaction.iter().filter(|id| first_arrival.contains_key(id.as_str())).count();
            if arrived != 0 && arrived != transaction.len() {
                verdict.lost.extend(
                    transaction.iter().filter(|id| !first_arrival.contains_key(id.as_str())).cloned(),
                );
            }
        }
        verdict
    }

    /// Panics unless everything arrived, nothing else did, and every key's order held. Answers the verdict.
    pub fn assert_kept(&self, received: &[Received]) -> Verdict {
        let verdict = self.verdict(received);
        assert!(
            verdict.lost.is_empty(),
            "{} lost, such as {:?}",
            verdict.lost.len(),
            &verdict.lost[..verdict.lost.len().min(3)]
        );
        assert!(verdict.phantoms.is_empty(), "delivered and not committed: {:?}", verdict.phantoms);
        assert!(verdict.disordered.is_empty(), "order broken for keys {:?}", verdict.disordered);
        verdict
    }
}
