//! What the core does about each event.

use std::collections::BTreeMap;
use std::time::Duration;

use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceRun};

use super::config::{
    DEMOTION_MOVES_MAX, PARENTS_LOW, PATHS_PER_REPORT_MAX, PUSHES_PER_EVENT_MAX, SHARED_TASKS_MAX,
};
use super::member::MemberId;
use super::message::{FromNode, PathReport, RefusedReason, TaskReport, ToNode};
use super::nodes::Slot;
use super::task;
use super::tasks::TaskId;
use super::{Core, Out};

impl Core {
    /// A node says what it has of a blob; `replace`: and that it has nothing else of it.
    pub(super) fn report(
        &mut self,
        now: Duration,
        slot: Slot,
        node: NodeId,
        report: &TaskReport,
        replace: bool,
        out: &mut Out,
    ) {
        let digest = report.digest;
        let opened = self.take_opening(slot, &digest);
        let (id, member) = match self.enter(slot, report) {
            Ok(part) => part,
            Err(reason) => {
                out.push((node, ToNode::Refused { digest, reason }));
                return;
            }
        };
        if self.refuses_runs(slot, id, &[&report.held, &report.fetching], out) {
            let is_idle = self.tasks.get(id).and_then(|task| task.members.get(member));
            // Somebody who is in it only by this message is in it no longer.
            if is_idle.is_some_and(|m| !m.wanted && m.held_count() == 0) {
                self.withdraw(now, slot, id, out);
                self.settle(now, id, out);
            }
            return;
        }
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let was_complete = task.members.get(member).is_some_and(|m| m.complete);
        if replace || (was_complete && !report.complete) {
            task.end_leases_of(member);
            task.clear_held(member);
        }
        let is_at_work = !report.held.is_empty() || !report.fetching.is_empty();
        if replace && is_at_work && !report.complete {
            task.mark_announced(member);
        }
        let is_wanted = report.wanted && !report.complete;
        task.set_role(&mut self.nodes, member, is_wanted, report.has_source);
        task.add_held(member, &report.held, false);
        if report.complete {
            self.complete(now, id, member, out);
        } else if report.wanted {
            let opened = opened.then(|| task.opening_run());
            let fetching: Vec<_> = opened.iter().chain(&report.fetching).copied().collect();
            let given = task.regrant(member, &fetching, now, self.config.lease_ttl);
            self.leases_granted += given.len() as u64;
            let host = task.members.get(member).and_then(|m| m.host);
            out.extend(given.into_iter().map(|pieces| {
                let expires_in = self.config.lease_ttl;
                if let Some(host) = host {
                    self.hosts.leased(host, now);
                }
                (
                    node,
                    ToNode::Lease {
                        digest,
                        pieces,
                        expires_in,
                    },
                )
            }));
            task.fill(now, &mut self.nodes, member);
            let peers = task.peers_of(now, &self.nodes, member);
            out.push((node, ToNode::Parents { digest, peers }));
        } else if report.held.is_empty() {
            self.withdraw(now, slot, id, out);
            self.settle(now, id, out);
            return;
        }
        self.offer(now, id, member, out);
        self.settle(now, id, out);
    }

    pub(super) fn close(&mut self, now: Duration, slot: Slot, digest: BlobDigest, out: &mut Out) {
        let Some((id, member)) = self.part(slot, &digest) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        task.end_leases_of(member);
        let has_source = false;
        task.set_role(&mut self.nodes, member, false, has_source);
        if task
            .members
            .get(member)
            .is_some_and(|m| m.held_count() == 0)
        {
            self.withdraw(now, slot, id, out);
        }
        self.settle(now, id, out);
    }

    pub(super) fn dropped(&mut self, now: Duration, slot: Slot, digest: BlobDigest, out: &mut Out) {
        let Some((id, member)) = self.part(slot, &digest) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        task.clear_held(member);
        if task.members.get(member).is_some_and(|m| !m.wanted) {
            self.withdraw(now, slot, id, out);
        }
        self.settle(now, id, out);
    }

    /// The member holds all: it needs no parents, and others may want it as theirs.
    pub(super) fn complete(&mut self, now: Duration, id: TaskId, member: MemberId, out: &mut Out) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        task.end_leases_of(member);
        task.set_role(&mut self.nodes, member, false, false);
        task.set_complete(member);
        let told = task.spread_complete(now, &mut self.nodes, member, PUSHES_PER_EVENT_MAX);
        self.push_parents(now, id, &told, out);
    }

    pub(super) fn parent_failed(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        failed: NodeId,
        out: &mut Out,
    ) {
        let Some(failed) = self.nodes.slot(failed) else {
            return;
        };
        let Some((id, child)) = self.part(slot, &digest) else {
            return;
        };
        let Some((_, parent)) = self.part(failed, &digest) else {
            return;
        };
        let until = now + self.config.parent_exclusion;
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let was_parent = task.exclude(&mut self.nodes, child, parent, now, until);
        if task.fill(now, &mut self.nodes, child) || was_parent {
            self.push_parents(now, id, &[child], out);
        }
        // Only who was served by a parent can say that it failed.
        if was_parent
            && let Some(node) = self.nodes.get_mut(failed)
            && node.delivery.standing.failed(now, slot)
        {
            self.demote(now, failed, out);
        }
    }

    /// What a node got from its parents.
    pub(super) fn measured(
        &mut self,
        now: Duration,
        slot: Slot,
        reports: &[PathReport],
        out: &mut Out,
    ) {
        let mut taken = Vec::with_capacity(reports.len().min(PATHS_PER_REPORT_MAX));
        for report in reports.iter().take(PATHS_PER_REPORT_MAX) {
            let Some(parent) = self.nodes.slot(report.node).filter(|&it| it != slot) else {
                continue;
            };
            match self.nodes.measure(now, slot, parent, report) {
                Ok(()) => taken.push((parent, report)),
                Err(_) => self.absurd_reports += 1,
            }
        }
        let median = self.nodes.median(now, slot);
        for (parent, report) in taken {
            if self.nodes.judge(now, slot, parent, report, median) {
                self.demote(now, parent, out);
                continue;
            }
            let parent_node = self.nodes.get(parent);
            // Others complained, and this child may still depend on it.
            if parent_node.is_some_and(|node| node.delivery.standing.is_demoted(now)) {
                self.part_from(now, slot, parent, out);
            }
        }
    }

    /// Takes the node from its children where these have others, some at once: who is left is moved
    /// by its own next report.
    fn demote(&mut self, now: Duration, parent: Slot, out: &mut Out) {
        self.demotions += 1;
        let tasks = self.nodes.get(parent).map(|node| node.tasks.clone());
        let mut moved = 0;
        for (id, member) in tasks.into_iter().flatten() {
            let Some(task) = self.tasks.get(id) else {
                continue;
            };
            let children: Vec<MemberId> = task.members.get(member).map_or_else(Vec::new, |m| {
                let left = DEMOTION_MOVES_MAX.saturating_sub(moved);
                m.children.iter().copied().take(left).collect()
            });
            moved += children.len();
            for child in children {
                self.move_from(now, id, child, member, out);
            }
            if moved >= DEMOTION_MOVES_MAX {
                return;
            }
        }
    }

    /// Takes `parent` from one child in all tasks that they share.
    fn part_from(&mut self, now: Duration, child: Slot, parent: Slot, out: &mut Out) {
        let shared: Vec<(TaskId, MemberId, MemberId)> = self
            .nodes
            .get(child)
            .zip(self.nodes.get(parent))
            .map_or_else(Vec::new, |(child, parent)| {
                let parts = child.tasks.iter().take(SHARED_TASKS_MAX);
                let shared =
                    parts.filter_map(|(id, member)| Some((*id, *member, *parent.tasks.get(id)?)));
                shared.collect()
            });
        for (id, child, parent) in shared {
            self.move_from(now, id, child, parent, out);
        }
    }

    /// Gives the child others than `parent`, if it is its parent and there are others.
    fn move_from(
        &mut self,
        now: Duration,
        id: TaskId,
        child: MemberId,
        parent: MemberId,
        out: &mut Out,
    ) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let has = |task: &task::Task, count: usize| {
            task.members
                .get(child)
                .is_some_and(|m| m.parents.contains(&parent) && m.parents.len() > count)
        };
        if !has(task, 0) {
            return;
        }
        task.fill(now, &mut self.nodes, child);
        if has(task, 1) {
            task.unlink(&mut self.nodes, child, parent);
            task.fill(now, &mut self.nodes, child);
            self.push_parents(now, id, &[child], out);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one request's fields")]
    pub(super) fn ask(
        &mut self,
        now: Duration,
        slot: Slot,
        node: NodeId,
        digest: BlobDigest,
        wanted: &[PieceRun],
        urgent: Option<PieceIndex>,
        out: &mut Out,
    ) {
        let ttl = self.config.lease_ttl;
        let grace_left = (self.started + self.config.start_grace).saturating_sub(now);
        let refuse = |out: &mut Out| {
            let reason = RefusedReason::UnknownTask;
            out.push((node, ToNode::Refused { digest, reason }));
        };
        let Some((id, asking)) = self.part(slot, &digest) else {
            return refuse(out);
        };
        let Some(task) = self.tasks.get_mut(id) else {
            return refuse(out);
        };
        let Some(member) = task.members.get(asking).filter(|member| member.wanted) else {
            return refuse(out);
        };
        // Others may hold or fetch what they have not announced yet: a lease now could be a second
        // copy. A cluster that is as new as control has nobody to wait for.
        let own = usize::from(member.announced);
        let awaits_others = self.is_successor || task.announced_count > own;
        if !grace_left.is_zero() && awaits_others {
            let retry_after = grace_left;
            out.push((
                node,
                ToNode::LeaseWait {
                    digest,
                    retry_after,
                    sharing_count: task.sourcing_count as u32,
                },
            ));
            return;
        }
        let (host, may_have) = (member.host, member.has_source);
        let uplink = self
            .nodes
            .get(slot)
            .map_or(0.0, |node| node.delivery.uplink());
        let turn = task.turn_of(asking, uplink, now);
        let is_its_turn = turn <= now || task.is_calm();
        let turned_away = host.and_then(|host| self.hosts.may_lease(host, now, slot).err());
        let mut granted = None;
        if turned_away.is_none() && is_its_turn {
            granted = task.grant(asking, wanted, urgent, now, ttl);
            // Nothing is free: somebody may be so slow that others should have what it would fetch last.
            if granted.is_none()
                && may_have
                && let Some((holder, pieces)) = task.cut_slowest(now, ttl, &self.nodes, asking)
            {
                let holder = task.members.get(holder).map(|holder| holder.slot);
                if let Some(holder) = holder.and_then(|holder| self.nodes.get(holder)) {
                    out.push((holder.id, ToNode::LeaseCut { digest, pieces }));
                }
                self.leases_cut += 1;
                granted = task.grant(asking, wanted, urgent, now, ttl);
            }
        }
        if let Some(pieces) = granted {
            self.leases_granted += 1;
            if let Some(host) = host {
                self.hosts.leased(host, now);
            }
            let expires_in = ttl;
            out.push((
                node,
                ToNode::Lease {
                    digest,
                    pieces,
                    expires_in,
                },
            ));
        } else {
            task.wait(asking, wanted, turn);
            let retry_after = Duration::from_millis(task.waiting.len() as u64)
                .clamp(self.config.retry_min, self.config.retry_max)
                .max(turned_away.unwrap_or(Duration::ZERO));
            if let Some(host) = host.filter(|_| turned_away.is_some()) {
                self.hosts.starve(host, id);
            }
            out.push((
                node,
                ToNode::LeaseWait {
                    digest,
                    retry_after,
                    sharing_count: task.sourcing_count as u32,
                },
            ));
            let missing = urgent
                .map(|piece| piece.0)
                .filter(|&piece| piece < task.piece_count())
                .or_else(|| task::ascending(wanted, task.piece_count()).flatten().next());
            let is_short = task.members.get(asking).is_some_and(|m| m.short.is_some());
            let filled = is_short && task.fill(now, &mut self.nodes, asking);
            let reached =
                missing.is_some_and(|piece| task.reach(now, &mut self.nodes, asking, piece));
            if filled || reached {
                self.push_parents(now, id, &[asking], out);
            }
        }
        self.settle(now, id, out);
    }

    /// A node that was shut out during its session learns that it waits in vain.
    pub(super) fn turn_away(&self, node: NodeId, message: &FromNode, out: &mut Out) {
        if let FromNode::OpenTask { digest, .. }
        | FromNode::AskLease { digest, .. }
        | FromNode::AskOpening { digest } = *message
            && self.verdicts.is_shut_out(&node)
        {
            let reason = RefusedReason::ShutOut;
            out.push((node, ToNode::Refused { digest, reason }));
        }
    }

    /// What a node had before its reconnect and does not name in its announcement, it has lost.
    pub(super) fn forget_unconfirmed(&mut self, now: Duration, slot: Slot, out: &mut Out) {
        let lost = self
            .nodes
            .get_mut(slot)
            .map(|node| std::mem::take(&mut node.unconfirmed));
        for id in lost.into_iter().flatten() {
            self.withdraw(now, slot, id, out);
            self.settle(now, id, out);
        }
    }

    /// The node is gone: all that it had is free at once.
    pub(super) fn depart(&mut self, now: Duration, slot: Slot, out: &mut Out) {
        let tasks: Option<BTreeMap<TaskId, MemberId>> =
            self.nodes.get(slot).map(|node| node.tasks.clone());
        for id in tasks.into_iter().flat_map(BTreeMap::into_keys) {
            self.withdraw(now, slot, id, out);
            self.settle(now, id, out);
        }
        self.end_openings_of(now, slot, out);
        self.nodes.remove(slot);
    }

    /// Puts `guilty` out of the cluster, and tells everybody.
    pub(super) fn shut_out(&mut self, now: Duration, guilty: NodeId, out: &mut Out) {
        let all = self.verdicts.shut_out();
        for node in self.nodes.live() {
            out.push((node, ToNode::ShutOut(all.clone())));
        }
        if let Some(slot) = self.nodes.slot(guilty) {
            self.depart(now, slot, out);
        }
    }

    /// Takes a node out of a task, and finds its children other parents.
    pub(super) fn withdraw(&mut self, now: Duration, slot: Slot, id: TaskId, out: &mut Out) {
        let part = self.nodes.get_mut(slot).and_then(|node| {
            node.unconfirmed.remove(&id);
            node.tasks.remove(&id)
        });
        let Some((member, task)) = part.zip(self.tasks.get_mut(id)) else {
            return;
        };
        self.memberships -= 1;
        self.holding_bits -= u64::from(task.piece_count());
        let host = task.members.get(member).and_then(|member| member.host);
        let children = task.remove(&mut self.nodes, member);
        if let Some(host) = host {
            self.hosts.leave(host);
        }
        for &child in &children {
            let left = task.members.get(child).map_or(0, |m| m.parents.len());
            // Who has enough for now is served when somebody comes who has room.
            match left < PARENTS_LOW {
                true => drop(task.fill(now, &mut self.nodes, child)),
                false => task.queue_short(child),
            }
        }
        self.push_parents(now, id, &children, out);
    }

    /// A member has come who can be a parent: gives it to those that have too few.
    pub(super) fn offer(&mut self, now: Duration, id: TaskId, parent: MemberId, out: &mut Out) {
        if let Some(task) = self.tasks.get_mut(id) {
            let told = task.serve_short(now, &mut self.nodes, parent, PUSHES_PER_EVENT_MAX);
            self.push_parents(now, id, &told, out);
        }
    }
}
