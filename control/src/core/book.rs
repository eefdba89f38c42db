//! The core's books: memberships and their bounds, and what follows from a task's state.

use std::time::Duration;

use pantala_wire::{BlobDigest, PieceLayout};

use super::config::PUSHES_PER_EVENT_MAX;
use super::hosts::HostId;
use super::member::MemberId;
use super::message::{RefusedReason, TaskReport, ToNode};
use super::nodes::Slot;
use super::opening::opening_pieces;
use super::parents::task_salt;
use super::task::Task;
use super::tasks::TaskId;
use super::{Core, Out};

impl Core {
    /// The task of this digest, and the node's part in it.
    pub(super) fn part(&self, slot: Slot, digest: &BlobDigest) -> Option<(TaskId, MemberId)> {
        let task = self.tasks.find(digest)?;
        let member = self.nodes.get(slot)?.tasks.get(&task)?;
        Some((task, *member))
    }

    /// Makes the node a member of the task, and the task where there is none.
    pub(super) fn enter(
        &mut self,
        slot: Slot,
        report: &TaskReport,
    ) -> Result<(TaskId, MemberId), RefusedReason> {
        let digest = report.digest;
        let layout = PieceLayout::new(report.size_bytes).map_err(|_| RefusedReason::Size)?;
        let count = layout.piece_count();
        let known = self.tasks.find(&digest);
        if let Some(task) = known.and_then(|id| self.tasks.get(id))
            && task.size_bytes != report.size_bytes
        {
            return Err(RefusedReason::Size);
        }
        if let Some((id, member)) = self.part(slot, &digest) {
            if let Some(node) = self.nodes.get_mut(slot) {
                node.unconfirmed.remove(&id);
            }
            return Ok((id, member));
        }
        let node = self.nodes.get(slot).ok_or(RefusedReason::Full)?;
        if node.tasks.len() >= self.config.tasks_per_node_max
            || self.memberships >= self.config.memberships_max
            || self.holding_bits + u64::from(count) > self.config.holding_bits_max
        {
            return Err(RefusedReason::Full);
        }
        let place = node.place;
        let id = match known {
            Some(id) => id,
            None => self.add_task(report, &layout)?,
        };
        let task = self.tasks.get_mut(id).ok_or(RefusedReason::Full)?;
        let member = task.enter(slot, place);
        if let Some(node) = self.nodes.get_mut(slot) {
            node.tasks.insert(id, member);
        }
        self.memberships += 1;
        self.holding_bits += u64::from(count);
        Ok((id, member))
    }

    fn add_task(
        &mut self,
        report: &TaskReport,
        layout: &PieceLayout,
    ) -> Result<TaskId, RefusedReason> {
        let count = layout.piece_count();
        while self.tasks.len() >= self.config.tasks_max
            || self.pieces + u64::from(count) > self.config.pieces_max
        {
            let Some(&(_, oldest)) = self.idle.first() else {
                return Err(RefusedReason::Full);
            };
            self.forget(oldest);
        }
        self.pieces += u64::from(count);
        let salt = task_salt(self.config.seed, &report.digest);
        let mut task = Task::new(report.digest, report.size_bytes, count, salt);
        if self.openings.is_open(&report.digest) {
            task.reserved_count = opening_pieces(layout);
        }
        Ok(self.tasks.add(task))
    }

    pub(super) fn push_parents(
        &self,
        now: Duration,
        id: TaskId,
        members: &[MemberId],
        out: &mut Out,
    ) {
        let Some(task) = self.tasks.get(id) else {
            return;
        };
        let digest = task.digest;
        for &child in members {
            if let Some(member) = task.members.get(child).filter(|m| m.wanted)
                && let Some(node) = self.nodes.get(member.slot)
                && node.away_until.is_none()
            {
                let peers = task.peers_of(now, &self.nodes, child);
                out.push((node.id, ToNode::Parents { digest, peers }));
            }
        }
    }

    pub(super) fn settle_digest(&mut self, now: Duration, digest: BlobDigest, out: &mut Out) {
        if let Some(id) = self.tasks.find(&digest) {
            self.settle(now, id, out);
        }
    }

    /// Brings what depends on the task's state up to date, after every event on it.
    pub(super) fn settle(&mut self, now: Duration, id: TaskId, out: &mut Out) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        if task.members.is_empty() {
            let ended = std::mem::take(&mut task.ended);
            self.forget(id);
            self.pass_on(now, ended, out);
            return;
        }
        let ended = std::mem::take(&mut task.ended);
        let linked = std::mem::take(&mut task.linked);
        let woken = task.wake(PUSHES_PER_EVENT_MAX);
        self.wake(id, &woken, out);
        self.push_parents(now, id, &linked, out);
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let alarm = task.expiries.first().map(|&(at, _)| at);
        let before = std::mem::replace(&mut task.alarm, alarm);
        if before != alarm {
            if let Some(before) = before {
                self.alarms.remove(&(before, id));
            }
            if let Some(alarm) = alarm {
                self.alarms.insert((alarm, id));
            }
        }
        match (task.wanted_count, task.idle_since) {
            (0, None) => {
                task.idle_since = Some(now);
                self.idle.insert((now, id));
            }
            (1.., Some(since)) => {
                task.idle_since = None;
                self.idle.remove(&(since, id));
            }
            _ => {}
        }
        self.pass_on(now, ended, out);
    }

    /// Tells waiting members that something has come free.
    fn wake(&self, id: TaskId, members: &[MemberId], out: &mut Out) {
        let Some(task) = self.tasks.get(id) else {
            return;
        };
        let digest = task.digest;
        let retry_after = Duration::ZERO;
        for &member in members {
            let slot = task.members.get(member).map(|member| member.slot);
            if let Some(node) = slot.and_then(|slot| self.nodes.get(slot)) {
                let wait = ToNode::LeaseWait {
                    digest,
                    retry_after,
                    sharing_count: task.sourcing_count as u32,
                };
                out.push((node.id, wait));
            }
        }
    }

    /// Leases have ended: their host has room for others, first of all for the task that it turned away.
    fn pass_on(&mut self, now: Duration, ended: Vec<(HostId, bool)>, out: &mut Out) {
        for (host, is_done) in ended {
            self.hosts.ended(host, is_done);
            let Some(id) = self.hosts.next_starved(host, now) else {
                continue;
            };
            let Some(task) = self.tasks.get_mut(id) else {
                continue;
            };
            let woken = task.wake_some(1);
            if !task.waiting.is_empty() {
                self.hosts.starve(host, id);
            }
            self.wake(id, &woken, out);
        }
    }

    /// A lease has ended as it should: leases others to those that wait, unless nodes that have not announced
    /// yet may hold or fetch the pieces. They are not told to ask again: the source would be idle for a
    /// round trip after each lease. Where a lease ends otherwise they are, since its holder may be about
    /// to say that it has the pieces.
    pub(super) fn serve_waiting(&mut self, now: Duration, id: TaskId, out: &mut Out) {
        let is_settled = now >= self.started + self.config.start_grace;
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        if !is_settled && (self.is_successor || task.announced_count > 0) {
            return;
        }
        let digest = task.digest;
        let expires_in = self.config.lease_ttl;
        for _ in 0..PUSHES_PER_EVENT_MAX {
            let Some((member, slot, host)) = task.next_waiting() else {
                return;
            };
            let turned_away =
                host.is_some_and(|host| self.hosts.may_lease(host, now, slot).is_err());
            if let Some(host) = host.filter(|_| turned_away) {
                self.hosts.starve(host, id);
                return;
            }
            let Some(pieces) = task.grant_waiting(member, now, expires_in) else {
                continue;
            };
            self.leases_granted += 1;
            if let Some(host) = host {
                self.hosts.leased(host, now);
            }
            if let Some(node) = self.nodes.get(slot) {
                let lease = ToNode::Lease {
                    digest,
                    pieces,
                    expires_in,
                };
                out.push((node.id, lease));
            }
        }
    }

    /// Removes a task and every trace of it.
    pub(super) fn forget(&mut self, id: TaskId) {
        let Some(mut task) = self.tasks.remove(id) else {
            return;
        };
        if let Some(alarm) = task.alarm {
            self.alarms.remove(&(alarm, id));
        }
        if let Some(since) = task.idle_since {
            self.idle.remove(&(since, id));
        }
        self.pieces -= u64::from(task.piece_count());
        self.memberships -= task.members.len();
        self.holding_bits -= u64::from(task.piece_count()) * task.members.len() as u64;
        for member in task.members.all().to_vec() {
            task.drop_children(&mut self.nodes, member);
            let part = task.members.get(member).map(|it| (it.slot, it.host));
            let (slot, host) = part.unzip();
            if let Some(host) = host.flatten() {
                self.hosts.leave(host);
            }
            if let Some(node) = slot.and_then(|slot| self.nodes.get_mut(slot)) {
                node.tasks.remove(&id);
                node.unconfirmed.remove(&id);
            }
        }
    }
}
