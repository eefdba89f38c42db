//! Who fetches from whom.
//!
//! The parents of all members make a mesh: each has some, nobody has too many children, and members
//! that hold the blob come first. A choice looks at a bounded sample of the members, so that an event
//! costs the same in a task of ten nodes and of ten thousand.

use std::time::Duration;

use super::config::{
    CANDIDATES_MAX, CHILDREN_HARD_MAX, CHILDREN_SOFT_MAX, EXCLUDED_MAX, PARENTS_LOW, PARENTS_MAX,
    PARENTS_TARGET,
};
use super::message::Peer;
use super::nodes::{Nodes, Slot};
use super::task::Task;

/// Mixes a number well (the finaliser of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A choice between equals that is the same whenever it is made, and differs from task to task.
pub(super) struct Chooser {
    pub(super) seed: u64,
    pub(super) now: Duration,
}

impl Chooser {
    fn weight(&self, task: &Task, a: u64, b: u64) -> u64 {
        let blob = task
            .digest
            .as_bytes()
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        mix(mix(mix(self.seed ^ blob).wrapping_add(a)).wrapping_add(b))
    }
}

impl Task {
    /// Links both ways where both download: else whoever comes last has no children, and what it alone
    /// fetched from the source goes nowhere.
    fn link(&mut self, child: Slot, parent: Slot) {
        self.link_one_way(child, parent);
        let is_mutual = self.members.get(&parent).is_some_and(|member| {
            member.wanted
                && member.parents.len() < PARENTS_MAX
                && !member.parents.contains(&child)
                && !member.excluded.iter().any(|&(slot, _)| slot == child)
        });
        if is_mutual {
            self.link_one_way(parent, child);
            self.linked.push(parent);
        }
    }
    fn link_one_way(&mut self, child: Slot, parent: Slot) {
        if let Some(member) = self.members.get_mut(&child) {
            member.parents.push(parent);
        }
        if let Some(member) = self.members.get_mut(&parent) {
            member.children.push(child);
        }
    }
    pub(super) fn unlink(&mut self, child: Slot, parent: Slot) -> bool {
        if let Some(member) = self.members.get_mut(&parent) {
            member.children.retain(|&slot| slot != child);
        }
        self.members.get_mut(&child).is_some_and(|member| {
            let before = member.parents.len();
            member.parents.retain(|&slot| slot != parent);
            member.parents.len() < before
        })
    }
    pub(super) fn drop_parents(&mut self, child: Slot) {
        let Some(member) = self.members.get_mut(&child) else {
            return;
        };
        let parents = std::mem::take(&mut member.parents);
        if let Some(ticket) = member.short.take() {
            self.short.remove(&ticket);
        }
        for parent in parents {
            self.unlink(child, parent);
        }
    }
    /// Takes all its children from a member; gives those that lost it.
    pub(super) fn drop_children(&mut self, parent: Slot) -> Vec<Slot> {
        let children = self
            .members
            .get_mut(&parent)
            .map_or_else(Vec::new, |member| std::mem::take(&mut member.children));
        for &child in &children {
            self.unlink(child, parent);
        }
        children
    }

    /// Whether `parent` may be given to `child`, with `children_max` children at most.
    fn is_candidate(
        &self,
        nodes: &Nodes,
        now: Duration,
        child: Slot,
        parent: Slot,
        children_max: usize,
    ) -> bool {
        let (Some(it), Some(other)) = (self.members.get(&child), self.members.get(&parent)) else {
            return false;
        };
        child != parent
            && nodes.is_live(parent)
            && (other.wanted || other.held_count() > 0)
            && other.children.len() < children_max
            && !it.parents.contains(&parent)
            && !it.excludes(parent, now)
    }

    /// Up to [`CANDIDATES_MAX`] of `all`, from a place that depends on the child.
    fn sample<'a>(
        &self,
        chooser: &Chooser,
        all: &'a [Slot],
        child: Slot,
        salt: u64,
    ) -> impl Iterator<Item = Slot> + use<'a> {
        let start = match all.len() {
            0 => 0,
            len => (self.weight_of(chooser, child, salt) % len as u64) as usize,
        };
        let (before, after) = all.split_at(start);
        after.iter().chain(before).copied().take(CANDIDATES_MAX)
    }
    fn weight_of(&self, chooser: &Chooser, child: Slot, salt: u64) -> u64 {
        chooser.weight(self, u64::from(child), salt)
    }

    /// Gives `child` parents until it has [`PARENTS_TARGET`]; true if it got any.
    pub(super) fn fill(&mut self, chooser: &Chooser, nodes: &Nodes, child: Slot) -> bool {
        let Some(member) = self.members.get(&child) else {
            return false;
        };
        if !member.wanted {
            return false;
        }
        let before = member.parents.len();
        self.fill_to(chooser, nodes, child, PARENTS_TARGET, CHILDREN_SOFT_MAX);
        self.fill_to(chooser, nodes, child, PARENTS_LOW, CHILDREN_HARD_MAX);
        let after = self.members.get(&child).map_or(0, |m| m.parents.len());
        if after < PARENTS_TARGET {
            self.queue_short(child);
        }
        after > before
    }

    fn fill_to(
        &mut self,
        chooser: &Chooser,
        nodes: &Nodes,
        child: Slot,
        target: usize,
        children_max: usize,
    ) {
        let have = self.members.get(&child).map_or(0, |m| m.parents.len());
        if have >= target {
            return;
        }
        // The salt moves the window over a large task when one sample was not enough.
        let salt = self.short.len() as u64 ^ (have as u64) << 32;
        let mut candidates: Vec<Slot> = self
            .sample(chooser, &self.complete, child, salt)
            .chain(self.sample(chooser, &self.order, child, salt))
            .filter(|&slot| self.is_candidate(nodes, chooser.now, child, slot, children_max))
            .collect();
        candidates.sort_by_cached_key(|&slot| {
            let member = &self.members[&slot];
            (
                !member.complete,
                // In steps, so that distance counts among parents with about equal load.
                member.children.len() / 4,
                nodes.distance(child, slot),
                chooser.weight(self, u64::from(child), u64::from(slot)),
                slot,
            )
        });
        candidates.dedup();
        for parent in candidates.into_iter().take(target - have) {
            self.link(child, parent);
        }
    }

    fn queue_short(&mut self, slot: Slot) {
        let ticket = self.ticket();
        if let Some(member) = self.members.get_mut(&slot)
            && member.short.is_none()
        {
            member.short = Some(ticket);
            self.short.insert(ticket, slot);
        }
    }

    /// Tries again for up to `max` members that have too few parents; those that got some.
    pub(super) fn serve_short(
        &mut self,
        chooser: &Chooser,
        nodes: &Nodes,
        max: usize,
    ) -> Vec<Slot> {
        let slots: Vec<Slot> = self.short.values().copied().take(max).collect();
        slots
            .into_iter()
            .filter(|&slot| {
                if let Some(ticket) = self.members.get_mut(&slot).and_then(|m| m.short.take()) {
                    self.short.remove(&ticket);
                }
                self.fill(chooser, nodes, slot)
            })
            .collect()
    }

    /// A member has become complete: gives it as a parent to some that have no complete one.
    pub(super) fn spread_complete(
        &mut self,
        chooser: &Chooser,
        nodes: &Nodes,
        parent: Slot,
        max: usize,
    ) -> Vec<Slot> {
        let chosen: Vec<Slot> = self
            .sample(chooser, &self.order, parent, 0)
            .filter(|&child| {
                self.members.get(&child).is_some_and(|member| {
                    member.wanted
                        && member.parents.len() < PARENTS_MAX
                        && !member
                            .parents
                            .iter()
                            .any(|other| self.members.get(other).is_some_and(|m| m.complete))
                }) && self.is_candidate(nodes, chooser.now, child, parent, CHILDREN_SOFT_MAX)
            })
            .take(max)
            .collect();
        let room = CHILDREN_SOFT_MAX
            - self
                .members
                .get(&parent)
                .map_or(0, |m| m.children.len())
                .min(CHILDREN_SOFT_MAX);
        let chosen: Vec<Slot> = chosen.into_iter().take(room).collect();
        for &child in &chosen {
            self.link(child, parent);
        }
        chosen
    }

    /// Sees to it that `child`, which waits for `piece`, has a parent that holds it, where any member
    /// holds it and has room; true if its parents changed.
    pub(super) fn reach(
        &mut self,
        chooser: &Chooser,
        nodes: &Nodes,
        child: Slot,
        piece: u32,
    ) -> bool {
        let Some(member) = self.members.get(&child) else {
            return false;
        };
        let holds = |slot: &Slot| {
            nodes.is_live(*slot) && self.members.get(slot).is_some_and(|m| m.holds(piece))
        };
        if self.holder_count(piece) == 0 || member.parents.iter().any(holds) {
            return false;
        }
        let salt = u64::from(piece) ^ chooser.now.as_millis() as u64;
        let holder = self
            .sample(chooser, &self.complete, child, salt)
            .chain(self.fetcher(piece))
            .chain(self.sample(chooser, &self.order, child, salt))
            .find(|slot| {
                holds(slot)
                    && self.is_candidate(nodes, chooser.now, child, *slot, CHILDREN_HARD_MAX)
            });
        let Some(holder) = holder else { return false };
        if member.parents.len() >= PARENTS_MAX
            && let Some(least) = member
                .parents
                .iter()
                .copied()
                .min_by_key(|slot| self.members.get(slot).map_or(0, |m| m.held_count()))
        {
            self.unlink(child, least);
        }
        self.link(child, holder);
        true
    }

    /// `parent` has failed `child`; true if it was its parent.
    pub(super) fn exclude(
        &mut self,
        child: Slot,
        parent: Slot,
        now: Duration,
        until: Duration,
    ) -> bool {
        if let Some(member) = self.members.get_mut(&child) {
            member
                .excluded
                .retain(|&(slot, until)| slot != parent && now < until);
            if member.excluded.len() >= EXCLUDED_MAX {
                member.excluded.remove(0);
            }
            member.excluded.push((parent, until));
        }
        self.unlink(child, parent)
    }

    /// The parents of `child`, the most promising first.
    pub(super) fn peers_of(&self, nodes: &Nodes, child: Slot) -> Vec<Peer> {
        let Some(member) = self.members.get(&child) else {
            return Vec::new();
        };
        let mut parents = member.parents.clone();
        parents.sort_by_key(|slot| {
            std::cmp::Reverse(self.members.get(slot).map_or(0, |m| m.held_count()))
        });
        parents
            .into_iter()
            .filter_map(|slot| nodes.peer(slot))
            .collect()
    }
}
