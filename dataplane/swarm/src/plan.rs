//! What to ask which parent for.

use std::time::Duration;

use pantala_wire::{NodeId, PieceIndex, PieceRun, Priority};

use crate::download::Download;
use crate::parents::Link;
use crate::requests::{Request, Target};
use crate::spread::spread;
use crate::{Action, RequestId};

/// Pieces started from one plan before rarity is looked at anew.
const PLAN_STARTS_MAX: u32 = 256;
/// A copy that progresses is slow, not stuck: it is hedged only after this many times the wait.
const SLOW_FACTOR: u32 = 4;

/// The order in which bulk pieces are asked for.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pieces: Vec<u32>,
    /// Pieces may have become open or offered since the plan was made.
    pub(crate) dirty: bool,
    starts_count: u32,
    /// When the next planned piece may be asked for outside of the rack.
    far_at: Option<Duration>,
}

impl Download {
    /// Subscribes to candidates while there is room, and makes room by rotation.
    pub(crate) fn keep_parents(&mut self) {
        if self.demand.missing().is_empty() {
            return self.leave_parents_when_satisfied();
        }
        let mut room = self
            .config
            .parents_max
            .saturating_sub(self.parents.linked_count());
        let mut waiting = None;
        for id in self.parents.order().to_vec() {
            let Some(parent) = self.parents.get(id) else {
                continue;
            };
            let Link::Idle { retry_at } = parent.link else {
                continue;
            };
            if parent.is_given_up(&self.config) {
                continue;
            }
            if retry_at > self.now {
                self.wake_at(retry_at);
            } else if room > 0 {
                room -= 1;
                self.subscribe(id);
            } else {
                waiting = waiting.or(Some(id));
            }
        }
        if let Some(newcomer) = waiting {
            self.rotate(newcomer);
        }
    }

    fn subscribe(&mut self, id: NodeId) {
        let now = self.now;
        if let Some(parent) = self.parents.get_mut(id) {
            parent.link = Link::Asked { since: now };
            parent.idle_since = now;
            self.actions.push_back(Action::Subscribe { parent: id });
        }
    }

    /// Replaces a parent that has long had nothing to give.
    fn rotate(&mut self, newcomer: NodeId) {
        let idle = self
            .parents
            .iter()
            .filter(|(_, p)| p.link == Link::Up && p.outstanding_count == 0)
            .map(|(id, p)| (p.idle_since, id))
            .min();
        let Some((since, id)) = idle else {
            return;
        };
        if since + self.config.rotate_after > self.now {
            return self.wake_at(since + self.config.rotate_after);
        }
        self.drop_parent(id, false, true);
        if let Some(parent) = self.parents.get_mut(id) {
            parent.link = Link::Idle {
                retry_at: self.now + self.config.parent_retry_max,
            };
        }
        self.subscribe(newcomer);
        // There may be another to replace.
        self.dirty = true;
    }

    /// Candidates that control has just named go before connected parents it no longer names.
    pub(crate) fn make_room_for_listed(&mut self) {
        let idle = |link| matches!(link, Link::Idle { .. });
        let newcomers = self
            .parents
            .iter()
            .filter(|(_, p)| p.listed && idle(p.link) && !p.is_given_up(&self.config))
            .count() as u32;
        let room = self
            .config
            .parents_max
            .saturating_sub(self.parents.linked_count());
        let mut leavers: Vec<(u32, NodeId)> = self
            .parents
            .iter()
            .filter(|(_, p)| !p.listed && p.is_linked())
            .map(|(id, p)| (p.outstanding_count, id))
            .collect();
        leavers.sort_unstable();
        for (_, id) in leavers
            .into_iter()
            .take(newcomers.saturating_sub(room) as usize)
        {
            self.drop_parent(id, false, true);
        }
    }

    fn leave_parents_when_satisfied(&mut self) {
        let since = *self.satisfied_since.get_or_insert(self.now);
        let linked: Vec<NodeId> = self
            .parents
            .iter()
            .filter(|(_, p)| p.is_linked())
            .map(|(id, _)| id)
            .collect();
        if linked.is_empty() {
            return;
        }
        let until = since + self.config.unsubscribe_after;
        if until > self.now {
            return self.wake_at(until);
        }
        for id in linked {
            self.drop_parent(id, false, true);
        }
    }

    /// Requests to parents that may be in flight; a quarter is for urgent pieces only.
    fn in_flight_limit(&self, urgent: bool) -> u32 {
        let max = self.config.requests_in_flight_max;
        if urgent { max } else { max - max / 4 }
    }

    /// Asks a parent for a piece.
    fn fetch(&mut self, parent: NodeId, piece: u32, priority: Priority) {
        let now = self.now;
        let index = PieceIndex(piece);
        let first_group = if self.whole_only.contains(index) {
            0
        } else {
            self.partial.get(&piece).copied().unwrap_or(0)
        };
        let run = PieceRun {
            first: piece,
            count: 1,
        };
        let target = Target::Parent {
            parent,
            first_group,
        };
        let request = self.requests.start(target, run, priority, now);
        if let Some(parent) = self.parents.get_mut(parent) {
            parent.request_started(now);
        }
        self.actions.push_back(Action::Fetch {
            request,
            parent,
            piece: index,
            first_group,
            priority,
        });
    }

    /// Asks parents for the pieces that readers wait for, in order.
    pub(crate) fn fetch_urgent(&mut self) {
        for urgent in self.demand.window().to_vec() {
            if self.requests.to_parents_count() >= self.in_flight_limit(true)
                || !self.parents.any_slot(true, self.now)
            {
                break;
            }
            if self.requests.is_in_flight(urgent.piece) {
                continue;
            }
            // Who has waited for its first byte, or in a page fault, is not kept waiting for a neighbour.
            let far_at = match urgent.fresh || urgent.priority == Priority::Fault {
                true => Duration::ZERO,
                false => self.parents.far_from(&self.config, urgent.piece),
            };
            let far = far_at <= self.now;
            if !far {
                self.wake_at(far_at);
            }
            let parent = self
                .parents
                .best_for(urgent.piece, true, far, None, self.now);
            if let Some(parent) = parent {
                // A client that has had no byte yet will give up, as a page fault will.
                let priority = match urgent.fresh {
                    true => Priority::Fault,
                    false => urgent.priority,
                };
                self.fetch(parent, urgent.piece, priority);
            }
        }
    }

    /// Asks parents for the rest, rarest first.
    pub(crate) fn fetch_bulk(&mut self) {
        if self.plan.starts_count >= PLAN_STARTS_MAX {
            self.plan.dirty = true;
        }
        let far_opened = self.plan.far_at.is_some_and(|at| at <= self.now);
        if self.plan.dirty || far_opened {
            self.plan.far_at = None;
            for (_, parent) in self.parents.iter_mut() {
                parent.dry = false;
            }
        }
        if self.start_planned() && self.plan.dirty {
            self.make_plan();
            self.start_planned();
        }
        if let Some(at) = self.plan.far_at {
            self.wake_at(at);
        }
    }

    fn bulk_slot(&self) -> bool {
        self.requests.to_parents_count() < self.in_flight_limit(false)
            && self.parents.any_slot(false, self.now)
    }

    /// Works through the plan; true if a parent is left without work.
    fn start_planned(&mut self) -> bool {
        let mut kept = 0;
        while kept < self.plan.pieces.len() {
            if !self.bulk_slot() {
                return false;
            }
            let piece = self.plan.pieces[kept];
            if !self.is_open(piece) {
                self.plan.pieces.remove(kept);
                continue;
            }
            let far_at = self.parents.far_from(&self.config, piece);
            let far = far_at <= self.now;
            if !far {
                let first = self.plan.far_at.map_or(far_at, |at| at.min(far_at));
                self.plan.far_at = Some(first);
            }
            match self.parents.best_for(piece, false, far, None, self.now) {
                Some(parent) => {
                    self.plan.pieces.remove(kept);
                    self.plan.starts_count += 1;
                    let priority = self.demand.background(PieceIndex(piece));
                    self.fetch(parent, piece, priority);
                }
                None => kept += 1,
            }
        }
        let idle = self.bulk_slot();
        if idle && !self.plan.dirty {
            // Not to be looked at again until something changes.
            let now = self.now;
            for (_, parent) in self.parents.iter_mut() {
                parent.dry |= parent.has_slot(false, now);
            }
        }
        idle
    }

    fn make_plan(&mut self) {
        let mut keyed: Vec<(Priority, u16, u64, u32)> = self
            .demand
            .missing()
            .iter()
            .filter(|p| self.parents.is_offered(p.0) && !self.requests.is_in_flight(p.0))
            .map(|p| {
                let rarity = self.parents.offered_by_count(p.0);
                let tie = spread(self.seed, u64::from(p.0));
                (self.demand.background(p), rarity, tie, p.0)
            })
            .collect();
        keyed.sort_unstable();
        self.plan = Plan {
            pieces: keyed.into_iter().map(|(.., piece)| piece).collect(),
            dirty: false,
            starts_count: 0,
            far_at: None,
        };
    }

    /// Sends a second copy after a slow one: of urgent pieces, and of the last pieces of all.
    pub(crate) fn hedge(&mut self) {
        let mut room = self
            .config
            .hedges_max
            .saturating_sub(self.requests.hedged_count());
        let mut candidates: Vec<(u32, Priority)> = self
            .demand
            .window()
            .iter()
            .map(|u| (u.piece, u.priority))
            .collect();
        if self.plan.pieces.is_empty() {
            let in_flight = self.requests.iter().filter(|(_, r)| r.parent().is_some());
            candidates.extend(in_flight.map(|(_, r)| (r.run.first, r.priority)));
        }
        for (piece, priority) in candidates {
            let mut carriers = self.requests.carriers(piece);
            let (Some(id), None) = (carriers.next(), carriers.next()) else {
                continue;
            };
            if room == 0 || self.requests.to_parents_count() >= self.in_flight_limit(true) {
                return;
            }
            if self.whole_only.contains(PieceIndex(piece)) || !self.parents.is_offered(piece) {
                continue;
            }
            let Some(request) = self.requests.get(id) else {
                continue;
            };
            let due = self.hedge_due(request);
            if due > self.now {
                self.wake_at(due);
                continue;
            }
            let slow = request.parent();
            let other = self.parents.best_for(piece, true, true, slow, self.now);
            if let Some(other) = other {
                self.remember_written(id, piece);
                self.fetch(other, piece, priority);
                room -= 1;
            }
        }
    }

    fn hedge_due(&self, request: &Request) -> Duration {
        let wait = self.config.hedge_after;
        (request.progressed + wait).min(request.started + wait * SLOW_FACTOR)
    }

    /// A second copy goes on where the first one is now.
    fn remember_written(&mut self, id: RequestId, piece: u32) {
        if let Some(request) = self.requests.get(id)
            && let Target::Parent { first_group, .. } = request.target
        {
            let last = self.layout.groups_in(PieceIndex(piece)).saturating_sub(1);
            let written = (first_group + request.groups).min(last);
            if written > 0 {
                self.partial.insert(piece, written);
            }
        }
    }
}
