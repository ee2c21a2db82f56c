// SPDX-License-Identifier: PostgreSQL
//! The end of the log, read once for all pipelines that stand there.
//!
//! Whoever reads the head reads the window up to it too, if a pipeline waits for it, and sorts its events by who wants them:
//! by a tree of patterns, not by going through all subscriptions. A pipeline takes the window from here if it begins where
//! the pipeline stands, and reads the log for itself if not.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dtm_core::page::Event;
use dtm_core::shard::shard_of;
use dtm_core::topic::Matcher;
use tokio_postgres::Statement;

use super::error::SourceError;
use super::link::Link;
use super::mark::Mark;
use super::pages::{PageRequest, Unit, Wanted, read_page};

/// Windows that are kept: a pipeline that is a little behind finds them still.
const WINDOWS: usize = 32;
/// What a window may have at the most. A larger one is read piece by piece by each pipeline.
const WINDOW_EVENTS: i32 = 500;
const WINDOW_BYTES: i32 = 128 * 1024;
/// More patterns than these are not told to the database: it reads everything then.
const PATTERNS_MAX: usize = 64;

/// The events of one window for one pipeline.
#[derive(Debug)]
pub struct Share {
    /// The window's end.
    pub to: Arc<Mark>,
    /// The events, in their order.
    pub events: Vec<Event>,
    /// Their size, about.
    pub bytes: usize,
}

/// What all pipelines want.
struct Wants {
    since: HashMap<Unit, Option<SystemTime>>,
    matcher: Matcher<Unit>,
    patterns: Vec<String>,
}

struct Window {
    from: Arc<Mark>,
    to: Arc<Mark>,
    wants: Arc<Wants>,
    events: HashMap<Unit, Vec<Event>>,
    /// Of the page that they are slices of.
    bytes: usize,
}

#[derive(Default)]
struct State {
    wants: Option<Arc<Wants>>,
    windows: VecDeque<Window>,
    /// Pipelines that stand at the head and wait for the next.
    waiting: HashSet<Unit>,
}

/// The end of the log.
#[derive(Default)]
pub struct Tail {
    state: Mutex<State>,
}

impl Tail {
    /// From now on these pipelines are served.
    pub fn serve(&self, wanted: impl Iterator<Item = Wanted>) {
        let mut wants = Wants { since: HashMap::new(), matcher: Matcher::default(), patterns: Vec::new() };
        for Wanted { unit, topics, since } in wanted {
            // What is malformed is said by the pipeline, which reads for itself and fails.
            if topics.iter().all(|topic| wants.matcher.insert(topic, unit).is_ok()) {
                wants.since.insert(unit, since);
                wants.patterns.extend(topics);
            }
        }
        wants.patterns.sort_unstable();
        wants.patterns.dedup();
        if wants.patterns.len() > PATTERNS_MAX {
            wants.patterns = [">", "dtm.>"].map(str::to_owned).into();
        }
        let mut state = self.state();
        state.wants = Some(Arc::new(wants));
        // What was sorted for a subscription as it was before is of no use to it any more.
        state.windows.clear();
    }

    /// A pipeline stands at the head and has nothing to read.
    pub fn waits(&self, unit: Unit) {
        self.state().waiting.insert(unit);
    }

    /// The window that begins at a position, if it is here and was sorted for this pipeline.
    pub fn after(&self, from: &Arc<Mark>, unit: Unit) -> Option<Share> {
        let state = self.state();
        let window = state.windows.iter().rev().find(|window| Arc::ptr_eq(&window.from, from))?;
        let since = *window.wants.since.get(&unit)?;
        let is_wanted = |event: &&Event| since.is_none_or(|since| published_at(event) >= since);
        let all = window.events.get(&unit).into_iter().flatten();
        let mut events: Vec<Event> = all.filter(is_wanted).cloned().collect();
        let mut bytes = events.iter().map(Event::size).sum();
        // An event that waits for long keeps the whole page in memory: whoever takes little of it takes a copy.
        if bytes < window.bytes / 2 {
            events = events.iter().map(Event::detached).collect();
        } else {
            bytes = window.bytes;
        }
        Some(Share { to: window.to.clone(), events, bytes })
    }

    /// Reads the window up to a new head, if a pipeline waits for it.
    pub(super) async fn read(
        &self,
        link: &Link,
        page: &Statement,
        from: &Arc<Mark>,
        to: &Arc<Mark>,
    ) -> Result<(), SourceError> {
        let wants = {
            let mut state = self.state();
            let someone = !std::mem::take(&mut state.waiting).is_empty();
            state.wants.clone().filter(|_| someone)
        };
        let Some(wants) = wants.filter(|wants| !wants.since.is_empty()) else { return Ok(()) };
        let request = PageRequest {
            from: from.clone(),
            to: to.clone(),
            after: 0,
            max_rows: WINDOW_EVENTS,
            max_bytes: WINDOW_BYTES,
        };
        let unit = Unit { subscription: 0, shard: 0, shards: 1 };
        let wanted = Wanted { unit, topics: wants.patterns.clone(), since: None };
        let (page, bytes) = match read_page(link, page, &request, &wanted).await {
            Ok(read) => read,
            // The pipelines read it for themselves, and say what is wrong.
            Err(error) if error.spares_connection() => return Ok(()),
            Err(error) => return Err(error),
        };
        if page.done {
            let events = sort(page.events, &wants);
            let mut state = self.state();
            if !state.wants.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, &wants)) {
                return Ok(());
            }
            if state.windows.len() >= WINDOWS {
                state.windows.pop_front();
            }
            state.windows.push_back(Window { from: from.clone(), to: to.clone(), wants, events, bytes });
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sort(events: Vec<Event>, wants: &Wants) -> HashMap<Unit, Vec<Event>> {
    let mut sorted: HashMap<Unit, Vec<Event>> = HashMap::new();
    for event in events {
        for unit in wants.matcher.matches(&event.topic) {
            let key = event.key.as_deref().map(str::as_bytes);
            let events = sorted.entry(*unit).or_default();
            let is_new = events.last().is_none_or(|last| last.seq != event.seq);
            // Several patterns of one subscription can match.
            if is_new && shard_of(key, event.seq, unit.shards) == unit.shard {
                events.push(event.clone());
            }
        }
    }
    sorted
}

fn published_at(event: &Event) -> SystemTime {
    let us = event.published_at_us;
    let since_epoch = Duration::from_micros(us.unsigned_abs());
    if us < 0 { SystemTime::UNIX_EPOCH - since_epoch } else { SystemTime::UNIX_EPOCH + since_epoch }
}

#[cfg(test)]
mod tests {
    use dtm_core::position::Position;
    use uuid::Uuid;

    use super::*;

    fn unit(subscription: i64) -> Unit {
        Unit { subscription, shard: 0, shards: 1 }
    }

    fn event(seq: i64, topic: &str, published_at_us: i64) -> Event {
        Event {
            seq,
            published_at_us,
            id: Uuid::from_u128(seq as u128),
            topic: topic.into(),
            key: Some(format!("k{seq}").into()),
            content_type: "x".into(),
            headers: None,
            payload: None,
        }
    }

    fn window(tail: &Tail, from: &Arc<Mark>, to: &Arc<Mark>, events: Vec<Event>) {
        let wants = tail.state().wants.clone().unwrap();
        let events = sort(events, &wants);
        let (from, to) = (from.clone(), to.clone());
        tail.state().windows.push_back(Window { from, to, wants, events, bytes: 1_000 });
    }

    fn seqs(share: Option<Share>) -> Option<Vec<i64>> {
        share.map(|share| share.events.iter().map(|event| event.seq).collect())
    }

    #[test]
    fn each_pipeline_gets_what_it_wants_once_and_a_new_one_reads_for_itself() {
        let (from, to) = (Mark::new(Position::start_of_era(1)), Mark::new(Position::start_of_era(1)));
        let tail = Tail::default();
        let wanted = |subscription: i64, topics: &[&str], since: Option<u64>| Wanted {
            unit: unit(subscription),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            since: since.map(|us| SystemTime::UNIX_EPOCH + Duration::from_micros(us)),
        };
        tail.serve([wanted(1, &["a.*", ">"], None), wanted(2, &["b"], Some(50))].into_iter());
        window(&tail, &from, &to, vec![event(5, "a.b", 10), event(6, "b", 49), event(7, "b", 50)]);
        assert_eq!(seqs(tail.after(&from, unit(1))), Some(vec![5, 6, 7]));
        assert_eq!(seqs(tail.after(&from, unit(2))), Some(vec![7]));
        assert_eq!(seqs(tail.after(&from, unit(3))), None, "nobody sorted for it");
        assert_eq!(seqs(tail.after(&to, unit(1))), None, "no window begins there");
        tail.serve([wanted(1, &["c"], None)].into_iter());
        assert_eq!(seqs(tail.after(&from, unit(1))), None, "it was sorted for what was wanted before");
    }

    #[test]
    fn shards_share_the_events_of_a_subscription() {
        let (from, to) = (Mark::new(Position::start_of_era(1)), Mark::new(Position::start_of_era(1)));
        let tail = Tail::default();
        let shard = |shard| Unit { subscription: 1, shard, shards: 3 };
        tail.serve((0..3).map(|n| Wanted { unit: shard(n), topics: vec![">".into()], since: None }));
        window(&tail, &from, &to, (1..=100).map(|seq| event(seq, "t", 0)).collect());
        let mut all: Vec<i64> = (0..3).flat_map(|n| seqs(tail.after(&from, shard(n))).unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, (1..=100).collect::<Vec<_>>());
    }
}
