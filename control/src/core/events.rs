//! What the core does about each event.

use std::collections::BTreeSet;
use std::time::Duration;

use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceRun};

use super::config::PUSHES_PER_EVENT_MAX;
use super::message::{FromNode, RefusedReason, TaskReport, ToNode};
use super::nodes::Slot;
use super::parents::Chooser;
use super::task;
use super::{Core, Out};

impl Core {
    pub(super) fn chooser(&self, now: Duration) -> Chooser {
        Chooser {
            seed: self.config.seed,
            now,
        }
    }

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
        if let Err(reason) = self.enter(slot, report) {
            out.push((node, ToNode::Refused { digest, reason }));
            return;
        }
        let chooser = self.chooser(now);
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        let was_complete = task.members.get(&slot).is_some_and(|m| m.complete);
        if replace || (was_complete && !report.complete) {
            task.end_leases_of(slot);
            task.clear_held(slot);
        }
        let is_at_work = !report.held.is_empty() || !report.fetching.is_empty();
        if replace && is_at_work && !report.complete {
            task.mark_announced(slot);
        }
        task.set_role(slot, report.wanted && !report.complete, report.has_source);
        task.add_held(slot, &report.held, false);
        if report.complete {
            self.complete(now, slot, digest, out);
        } else if report.wanted {
            let opened = opened.then(|| task.opening_run());
            let fetching: Vec<_> = opened.iter().chain(&report.fetching).copied().collect();
            let given = task.regrant(slot, &fetching, now, self.config.lease_ttl);
            self.leases_granted += given.len() as u64;
            out.extend(given.into_iter().map(|pieces| {
                let expires_in = self.config.lease_ttl;
                (
                    node,
                    ToNode::Lease {
                        digest,
                        pieces,
                        expires_in,
                    },
                )
            }));
            task.fill(&chooser, &self.nodes, slot);
            let peers = task.peers_of(&self.nodes, slot);
            out.push((node, ToNode::Parents { digest, peers }));
        } else if report.held.is_empty() {
            self.withdraw(now, slot, digest, out);
        }
        self.offer(now, digest, out);
        self.settle(now, digest, out);
    }

    pub(super) fn close(&mut self, now: Duration, slot: Slot, digest: BlobDigest, out: &mut Out) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        task.end_leases_of(slot);
        let has_source = false;
        task.set_role(slot, false, has_source);
        if task.members.get(&slot).is_some_and(|m| m.held_count() == 0) {
            self.withdraw(now, slot, digest, out);
        }
        self.settle(now, digest, out);
    }

    pub(super) fn dropped(&mut self, now: Duration, slot: Slot, digest: BlobDigest, out: &mut Out) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        task.clear_held(slot);
        if task.members.get(&slot).is_some_and(|m| !m.wanted) {
            self.withdraw(now, slot, digest, out);
        }
        self.settle(now, digest, out);
    }

    /// The member holds all: it needs no parents, and others may want it as theirs.
    pub(super) fn complete(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        out: &mut Out,
    ) {
        let chooser = self.chooser(now);
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if !task.members.contains_key(&slot) {
            return;
        }
        task.end_leases_of(slot);
        task.set_role(slot, false, false);
        task.set_complete(slot);
        let told = task.spread_complete(&chooser, &self.nodes, slot, PUSHES_PER_EVENT_MAX);
        self.push_parents(digest, &told, out);
    }

    pub(super) fn parent_failed(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        failed: NodeId,
        out: &mut Out,
    ) {
        let chooser = self.chooser(now);
        let Some(parent) = self.nodes.slot(failed) else {
            return;
        };
        let until = now + self.config.parent_exclusion;
        if let Some(task) = self.tasks.get_mut(&digest) {
            let changed = task.exclude(slot, parent, now, until);
            if task.fill(&chooser, &self.nodes, slot) || changed {
                self.push_parents(digest, &[slot], out);
            }
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
        let chooser = self.chooser(now);
        let ttl = self.config.lease_ttl;
        let grace_left = (self.started + self.config.start_grace).saturating_sub(now);
        let task = self.tasks.get_mut(&digest);
        let Some(task) = task.filter(|task| task.members.get(&slot).is_some_and(|m| m.wanted))
        else {
            let reason = RefusedReason::UnknownTask;
            out.push((node, ToNode::Refused { digest, reason }));
            return;
        };
        // Others may hold or fetch what they have not announced yet: a lease now could be a second
        // copy. A cluster that is as new as control has nobody to wait for.
        let own = usize::from(task.members[&slot].announced);
        let awaits_others = self.is_successor || task.announced_count > own;
        if !grace_left.is_zero() && awaits_others {
            let retry_after = grace_left;
            out.push((
                node,
                ToNode::LeaseWait {
                    digest,
                    retry_after,
                },
            ));
            return;
        }
        if let Some(pieces) = task.grant(slot, wanted, urgent, now, ttl) {
            self.leases_granted += 1;
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
            task.wait(slot, wanted);
            let retry_after = Duration::from_millis(task.waiting.len() as u64)
                .clamp(self.config.retry_min, self.config.retry_max);
            out.push((
                node,
                ToNode::LeaseWait {
                    digest,
                    retry_after,
                },
            ));
            let missing = urgent
                .map(|piece| piece.0)
                .filter(|&piece| piece < task.piece_count())
                .or_else(|| task::ascending(wanted, task.piece_count()).flatten().next());
            if let Some(piece) = missing
                && task.reach(&chooser, &self.nodes, slot, piece)
            {
                self.push_parents(digest, &[slot], out);
            }
        }
        self.settle(now, digest, out);
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
            .map_or_else(BTreeSet::new, |node| std::mem::take(&mut node.unconfirmed));
        for digest in lost {
            self.withdraw(now, slot, digest, out);
            self.settle(now, digest, out);
        }
    }

    /// The node is gone: all that it had is free at once.
    pub(super) fn depart(&mut self, now: Duration, slot: Slot, out: &mut Out) {
        let digests = self
            .nodes
            .get(slot)
            .map_or_else(BTreeSet::new, |node| node.tasks.clone());
        for digest in digests {
            self.withdraw(now, slot, digest, out);
            self.settle(now, digest, out);
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
    pub(super) fn withdraw(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        out: &mut Out,
    ) {
        let chooser = self.chooser(now);
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if !task.members.contains_key(&slot) {
            return;
        }
        self.memberships -= 1;
        self.holding_bits -= u64::from(task.piece_count());
        let children = task.remove(slot);
        for &child in &children {
            task.fill(&chooser, &self.nodes, child);
        }
        if let Some(node) = self.nodes.get_mut(slot) {
            node.tasks.remove(&digest);
            node.unconfirmed.remove(&digest);
        }
        self.push_parents(digest, &children, out);
    }

    /// Somebody has come who can be a parent: tries again for those that have too few.
    pub(super) fn offer(&mut self, now: Duration, digest: BlobDigest, out: &mut Out) {
        let chooser = self.chooser(now);
        if let Some(task) = self.tasks.get_mut(&digest) {
            let told = task.serve_short(&chooser, &self.nodes, PUSHES_PER_EVENT_MAX);
            self.push_parents(digest, &told, out);
        }
    }
}
