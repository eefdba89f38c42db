//! Who fetches from whom.
//!
//! The parents of all members make a mesh: each has some, and nobody more children than its uplink
//! serves. Pieces flow from who holds one to who lacks it, so that the plan of each piece is a graph
//! without cycles whatever the mesh looks like. A choice looks at a bounded sample of the members, so
//! that an event costs the same in a task of ten nodes and of a hundred thousand.

use std::time::Duration;

use pantala_wire::BlobDigest;

use super::config::{
    CANDIDATES, CHILDREN_LAST, EXCLUDED_MAX, HOLDERS_SAMPLED, PARENTS_LOW, PARENTS_MAX,
    PARENTS_NEAR_MAX, PARENTS_TARGET, SEED_FACTOR,
};
use super::member::{MemberId, Roll};
use super::message::Peer;
use super::nodes::{Distance, Node, Nodes};
use super::task::Task;

/// Mixes a number well (the finaliser of SplitMix64).
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Makes choices between equals differ from cluster to cluster and from task to task.
pub(super) fn task_salt(seed: u64, digest: &BlobDigest) -> u64 {
    let blob = digest
        .as_bytes()
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    mix(seed ^ blob)
}

/// How full a parent may be to be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    /// As many children as its uplink serves well.
    Soft,
    /// For those that have too few parents.
    Hard,
    /// For those that lack a piece which few hold: also a demoted parent is better than none.
    Last,
}

impl Bound {
    fn children_max(self, now: Duration, node: &Node) -> usize {
        match self {
            Self::Soft => node.delivery.children_soft(now),
            Self::Hard => node.delivery.children_hard(now),
            Self::Last => node.delivery.children_hard(now).max(CHILDREN_LAST),
        }
    }
}

impl Task {
    /// Links both ways where both download and there is room: else whoever comes last has no children,
    /// and what it alone fetched from the source goes nowhere.
    fn link(&mut self, now: Duration, nodes: &mut Nodes, child: MemberId, parent: MemberId) {
        self.link_one_way(now, nodes, child, parent);
        let has_need = self
            .members
            .get(parent)
            .is_some_and(|member| member.wanted && member.parents.len() < PARENTS_MAX);
        if has_need
            && !self.is_too_near(parent, child)
            && self.is_candidate(now, nodes, parent, child, Bound::Soft)
        {
            self.link_one_way(now, nodes, parent, child);
            self.linked.push(parent);
            let count = self.members.get(parent).map_or(0, |m| m.parents.len());
            if count >= PARENTS_TARGET {
                self.unqueue_short(parent);
            }
        }
    }
    fn link_one_way(
        &mut self,
        now: Duration,
        nodes: &mut Nodes,
        child: MemberId,
        parent: MemberId,
    ) {
        let slots = self
            .members
            .get(child)
            .zip(self.members.get(parent))
            .map(|(child, parent)| (child.slot, parent.slot));
        let Some((child_slot, parent_slot)) = slots else {
            return;
        };
        if let Some(member) = self.members.get_mut(child) {
            member.parents.push(parent);
        }
        if let Some(member) = self.members.get_mut(parent) {
            member.children.push(child);
        }
        let serial = nodes.get_mut(parent_slot).map(|node| {
            node.child_count += 1;
            node.serial
        });
        if let Some((node, serial)) = nodes.get_mut(child_slot).zip(serial) {
            node.paths.named(serial, now);
        }
    }
    pub(super) fn unlink(&mut self, nodes: &mut Nodes, child: MemberId, parent: MemberId) -> bool {
        if let Some(member) = self.members.get_mut(parent) {
            let before = member.children.len();
            member.children.retain(|&other| other != child);
            let lost = before - member.children.len();
            if let Some(node) = nodes.get_mut(member.slot) {
                node.child_count -= lost as u32;
            }
        }
        self.members.get_mut(child).is_some_and(|member| {
            let before = member.parents.len();
            member.parents.retain(|&other| other != parent);
            member.parents.len() < before
        })
    }
    pub(super) fn drop_parents(&mut self, nodes: &mut Nodes, child: MemberId) {
        self.unqueue_short(child);
        let Some(member) = self.members.get_mut(child) else {
            return;
        };
        for parent in std::mem::take(&mut member.parents) {
            self.unlink(nodes, child, parent);
        }
    }
    /// Takes all its children from a member; gives those that lost it.
    pub(super) fn drop_children(&mut self, nodes: &mut Nodes, parent: MemberId) -> Vec<MemberId> {
        let children = self
            .members
            .get(parent)
            .map_or_else(Vec::new, |member| member.children.clone());
        for &child in &children {
            self.unlink(nodes, child, parent);
        }
        children
    }

    /// Whether `parent` may be given to `child`.
    fn is_candidate(
        &self,
        now: Duration,
        nodes: &Nodes,
        child: MemberId,
        parent: MemberId,
        bound: Bound,
    ) -> bool {
        let (Some(it), Some(other)) = (self.members.get(child), self.members.get(parent)) else {
            return false;
        };
        child != parent
            && (other.wanted || other.held_count() > 0)
            && !it.parents.contains(&parent)
            && !it.excludes(other.slot, now)
            && nodes.get(other.slot).is_some_and(|node| {
                node.away_until.is_none()
                    && node.has_room()
                    && other.children.len() < bound.children_max(now, node)
            })
    }

    /// Up to `count` of `all`, from a place that depends on the child.
    fn sample<'a>(
        &self,
        all: &'a [MemberId],
        child: MemberId,
        salt: u64,
        count: usize,
    ) -> impl Iterator<Item = MemberId> + use<'a> {
        let start = match all.len() {
            0 => 0,
            len => (self.weight(u64::from(child), salt) % len as u64) as usize,
        };
        let (before, after) = all.split_at(start);
        after.iter().chain(before).copied().take(count)
    }
    fn weight(&self, a: u64, b: u64) -> u64 {
        mix(mix(self.salt.wrapping_add(a)).wrapping_add(b))
    }

    /// How good `parent` is for `child`: the bytes a second that it is predicted to deliver, weighed by
    /// how much of the blob it has. Equals differ by a little that depends on both.
    fn score(
        &self,
        now: Duration,
        nodes: &Nodes,
        child: (&Node, MemberId),
        parent: MemberId,
        is_linked: bool,
    ) -> u64 {
        let Some(other) = self.members.get(parent) else {
            return 0;
        };
        let rate = nodes.predicted(now, child.0, other.slot, is_linked);
        let held = match other.complete {
            true => 1.0,
            false => {
                0.5 + 0.5 * f64::from(other.held_count()) / f64::from(self.piece_count().max(1))
            }
        };
        let seed = if other.place.is_seed {
            SEED_FACTOR
        } else {
            1.0
        };
        let tie = self.weight(u64::from(child.1), u64::from(parent)) % 1024;
        (rate * held * seed * (1.0 + tie as f64 / 8192.0)) as u64
    }

    /// Gives `child` parents until it has [`PARENTS_TARGET`]; true if it got any.
    pub(super) fn fill(&mut self, now: Duration, nodes: &mut Nodes, child: MemberId) -> bool {
        let Some(member) = self.members.get(child).filter(|member| member.wanted) else {
            return false;
        };
        let before = member.parents.len();
        if before < PARENTS_TARGET {
            self.fill_to(now, nodes, child, PARENTS_TARGET, Bound::Soft);
        }
        let count = |task: &Self| task.members.get(child).map_or(0, |m| m.parents.len());
        if count(self) < PARENTS_LOW {
            self.fill_to(now, nodes, child, PARENTS_LOW, Bound::Hard);
        }
        let after = count(self);
        if after < PARENTS_TARGET {
            self.queue_short(child);
        } else {
            self.unqueue_short(child);
        }
        after > before
    }

    fn fill_to(
        &mut self,
        now: Duration,
        nodes: &mut Nodes,
        child: MemberId,
        target: usize,
        bound: Bound,
    ) {
        let Some(member) = self.members.get(child) else {
            return;
        };
        let Some(node) = nodes.get(member.slot) else {
            return;
        };
        let (place, have) = (member.place, member.parents.len());
        // The salt moves the window over a large task when one sample was not enough.
        let salt = self.next_ticket ^ (have as u64) << 32;
        let mut candidates: Vec<(u64, MemberId)> = Vec::with_capacity(64);
        for (roll, count) in CANDIDATES {
            let found = self
                .sample(self.members.roll(roll, &place), child, salt, count)
                .filter(|&id| self.is_candidate(now, nodes, child, id, bound))
                .map(|id| (self.score(now, nodes, (node, child), id, false), id));
            candidates.extend(found);
        }
        candidates.sort_unstable_by_key(|&(score, id)| (std::cmp::Reverse(score), id));
        candidates.dedup();
        let mut left = target - have;
        for (_, parent) in candidates {
            if left > 0 && (bound != Bound::Soft || !self.is_too_near(child, parent)) {
                self.link(now, nodes, child, parent);
                left -= 1;
            }
        }
    }

    /// Whether `child` has enough parents of its own rack, and `parent` would be another. A rack whose
    /// nodes have no parents but each other waits for the same pieces together.
    fn is_too_near(&self, child: MemberId, parent: MemberId) -> bool {
        let Some(member) = self.members.get(child) else {
            return false;
        };
        let is_near = |&id: &MemberId| {
            self.members.get(id).is_some_and(|other| {
                !other.complete && member.place.distance(&other.place) <= Distance::Rack
            })
        };
        let rack_len = self.members.roll(Roll::Rack, &member.place).len();
        is_near(&parent)
            && rack_len < self.members.len()
            && member.parents.iter().copied().filter(is_near).count() >= PARENTS_NEAR_MAX
    }

    pub(super) fn queue_short(&mut self, child: MemberId) {
        let ticket = self.ticket();
        if let Some(member) = self.members.get_mut(child)
            && member.short.is_none()
        {
            member.short = Some(ticket);
            self.short.insert(ticket, child);
        }
    }
    fn unqueue_short(&mut self, child: MemberId) {
        if let Some(ticket) = self.members.get_mut(child).and_then(|m| m.short.take()) {
            self.short.remove(&ticket);
        }
    }

    /// Gives a member that has come, or has more than before, to up to `max` of those that have too few
    /// parents; who got it.
    pub(super) fn serve_short(
        &mut self,
        now: Duration,
        nodes: &mut Nodes,
        parent: MemberId,
        max: usize,
    ) -> Vec<MemberId> {
        let mut served = Vec::new();
        let first: Vec<MemberId> = self.short.values().copied().take(max).collect();
        for child in first {
            if !self.is_candidate(now, nodes, child, parent, Bound::Soft)
                || self.is_too_near(child, parent)
            {
                continue;
            }
            self.link(now, nodes, child, parent);
            self.unqueue_short(child);
            let count = self.members.get(child).map_or(0, |m| m.parents.len());
            if count < PARENTS_TARGET {
                self.queue_short(child);
            }
            served.push(child);
        }
        served
    }

    /// A member has become complete: gives it as a parent to some that have no complete one.
    pub(super) fn spread_complete(
        &mut self,
        now: Duration,
        nodes: &mut Nodes,
        parent: MemberId,
        max: usize,
    ) -> Vec<MemberId> {
        let has_complete = |task: &Self, parents: &[MemberId]| {
            parents
                .iter()
                .any(|&other| task.members.get(other).is_some_and(|m| m.complete))
        };
        let chosen: Vec<MemberId> = self
            .sample(self.members.all(), parent, 0, HOLDERS_SAMPLED)
            .filter(|&child| {
                self.members.get(child).is_some_and(|member| {
                    member.wanted
                        && member.parents.len() < PARENTS_MAX
                        && !has_complete(self, &member.parents)
                })
            })
            .take(max)
            .collect();
        let mut told = Vec::new();
        for child in chosen {
            if self.is_candidate(now, nodes, child, parent, Bound::Soft) {
                self.link(now, nodes, child, parent);
                told.push(child);
            }
        }
        told
    }

    /// Sees to it that `child`, which waits for `piece`, has a parent that holds it, where any member
    /// holds it and has room; true if its parents changed.
    pub(super) fn reach(
        &mut self,
        now: Duration,
        nodes: &mut Nodes,
        child: MemberId,
        piece: u32,
    ) -> bool {
        let Some(member) = self.members.get(child) else {
            return false;
        };
        let holds = |id: &MemberId| {
            self.members.get(*id).is_some_and(|m| {
                m.holds(piece) && nodes.get(m.slot).is_some_and(|n| n.away_until.is_none())
            })
        };
        if self.holder_count(piece) == 0 || member.parents.iter().any(holds) {
            return false;
        }
        let salt = u64::from(piece) ^ now.as_millis() as u64;
        let fetcher = self.fetcher(piece);
        // Who fetched a piece has passed it on to its children.
        let of_fetcher = fetcher.and_then(|id| self.members.get(id));
        let of_fetcher = of_fetcher.map_or(&[] as &[_], |m| m.children.as_slice());
        let holder = self
            .sample(self.members.complete(), child, salt, HOLDERS_SAMPLED)
            .chain(fetcher)
            .chain(self.sample(of_fetcher, child, salt, HOLDERS_SAMPLED))
            .chain(self.sample(self.members.all(), child, salt, HOLDERS_SAMPLED))
            .find(|id| holds(id) && self.is_candidate(now, nodes, child, *id, Bound::Last));
        let Some(holder) = holder else { return false };
        if member.parents.len() >= PARENTS_MAX
            && let Some(least) = member
                .parents
                .iter()
                .copied()
                .min_by_key(|&id| self.members.get(id).map_or(0, |m| m.held_count()))
        {
            self.unlink(nodes, child, least);
        }
        self.link(now, nodes, child, holder);
        true
    }

    /// `parent` has failed `child`; true if it was its parent.
    pub(super) fn exclude(
        &mut self,
        nodes: &mut Nodes,
        child: MemberId,
        parent: MemberId,
        now: Duration,
        until: Duration,
    ) -> bool {
        let Some(slot) = self.members.get(parent).map(|member| member.slot) else {
            return false;
        };
        if let Some(member) = self.members.get_mut(child) {
            member
                .excluded
                .retain(|&(_, other, until)| other != slot && now < until);
            if member.excluded.len() >= EXCLUDED_MAX {
                member.excluded.remove(0);
            }
            member.excluded.push((parent, slot, until));
        }
        self.unlink(nodes, child, parent)
    }

    /// The parents of `child`, the most promising first.
    pub(super) fn peers_of(&self, now: Duration, nodes: &Nodes, child: MemberId) -> Vec<Peer> {
        let Some(member) = self.members.get(child) else {
            return Vec::new();
        };
        let Some(node) = nodes.get(member.slot) else {
            return Vec::new();
        };
        let mut parents: Vec<(u64, MemberId)> = member
            .parents
            .iter()
            .map(|&id| (self.score(now, nodes, (node, child), id, true), id))
            .collect();
        parents.sort_unstable_by_key(|&(score, id)| (std::cmp::Reverse(score), id));
        parents
            .into_iter()
            .filter_map(|(_, id)| {
                let parent = self.members.get(id)?;
                let near = member.place.distance(&parent.place) <= Distance::Rack;
                nodes.peer(parent.slot, near)
            })
            .collect()
    }
}
