//! The core's books: memberships and their bounds, and what follows from a task's state.

use std::time::Duration;

use pantala_wire::{BlobDigest, PieceLayout};

use super::config::PUSHES_PER_EVENT_MAX;
use super::message::{RefusedReason, TaskReport, ToNode};
use super::nodes::Slot;
use super::opening::opening_pieces;
use super::task::Task;
use super::{Core, Out};

impl Core {
    /// Makes the node a member of the task, and the task where there is none.
    pub(super) fn enter(&mut self, slot: Slot, report: &TaskReport) -> Result<(), RefusedReason> {
        let digest = report.digest;
        let layout = PieceLayout::new(report.size_bytes).map_err(|_| RefusedReason::Size)?;
        let count = layout.piece_count();
        let is_member = match self.tasks.get(&digest) {
            Some(task) if task.size_bytes != report.size_bytes => return Err(RefusedReason::Size),
            Some(task) => task.members.contains_key(&slot),
            None => false,
        };
        if !is_member
            && (self.memberships >= self.config.memberships_max
                || self.holding_bits + u64::from(count) > self.config.holding_bits_max)
        {
            return Err(RefusedReason::Full);
        }
        if !self.tasks.contains_key(&digest) {
            while self.tasks.len() >= self.config.tasks_max
                || self.pieces + u64::from(count) > self.config.pieces_max
            {
                let Some(&(_, oldest)) = self.idle.first() else {
                    return Err(RefusedReason::Full);
                };
                self.forget(oldest);
            }
            self.pieces += u64::from(count);
            let mut task = Task::new(digest, report.size_bytes, count);
            if self.openings.is_open(&digest) {
                task.reserved_count = opening_pieces(&layout);
            }
            self.tasks.insert(digest, task);
        }
        if let Some(task) = self.tasks.get_mut(&digest) {
            task.enter(slot);
        }
        if let Some(entry) = self.nodes.get_mut(slot) {
            entry.unconfirmed.remove(&digest);
            entry.tasks.insert(digest);
        }
        if !is_member {
            self.memberships += 1;
            self.holding_bits += u64::from(count);
        }
        Ok(())
    }

    pub(super) fn push_parents(&self, digest: BlobDigest, slots: &[Slot], out: &mut Out) {
        let Some(task) = self.tasks.get(&digest) else {
            return;
        };
        for &slot in slots {
            if let Some(node) = self.nodes.get(slot)
                && node.away_until.is_none()
                && task.members.get(&slot).is_some_and(|m| m.wanted)
            {
                let peers = task.peers_of(&self.nodes, slot);
                out.push((node.id, ToNode::Parents { digest, peers }));
            }
        }
    }

    /// Brings what depends on the task's state up to date, after every event on it.
    pub(super) fn settle(&mut self, now: Duration, digest: BlobDigest, out: &mut Out) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if task.members.is_empty() {
            self.forget(digest);
            return;
        }
        let linked = std::mem::take(&mut task.linked);
        self.push_parents(digest, &linked, out);
        self.serve_waiting(now, digest, out);
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        let alarm = task.expiries.first().map(|&(at, _)| at);
        let before = std::mem::replace(&mut task.alarm, alarm);
        if before != alarm {
            if let Some(before) = before {
                self.alarms.remove(&(before, digest));
            }
            if let Some(alarm) = alarm {
                self.alarms.insert((alarm, digest));
            }
        }
        match (task.wanted_count, task.idle_since) {
            (0, None) => {
                task.idle_since = Some(now);
                self.idle.insert((now, digest));
            }
            (1.., Some(since)) => {
                task.idle_since = None;
                self.idle.remove(&(since, digest));
            }
            _ => {}
        }
    }

    /// Leases what has come free to those that wait for it, unless nodes that have not announced yet may
    /// hold or fetch it.
    fn serve_waiting(&mut self, now: Duration, digest: BlobDigest, out: &mut Out) {
        let is_settled = now >= self.started + self.config.start_grace;
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if !is_settled && (self.is_successor || task.announced_count > 0) {
            return;
        }
        let expires_in = self.config.lease_ttl;
        for (slot, pieces) in task.serve_waiting(PUSHES_PER_EVENT_MAX, now, expires_in) {
            self.leases_granted += 1;
            if let Some(node) = self.nodes.get(slot) {
                out.push((
                    node.id,
                    ToNode::Lease {
                        digest,
                        pieces,
                        expires_in,
                    },
                ));
            }
        }
    }

    /// Removes a task and every trace of it.
    pub(super) fn forget(&mut self, digest: BlobDigest) {
        let Some(task) = self.tasks.remove(&digest) else {
            return;
        };
        if let Some(alarm) = task.alarm {
            self.alarms.remove(&(alarm, digest));
        }
        if let Some(since) = task.idle_since {
            self.idle.remove(&(since, digest));
        }
        self.pieces -= u64::from(task.piece_count());
        self.memberships -= task.members.len();
        self.holding_bits -= u64::from(task.piece_count()) * task.members.len() as u64;
        for slot in task.members.keys() {
            if let Some(node) = self.nodes.get_mut(*slot) {
                node.tasks.remove(&digest);
                node.unconfirmed.remove(&digest);
            }
        }
    }
}
