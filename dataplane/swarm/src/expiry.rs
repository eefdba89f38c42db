//! What happens when nothing happens: requests that stall, answers that do not come.

use std::time::Duration;

use pantala_wire::{NodeId, PieceIndex};

use crate::download::Download;
use crate::lease::Ask;
use crate::parents::Link;
use crate::requests::{Request, Target};
use crate::{Failure, Recheck, RequestId};

/// A request that stands still while others of the same parent move is queued behind them. After
/// this many stall timeouts it is stuck.
const QUEUED_FACTOR: u32 = 4;

/// When a request to a parent has waited too long.
struct ParentDue {
    /// The parent has delivered nothing at all for too long.
    stalled_at: Duration,
    /// This request has not moved while others did.
    stuck_at: Duration,
}

impl Download {
    /// Acts on every deadline that has passed.
    pub(crate) fn expire(&mut self) {
        self.expire_parent_requests();
        self.expire_source_fetches();
        self.expire_subscriptions();
        self.expire_rechecks();
        self.expire_ask();
    }

    /// Notes the next deadline of all that is under way.
    pub(crate) fn note_deadlines(&mut self) {
        let requests = self
            .requests
            .iter()
            .map(|(_, request)| match request.target {
                Target::Parent { parent, .. } => {
                    let due = self.parent_due(parent, request);
                    due.stalled_at.min(due.stuck_at)
                }
                Target::Source { .. } => request.progressed + self.config.source_stall_timeout,
            });
        let subscriptions = self.parents.iter().filter_map(|(_, p)| match p.link {
            Link::Asked { since } => Some(since + self.config.subscribe_timeout),
            _ => None,
        });
        let rechecks = self.audit.outstanding.values();
        let rechecks = rechecks.map(|&since| since + self.config.recheck_timeout);
        let pauses = self.parents.next_pause_end(self.now);
        let ask = match self.leases.ask {
            Ask::Out { since } => Some(since + self.config.ask_timeout),
            _ => None,
        };
        let next = requests
            .chain(subscriptions)
            .chain(rechecks)
            .chain(pauses)
            .chain(ask)
            .min();
        if let Some(next) = next {
            self.wake_at(next);
        }
    }

    fn parent_due(&self, parent: NodeId, request: &Request) -> ParentDue {
        let stall = self.config.stall_timeout;
        let moved = self.parents.get(parent).map(|p| p.progressed);
        let moved = moved.unwrap_or_default().max(request.progressed);
        ParentDue {
            stalled_at: moved + stall,
            stuck_at: request.progressed + stall * QUEUED_FACTOR,
        }
    }

    fn expire_parent_requests(&mut self) {
        let mut stalled: Vec<NodeId> = Vec::new();
        let mut stuck: Vec<(RequestId, NodeId, u32)> = Vec::new();
        for (id, request) in self.requests.iter() {
            let Some(parent) = request.parent() else {
                continue;
            };
            let due = self.parent_due(parent, request);
            if due.stalled_at <= self.now {
                stalled.push(parent);
            } else if due.stuck_at <= self.now {
                stuck.push((id, parent, request.run.first));
            }
        }
        for (id, parent, piece) in stuck {
            self.last_fault = format!("parent {}: a request is stuck", parent.short());
            self.cancel(id);
            self.parents.deny(parent, piece);
        }
        stalled.dedup();
        for parent in stalled {
            if self.parents.get(parent).is_some_and(|p| p.is_linked()) {
                self.last_fault = format!("parent {} stalled", parent.short());
                self.drop_parent(parent, true, true);
            }
        }
    }

    fn expire_source_fetches(&mut self) {
        let timeout = self.config.source_stall_timeout;
        let stalled: Vec<(RequestId, Duration)> = self
            .requests
            .iter()
            .filter(|(_, r)| r.parent().is_none() && r.progressed + timeout <= self.now)
            .map(|(id, r)| (id, r.started))
            .collect();
        for (id, started) in stalled {
            self.cancel(id);
            self.source_failed(&Failure::Stalled, started);
        }
    }

    fn expire_subscriptions(&mut self) {
        let timeout = self.config.subscribe_timeout;
        let silent = |link| matches!(link, Link::Asked { since } if since + timeout <= self.now);
        let silent: Vec<NodeId> = self
            .parents
            .iter()
            .filter(|(_, parent)| silent(parent.link))
            .map(|(id, _)| id)
            .collect();
        for id in silent {
            self.last_fault = format!("parent {} does not answer", id.short());
            self.drop_parent(id, true, true);
        }
    }

    fn expire_rechecks(&mut self) {
        let timeout = self.config.recheck_timeout;
        let asked = self.audit.outstanding.iter();
        let lost: Vec<u32> = asked
            .filter(|(_, since)| **since + timeout <= self.now)
            .map(|(piece, _)| *piece)
            .collect();
        for piece in lost {
            self.rechecked(PieceIndex(piece), Recheck::Failed(Failure::Stalled));
        }
    }

    fn expire_ask(&mut self) {
        if let Ask::Out { since } = self.leases.ask
            && since + self.config.ask_timeout <= self.now
        {
            self.last_fault = "control does not answer".into();
            self.leases.mute = true;
            self.leases.ask = Ask::Wait {
                until: self.now + self.config.ask_timeout,
            };
        }
    }
}
