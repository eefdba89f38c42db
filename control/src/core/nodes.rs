//! The nodes that have a session, or had one a moment ago.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use pantala_wire::NodeId;

use super::member::MemberId;
use super::message::{NodeInfo, Peer};
use super::paths::{Delivery, Paths};
use super::tasks::TaskId;

/// A node's place in the table: a small number that stands for its 32-byte name while it is here.
pub(super) type Slot = u32;

/// Where a node stands, as numbers that are quick to compare; the same name gives the same number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) host: u64,
    pub(super) rack: u64,
    pub(super) zone: u64,
    pub(super) is_seed: bool,
}

impl Place {
    /// A label that was not given.
    pub(super) const UNKNOWN: u64 = 0;

    fn of(info: &NodeInfo) -> Self {
        Self {
            host: number(&info.labels.host),
            rack: number(&info.labels.rack),
            zone: number(&info.labels.zone),
            is_seed: info.is_seed,
        }
    }

    /// How far apart two nodes stand.
    pub(super) fn distance(&self, other: &Self) -> Distance {
        let same = |a, b| a != Self::UNKNOWN && a == b;
        if same(self.host, other.host) {
            Distance::Host
        } else if same(self.rack, other.rack) {
            Distance::Rack
        } else if same(self.zone, other.zone) {
            Distance::Zone
        } else {
            Distance::Far
        }
    }
}

/// How far apart two nodes stand, the nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Distance {
    Host,
    Rack,
    Zone,
    Far,
}

/// FNV-1a. Two labels that meet in one number are taken for one place, which costs a detour at most.
fn number(label: &str) -> u64 {
    if label.is_empty() {
        return Place::UNKNOWN;
    }
    let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3_u64)
    });
    hash.max(1)
}

/// How often a node may do what is expensive, in each minute.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowance {
    minute: u64,
    used: u32,
}

impl Allowance {
    /// Takes one; false where `max` are used up.
    pub(super) fn take(&mut self, now: Duration, max: u32) -> bool {
        let minute = now.as_secs() / 60;
        if minute != self.minute {
            *self = Self { minute, used: 0 };
        }
        self.used = self.used.saturating_add(1);
        self.used <= max
    }
}

pub(super) struct Node {
    pub(super) id: NodeId,
    /// Tells it from others that have had its slot.
    pub(super) serial: u32,
    pub(super) address: SocketAddr,
    pub(super) place: Place,
    /// Set while the node has no session and the grace for coming back runs.
    pub(super) away_until: Option<Duration>,
    /// The tasks that it is a member of, and as whom.
    pub(super) tasks: BTreeMap<TaskId, MemberId>,
    /// Tasks from before the node's reconnect that it has not announced again yet.
    pub(super) unconfirmed: BTreeSet<TaskId>,
    /// Its children, in all tasks together.
    pub(super) child_count: u32,
    /// Hosts that it was the first to name.
    pub(super) hosts_named: u32,
    /// Claims that it called false: each is a signature to check.
    pub(super) accusations: Allowance,
    /// Blobs that it announced: each replaces what was known.
    pub(super) announcements: Allowance,
    /// What it delivers to others.
    pub(super) delivery: Delivery,
    /// What others deliver to it.
    pub(super) paths: Paths,
}

#[derive(Default)]
pub(super) struct Nodes {
    by_id: HashMap<NodeId, Slot>,
    slots: Vec<Option<Box<Node>>>,
    free: Vec<Slot>,
    away: BTreeSet<(Duration, Slot)>,
    next_serial: u32,
}

impl Nodes {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }
    pub(super) fn slot(&self, id: NodeId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }
    pub(super) fn get(&self, slot: Slot) -> Option<&Node> {
        self.slots.get(slot as usize)?.as_deref()
    }
    pub(super) fn get_mut(&mut self, slot: Slot) -> Option<&mut Node> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }
    /// The node in this slot, as one is told of it to whom it is `near`.
    pub(super) fn peer(&self, slot: Slot, near: bool) -> Option<Peer> {
        self.get(slot).map(|node| Peer {
            node: node.id,
            address: node.address,
            near,
        })
    }
    /// The nodes with a session, in the order of their slots.
    pub(super) fn live(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.all()
            .filter(|node| node.away_until.is_none())
            .map(|node| node.id)
    }
    pub(super) fn all(&self) -> impl Iterator<Item = &Node> + '_ {
        self.slots.iter().flatten().map(Box::as_ref)
    }

    pub(super) fn add(&mut self, id: NodeId, info: &NodeInfo) -> Slot {
        self.next_serial = self.next_serial.wrapping_add(1);
        let node = Box::new(Node {
            id,
            serial: self.next_serial,
            address: info.address,
            place: Place::of(info),
            away_until: None,
            tasks: BTreeMap::new(),
            unconfirmed: BTreeSet::new(),
            child_count: 0,
            hosts_named: 0,
            accusations: Allowance::default(),
            announcements: Allowance::default(),
            delivery: Delivery::new(info.uplink_bytes_per_s),
            paths: Paths::default(),
        });
        let slot = self.free.pop().unwrap_or(self.slots.len() as Slot);
        if slot as usize == self.slots.len() {
            self.slots.push(Some(node));
        } else {
            self.slots[slot as usize] = Some(node);
        }
        self.by_id.insert(id, slot);
        slot
    }
    /// The node is back: where it listens may have changed. Its place counts from its next tasks on.
    pub(super) fn renew(&mut self, slot: Slot, info: &NodeInfo) {
        self.set_away(slot, None);
        if let Some(node) = self.get_mut(slot) {
            node.address = info.address;
            node.place = Place::of(info);
            node.delivery.configure(info.uplink_bytes_per_s);
            node.unconfirmed = node.tasks.keys().copied().collect();
        }
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
}
