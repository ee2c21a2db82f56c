// SPDX-License-Identifier: PostgreSQL
//! What follows from a failure: for the event, its lane and its row, by whose fault it was.

use std::time::Duration;

use dtm_core::options::OnDead;
use tokio::time::Instant;

use super::{Flow, Verdict};
use crate::calls::circuit::Blame;
use crate::calls::pace::RETRY_AFTER_MAX;
use crate::pipeline::delivery::{Delivery, LaneName, Place, Row};
use crate::pipeline::lane::{Lane, Stage};
use crate::source::settlement::{Attempt, Leave, Settlement};

/// One that is throttled alone rests for so long at the least.
const THROTTLED_FOR: Duration = Duration::from_secs(5);

impl Flow {
    pub(super) fn endpoints_fault(&mut self, delivery: Delivery, blame: Blame) -> Verdict {
        if let Some(lane) = self.lanes.get_mut(&delivery.lane) {
            lane.charges.doubted = true;
        }
        self.lanes.again(delivery);
        if blame != Blame::Opened {
            return Verdict::Waits;
        }
        // What was charged since the last success was not the events' fault.
        for name in std::mem::take(&mut self.suspects) {
            let Some(lane) = self.lanes.get_mut(&name) else { continue };
            lane.charges.suspected.clear();
            lane.charges.doubted = true;
            let attempts = lane.charges.attempts;
            if matches!(lane.stage, Stage::Resting(_)) {
                self.lanes.make_ready(&name);
            }
            self.suspect_if_over(&name, attempts);
        }
        Verdict::Down
    }

    /// Nothing is charged. But where others go through again and again, and this one does not, it is parked like a poisoned one.
    pub(super) fn throttled(
        &mut self,
        delivery: Delivery,
        retry_after: Option<Duration>,
        now: Instant,
    ) -> Verdict {
        let mut alone = false;
        if let Some(Lane { charges, .. }) = self.lanes.get_mut(&delivery.lane)
            && charges.throttled_at != self.successes
        {
            charges.throttled_at = self.successes;
            charges.throttled += 1;
            alone = charges.is_throttled();
        }
        if alone {
            let until = now + retry_after.unwrap_or(THROTTLED_FOR).clamp(THROTTLED_FOR, RETRY_AFTER_MAX);
            self.lanes.rest(delivery, until);
            return Verdict::Again(until);
        }
        self.pace.slow_down(retry_after, now);
        self.lanes.again(delivery);
        Verdict::Waits
    }

    /// A head without attempts left dies with the next success of another.
    pub(super) fn suspect_if_over(&mut self, name: &LaneName, attempts: u32) {
        if self.schedule.is_over(attempts) {
            self.suspects.insert(name.clone());
        }
    }

    pub(super) fn failed(
        &mut self,
        delivery: Delivery,
        attempt: Attempt,
        now: Instant,
        random: f64,
    ) -> Verdict {
        let works = !self.circuit.is_open() && self.circuit.vouches_against(&delivery.lane);
        let blame = self.circuit.failed(&delivery.lane, self.lanes.waiting(), now, random);
        if blame != Blame::Call {
            return self.endpoints_fault(delivery, blame);
        }
        let name = delivery.lane.clone();
        let Some(lane) = self.lanes.get_mut(&name) else { return Verdict::Waits };
        lane.charges.suspected.push(attempt);
        let attempts = lane.charges.attempts + lane.charges.suspected.len() as u32;
        let is_proven = works && lane.charges.doubted;
        let until = now + self.schedule.delay(attempts, random);
        self.lanes.rest(delivery, until);
        if is_proven {
            // Where others come by rarely, the next success may be too late to tell.
            self.charge(&name, false, now);
        }
        self.suspects.insert(name);
        Verdict::Again(until)
    }

    /// Somebody else had a success: what failed since the last one has itself to blame.
    pub(super) fn confirm(&mut self, by: &LaneName, now: Instant) {
        for name in std::mem::take(&mut self.suspects) {
            if name != *by {
                self.charge(&name, true, now);
            }
        }
    }

    /// The head of a lane has itself to blame for what it is suspected of. Its row is told of it, wherever the head is. Without
    /// attempts left it dies, if it `may` and is not on its way.
    fn charge(&mut self, name: &LaneName, may_die: bool, now: Instant) {
        let Some(lane) = self.lanes.get_mut(name) else { return };
        lane.charges.confirm();
        let attempts = lane.charges.attempts;
        let dies = may_die && self.schedule.is_over(attempts);
        let (seq, next) = match (lane.stage, lane.front.front(), lane.rows.front_mut()) {
            (Stage::Ready | Stage::Resting(_), Some(_), _) if dies => {
                if let Some(head) = self.lanes.remove_head(name) {
                    self.bury(head);
                }
                return;
            }
            (Stage::Parked(_) | Stage::Due, _, Some(&mut Row { seq, bytes, .. })) if dies => {
                lane.rows.pop_front();
                return self.bury_row(name, seq, bytes);
            }
            (Stage::Resting(until), Some(head), _) if head.place == Place::Row => (head.event.seq, until),
            (Stage::Ready, Some(head), _) if head.place == Place::Row => (head.event.seq, now),
            (Stage::Parked(_) | Stage::Due | Stage::Loading, _, Some(row)) => {
                row.attempts = attempts;
                (row.seq, row.next.unwrap_or(now))
            }
            _ => return,
        };
        let history = std::mem::take(&mut lane.charges.history);
        if history.is_empty() {
            return;
        }
        if matches!(lane.stage, Stage::Resting(_)) {
            lane.put_back(attempts, Some(next));
            self.lanes.park_until(name, Some(next));
        }
        self.settlements.push(Settlement { seq, what: Leave::Again, attempts, history, next: Some(next) });
    }

    /// The attempt was its own fault beyond doubt, and the last.
    pub(super) fn dies(&mut self, delivery: Delivery, attempt: Attempt) -> Verdict {
        if let Some(lane) = self.lanes.get_mut(&delivery.lane) {
            lane.charges.suspected.push(attempt);
            lane.charges.confirm();
        }
        self.suspects.remove(&delivery.lane);
        self.bury(delivery);
        Verdict::Dead
    }

    /// The head of a lane, taken out of it, becomes a dead letter.
    fn bury(&mut self, delivery: Delivery) {
        let Delivery { event, lane: name, place, .. } = delivery;
        match place {
            Place::Log(ticket) => {
                let settlement = self.death(&name, event.seq, Leave::Bury);
                self.progress.leave(ticket, settlement);
                self.go_on_without(&name, event.seq);
            }
            Place::Row => self.bury_row(&name, event.seq, event.size()),
        }
    }

    /// The same of a head that is parked.
    fn bury_row(&mut self, name: &LaneName, seq: i64, bytes: usize) {
        self.unpark(1, bytes);
        let settlement = self.death(name, seq, Leave::Die);
        self.settlements.push(settlement);
        self.go_on_without(name, seq);
    }

    fn death(&mut self, name: &LaneName, seq: i64, what: Leave) -> Settlement {
        let charges =
            self.lanes.get_mut(name).map(|lane| std::mem::take(&mut lane.charges)).unwrap_or_default();
        Settlement { seq, what, attempts: charges.attempts, history: charges.history, next: None }
    }

    fn go_on_without(&mut self, name: &LaneName, seq: i64) {
        match name {
            LaneName::Key(_) if self.on_dead == OnDead::Block => self.lanes.block(name, seq),
            _ => self.lanes.finish(name),
        }
    }
}
