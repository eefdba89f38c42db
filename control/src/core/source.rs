//! What nodes say of their source: what they fetched from it, which host it is, and that it is asked
//! too much.

use std::time::Duration;

use pantala_wire::{BlobDigest, PieceRun};

use super::config::{ESTIMATES_MAX, HOSTS_PER_NODE_MAX};
use super::message::{RefusedReason, ToNode};
use super::nodes::Slot;
use super::progress::TaskEstimate;
use super::tasks::TaskId;
use super::{Core, Out};

impl Core {
    /// Leased pieces have come. What was not leased to the node is held like any other, and renews
    /// nothing: its lease may have ended meanwhile, or it lies.
    pub(super) fn fetched(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        pieces: &[PieceRun],
        out: &mut Out,
    ) {
        let Some((id, member)) = self.part(slot, &digest) else {
            return;
        };
        if self.refuses_runs(slot, id, &[pieces], out) {
            return;
        }
        let ttl = self.config.lease_ttl;
        if let Some(task) = self.tasks.get_mut(id) {
            let renewed_at = task.renewed_at(member, ttl);
            let leased = task.leased_count(member, pieces);
            let gained = task.add_held(member, pieces, true);
            task.progress.gained(now, gained);
            task.release(member, pieces);
            if leased > 0 {
                if let Some(at) = renewed_at {
                    task.progress.fetched(leased, now.saturating_sub(at));
                }
                task.renew(member, now + ttl);
            } else {
                self.forged_fetches += 1;
            }
        }
        self.settle(now, id, out);
        self.serve_waiting(now, id, out);
    }

    /// A member holds more than before.
    pub(super) fn holding(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        runs: &[PieceRun],
        complete: bool,
        out: &mut Out,
    ) {
        let Some((id, member)) = self.part(slot, &digest) else {
            return;
        };
        if self.refuses_runs(slot, id, &[runs], out) {
            return;
        }
        if let Some(task) = self.tasks.get_mut(id) {
            let gained = task.add_held(member, runs, false);
            task.progress.gained(now, gained);
        }
        if complete {
            self.complete(now, id, member, out);
        }
        self.settle(now, id, out);
    }

    /// Whether the node names pieces that the blob does not have. Then nothing of what it says counts:
    /// a node that cannot count cannot be believed.
    pub(super) fn refuses_runs(
        &mut self,
        slot: Slot,
        id: TaskId,
        lists: &[&[PieceRun]],
        out: &mut Out,
    ) -> bool {
        let Some(task) = self.tasks.get(id) else {
            return false;
        };
        let count = u64::from(task.piece_count());
        let is_outside = |run: &PieceRun| u64::from(run.first) + u64::from(run.count) > count;
        if !lists.iter().copied().flatten().any(is_outside) {
            return false;
        }
        self.impossible_runs += 1;
        if let Some(node) = self.nodes.get(slot) {
            let digest = task.digest;
            let reason = RefusedReason::Impossible;
            out.push((node.id, ToNode::Refused { digest, reason }));
        }
        true
    }

    /// The node would fetch this blob from `host`.
    pub(super) fn source_host(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        host: &str,
    ) {
        let Some((id, member)) = self.part(slot, &digest) else {
            return;
        };
        let Some(member) = self
            .tasks
            .get_mut(id)
            .and_then(|task| task.members.get_mut(member))
        else {
            return;
        };
        if self.hosts.find(host).is_none()
            && let Some(node) = self.nodes.get_mut(slot)
        {
            if node.hosts_named >= HOSTS_PER_NODE_MAX {
                self.absurd_reports += 1;
                return;
            }
            node.hosts_named += 1;
        }
        let entered = self.hosts.enter(host, now);
        if let Some(before) = std::mem::replace(&mut member.host, entered) {
            self.hosts.leave(before);
        }
    }

    /// A registry has turned the node away. Only who has a lease on it can know.
    pub(super) fn source_limited(
        &mut self,
        now: Duration,
        slot: Slot,
        host: &str,
        retry_after: Option<Duration>,
    ) {
        let Some(host) = self.hosts.find(host) else {
            return;
        };
        let of_node = self.nodes.get(slot).map(|node| &node.tasks);
        let has_lease = of_node.is_some_and(|tasks| {
            tasks.iter().any(|(id, member)| {
                let member = self
                    .tasks
                    .get(*id)
                    .and_then(|task| task.members.get(*member));
                member.is_some_and(|member| member.host == Some(host) && !member.leases.is_empty())
            })
        });
        match has_lease {
            true => self.hosts.complained(host, now, retry_after),
            false => self.absurd_reports += 1,
        }
    }

    /// How the tasks come along that most nodes wait for.
    pub(super) fn estimates(&self, now: Duration) -> Vec<TaskEstimate> {
        let mut tasks: Vec<(usize, TaskId)> = self
            .tasks
            .all()
            .filter(|task| task.wanted_count > 0)
            .filter_map(|task| Some((task.wanted_count, self.tasks.find(&task.digest)?)))
            .collect();
        tasks.sort_unstable_by_key(|&(wanted, id)| (std::cmp::Reverse(wanted), id));
        let first = tasks.into_iter().take(ESTIMATES_MAX);
        first
            .filter_map(|(_, id)| Some(self.tasks.get(id)?.estimate(now)))
            .collect()
    }
}
