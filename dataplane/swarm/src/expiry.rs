//! What happens when nothing happens: requests that stall, answers that do not come.

use pantala_wire::NodeId;

use crate::download::Download;
use crate::lease::Ask;
use crate::parents::Link;
use crate::requests::Target;
use crate::{Failure, Recheck, RequestId};
use pantala_wire::PieceIndex;

/// A request that stands still while others of the same parent move is queued behind them. After
/// this many stall timeouts it is stuck.
const QUEUED_FACTOR: u32 = 4;

impl Download {
    /// Acts on every deadline that has passed, and notes the next ones.
    pub(crate) fn expire(&mut self) {
        self.expire_parent_requests();
        self.expire_subscriptions();
        self.expire_source_fetches();
        self.expire_rechecks();
        self.expire_ask();
    }

    fn expire_parent_requests(&mut self) {
        let stall = self.config.stall_timeout;
        let mut stalled: Vec<NodeId> = Vec::new();
        let mut stuck: Vec<(RequestId, NodeId, u32)> = Vec::new();
        let mut next = None;
        for (id, request) in self.requests.iter() {
            let Target::Parent { parent, .. } = request.target else {
                continue;
            };
            let moved = self
                .parents
                .get(parent)
                .map_or(request.progressed, |p| p.progressed.max(request.progressed));
            let parent_due = moved + stall;
            let own_due = request.progressed + stall * QUEUED_FACTOR;
            if parent_due <= self.now {
                if !stalled.contains(&parent) {
                    stalled.push(parent);
                }
            } else if own_due <= self.now {
                stuck.push((id, parent, request.run.first));
            } else {
                let due = parent_due.min(own_due);
                next = Some(next.map_or(due, |next: std::time::Duration| next.min(due)));
            }
        }
        if let Some(next) = next {
            self.wake_at(next);
        }
        for (id, parent, piece) in stuck {
            self.last_fault = format!("parent {}: a request is stuck", parent.short());
            self.cancel(id);
            self.parents.deny(parent, piece);
        }
        for parent in stalled {
            self.last_fault = format!("parent {} stalled", parent.short());
            self.drop_parent(parent, true, true);
        }
    }

    fn expire_subscriptions(&mut self) {
        let mut silent = Vec::new();
        let mut due = Vec::new();
        for (id, parent) in self.parents.iter() {
            if let Link::Asked { since } = parent.link {
                let at = since + self.config.subscribe_timeout;
                if at <= self.now {
                    silent.push(id);
                } else {
                    due.push(at);
                }
            }
        }
        for at in due {
            self.wake_at(at);
        }
        for id in silent {
            self.last_fault = format!("parent {} does not answer", id.short());
            self.drop_parent(id, true, true);
        }
    }

    fn expire_source_fetches(&mut self) {
        let timeout = self.config.source_stall_timeout;
        let mut stalled = Vec::new();
        let mut due = Vec::new();
        for (id, request) in self.requests.iter() {
            if request.parent().is_none() {
                let at = request.progressed + timeout;
                if at <= self.now {
                    stalled.push((id, request.started));
                } else {
                    due.push(at);
                }
            }
        }
        for at in due {
            self.wake_at(at);
        }
        for (id, started) in stalled {
            self.cancel(id);
            self.source_failed(&Failure::Stalled, started);
        }
    }

    fn expire_rechecks(&mut self) {
        let timeout = self.config.recheck_timeout;
        let asked: Vec<(u32, std::time::Duration)> = self
            .audit
            .outstanding
            .iter()
            .map(|(&piece, &since)| (piece, since + timeout))
            .collect();
        for (piece, due) in asked {
            if due <= self.now {
                self.rechecked(PieceIndex(piece), Recheck::Failed(Failure::Stalled));
            } else {
                self.wake_at(due);
            }
        }
    }

    fn expire_ask(&mut self) {
        if let Ask::Out { since } = self.leases.ask {
            let lost_at = since + self.config.ask_timeout;
            if lost_at <= self.now {
                self.last_fault = "control does not answer".into();
                self.leases.mute = true;
                self.leases.ask = Ask::Wait {
                    until: self.now + self.config.ask_timeout,
                };
            } else {
                self.wake_at(lost_at);
            }
        }
    }
}
