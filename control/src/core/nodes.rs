//! The nodes that have a session, or had one a moment ago.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use pantala_wire::{BlobDigest, NodeId};

use super::message::{NodeInfo, Peer};

/// A node's place in the table: a small number that stands for its 32-byte name while it is here.
pub(super) type Slot = u32;

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) info: NodeInfo,
    /// Set while the node has no session and the grace for coming back runs.
    pub(super) away_until: Option<Duration>,
    pub(super) tasks: BTreeSet<BlobDigest>,
    /// Tasks from before the node's reconnect that it has not announced again yet.
    pub(super) unconfirmed: BTreeSet<BlobDigest>,
}

#[derive(Default)]
pub(super) struct Nodes {
    by_id: HashMap<NodeId, Slot>,
    slots: Vec<Option<Node>>,
    free: Vec<Slot>,
    away: BTreeSet<(Duration, Slot)>,
}

impl Nodes {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }
    pub(super) fn slot(&self, id: NodeId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }
    pub(super) fn get(&self, slot: Slot) -> Option<&Node> {
        self.slots.get(slot as usize)?.as_ref()
    }
    pub(super) fn get_mut(&mut self, slot: Slot) -> Option<&mut Node> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }
    pub(super) fn is_live(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|node| node.away_until.is_none())
    }
    pub(super) fn peer(&self, slot: Slot) -> Option<Peer> {
        self.get(slot).map(|node| Peer {
            node: node.id,
            address: node.info.address,
        })
    }
    /// The nodes with a session, in the order of their slots.
    pub(super) fn live(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.slots
            .iter()
            .flatten()
            .filter(|node| node.away_until.is_none())
            .map(|node| node.id)
    }

    pub(super) fn add(&mut self, id: NodeId, info: NodeInfo) -> Slot {
        let node = Node {
            id,
            info,
            away_until: None,
            tasks: BTreeSet::new(),
            unconfirmed: BTreeSet::new(),
        };
        let slot = self.free.pop().unwrap_or(self.slots.len() as Slot);
        if slot as usize == self.slots.len() {
            self.slots.push(Some(node));
        } else {
            self.slots[slot as usize] = Some(node);
        }
        self.by_id.insert(id, slot);
        slot
    }
    /// The node has lost its session and keeps its place until `until`.
    pub(super) fn set_away(&mut self, slot: Slot, until: Option<Duration>) {
        let Some(node) = self.get_mut(slot) else {
            return;
        };
        let before = std::mem::replace(&mut node.away_until, until);
        if let Some(before) = before {
            self.away.remove(&(before, slot));
        }
        if let Some(until) = until {
            self.away.insert((until, slot));
        }
    }
    /// The next end of a grace, and whose.
    pub(super) fn next_departure(&self) -> Option<(Duration, Slot)> {
        self.away.first().copied()
    }
    pub(super) fn remove(&mut self, slot: Slot) {
        self.set_away(slot, None);
        if let Some(node) = self.slots.get_mut(slot as usize).and_then(Option::take) {
            self.by_id.remove(&node.id);
            self.free.push(slot);
        }
    }

    /// How far apart two nodes stand: 0 the same machine, 1 the same rack, 2 the same zone, 3 else.
    pub(super) fn distance(&self, a: Slot, b: Slot) -> u8 {
        let (Some(a), Some(b)) = (self.get(a), self.get(b)) else {
            return 3;
        };
        let same = |x: &str, y: &str| !x.is_empty() && x == y;
        let (a, b) = (&a.info.labels, &b.info.labels);
        if same(&a.host, &b.host) {
            0
        } else if same(&a.rack, &b.rack) {
            1
        } else if same(&a.zone, &b.zone) {
            2
        } else {
            3
        }
    }
}
