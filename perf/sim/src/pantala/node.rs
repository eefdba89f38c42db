//! A node of the simulation: its downloads, its store, what it serves, its session.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use pantala_control::core::FromNode;
use pantala_swarm::{Download, Input, RequestId};
use pantala_wire::{NodeId, PieceIndex, PieceRun, PieceSet, Priority};

use crate::network::FlowId;
use crate::scenario::{Habit, Pull};

/// Stands for an author that is not kept track of.
pub(super) const NOBODY: u32 = u32::MAX;

/// A request that is under way.
#[derive(Debug, Clone)]
pub(super) enum Live {
    Parent {
        parent: u32,
        piece: u32,
    },
    Source {
        run: PieceRun,
        /// The piece that comes next.
        next: u32,
        flow: Option<FlowId>,
        leased: bool,
    },
}

/// One download and the shell around it.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) machine: Download,
    pub(super) inbox: Vec<Input>,
    pub(super) wake_at: Option<Duration>,
    pub(super) live: BTreeMap<RequestId, Live>,
    /// Parents subscribed to, and the token of each subscription.
    pub(super) subscriptions: BTreeMap<u32, u64>,
    /// Leased pieces that are not held yet.
    pub(super) leased: PieceSet,
    /// Where the reader stands; `None` where nobody reads.
    pub(super) reader_at: Option<u32>,
    pub(super) rechecking: BTreeSet<u32>,
}

/// A child that listens to what a node holds of a blob.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) node: u32,
    pub(super) token: u64,
    /// How much of the store's log it has been told.
    pub(super) told_count: usize,
    pub(super) told_complete: bool,
}

/// What a node has of a blob.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) held: PieceSet,
    /// The pieces in the order in which they came, for the children.
    pub(super) log: Vec<u32>,
    pub(super) complete: bool,
    /// Pieces that are not what the source has. Empty where nobody forges.
    pub(super) bad: BTreeSet<u32>,
    /// Who vouches for each piece. Empty where nobody forges.
    pub(super) authors: BTreeMap<u32, u32>,
    /// Who sent a piece.
    pub(super) relayers: BTreeMap<u32, u32>,
    pub(super) children: Vec<Child>,
    /// An event to tell the children is queued.
    pub(super) telling: bool,
    /// When they were told last.
    pub(super) told_at: Duration,
}

impl Stored {
    pub(super) fn new(piece_count: u32) -> Self {
        Self {
            held: PieceSet::empty(piece_count),
            log: Vec::new(),
            complete: false,
            bad: BTreeSet::new(),
            authors: BTreeMap::new(),
            relayers: BTreeMap::new(),
            children: Vec::new(),
            telling: false,
            told_at: Duration::ZERO,
        }
    }

    /// The first piece from `from` on that is not held.
    pub(super) fn first_missing(&self, from: u32) -> u32 {
        let count = self.held.piece_count();
        (from..count)
            .find(|&piece| !self.held.contains(PieceIndex(piece)))
            .unwrap_or(count)
    }
}

/// A piece that was asked for and is to be sent.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    pub(super) child: u32,
    pub(super) blob: u32,
    pub(super) request: RequestId,
    pub(super) piece: u32,
    pub(super) first_group: u32,
    pub(super) priority: Priority,
}

impl Upload {
    /// The semaphore that its turn is of.
    pub(super) fn class(&self) -> usize {
        match self.priority {
            Priority::Fault => 0,
            Priority::Client => 1,
            Priority::Bulk | Priority::Prefetch => 2,
        }
    }
}

/// What travels on a connection: one piece at a time, the most urgent first, as the node's transport
/// sends it.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) queue: VecDeque<Upload>,
    pub(super) active: Option<(FlowId, Upload)>,
}

/// The serving side of a node.
#[derive(Debug, Default)]
pub(super) struct Server {
    pub(super) turns_used: [usize; 3],
    pub(super) waiting: [VecDeque<Upload>; 3],
    pub(super) lines: BTreeMap<u32, Line>,
    /// Requests in `waiting` and `lines`.
    pub(super) places_used: usize,
}

/// A node's session with control.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// Names the session, or the attempt at one; 0 where there is none.
    pub(super) number: u64,
    pub(super) connected: bool,
    pub(super) resumed: bool,
    pub(super) failures: u32,
}

/// What became of a pull.
#[derive(Debug, Clone)]
pub(super) struct PullState {
    pub(super) pull: Pull,
    pub(super) at: Duration,
    pub(super) started: Option<Duration>,
    pub(super) done: Option<Duration>,
    pub(super) failed: Option<String>,
}

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) group: u32,
    pub(super) habit: Habit,
    pub(super) has_source: bool,
    pub(super) alive: bool,
    /// Counts its lives: what was sent to an earlier one does not arrive.
    pub(super) epoch: u32,
    pub(super) session: Session,
    pub(super) tasks: BTreeMap<u32, Task>,
    pub(super) stores: BTreeMap<u32, Stored>,
    pub(super) server: Server,
    /// Nodes that it has a connection to, to fetch over.
    pub(super) connections: BTreeSet<u32>,
    pub(super) shut_out: Rc<BTreeSet<NodeId>>,
    /// False claims that it has found: said again in each session.
    pub(super) accusations: Vec<FromNode>,
    pub(super) pulls: Vec<PullState>,
}

impl Node {
    pub(super) fn holds(&self, blob: u32, piece: u32) -> bool {
        self.stores
            .get(&blob)
            .is_some_and(|stored| stored.held.contains(PieceIndex(piece)))
    }
}
