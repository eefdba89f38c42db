//! What can happen, and the order in which it does: by time, then as it was queued.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::time::Duration;

use pantala_control::core::{FromNode, ToNode};
use pantala_swarm::{Failure, Gone, RequestId};
use pantala_wire::{PieceRun, Priority};

/// What one node says to another.
#[derive(Debug, Clone)]
pub(super) enum PeerMessage {
    Subscribe {
        blob: u32,
        token: u64,
    },
    Unsubscribe {
        blob: u32,
        token: u64,
    },
    Fetch {
        blob: u32,
        request: RequestId,
        piece: u32,
        first_group: u32,
        priority: Priority,
    },
    Cancel {
        blob: u32,
        request: RequestId,
    },
    Have {
        blob: u32,
        token: u64,
        runs: Rc<[PieceRun]>,
        complete: bool,
    },
    /// The last byte of a piece.
    Piece {
        blob: u32,
        request: RequestId,
        piece: u32,
        bad: bool,
        author: u32,
    },
    Refusal {
        blob: u32,
        request: RequestId,
        failure: Failure,
    },
    Gone {
        blob: u32,
        token: u64,
        reason: Gone,
    },
}

/// Something that happens at its time.
#[derive(Debug)]
pub(super) enum Event {
    /// The process of a node starts.
    Start { node: u32 },
    /// A client of a node asks for a blob.
    Pull { node: u32, number: u32 },
    /// A download has inputs, or its timer is due.
    Wake { node: u32, blob: u32 },
    /// A node tells its children what is new.
    Tell { node: u32, blob: u32 },
    /// A message between nodes; `epoch` is the life of the receiver that it is for.
    Peer {
        from: u32,
        to: u32,
        epoch: u32,
        message: PeerMessage,
    },
    /// The connection over which `child` fetches from `parent` is found broken.
    Broken { child: u32, parent: u32 },
    /// A request reaches the registry.
    SourceAsk {
        node: u32,
        epoch: u32,
        ask: SourceAsk,
    },
    /// The registry begins to answer.
    SourceAnswer {
        node: u32,
        epoch: u32,
        ask: SourceAsk,
    },
    /// The last byte of a piece from the registry is here.
    SourcePiece {
        node: u32,
        epoch: u32,
        ask: SourceAsk,
        piece: u32,
    },
    /// The registry refuses.
    SourceRefusal {
        node: u32,
        epoch: u32,
        ask: SourceAsk,
    },
    /// The sha256 of a whole blob is computed.
    Verified { node: u32, epoch: u32, blob: u32 },
    /// A node tries to open a session with control.
    Connect { node: u32, epoch: u32 },
    /// Control hears of a new session.
    Hello { node: u32, epoch: u32, session: u64 },
    /// The node hears that its session stands.
    Welcome { node: u32, session: u64 },
    /// A message to control.
    ToControl {
        node: u32,
        session: u64,
        message: Box<FromNode>,
    },
    /// A message from control.
    ToNode {
        node: u32,
        session: u64,
        message: Box<ToNode>,
    },
    /// The node finds its session gone.
    SessionLost { node: u32, session: u64 },
    /// Control finds it gone.
    SessionLeft { node: u32, session: u64 },
    /// Something is due in the core of control.
    ControlTick,
    /// Control goes away, or comes back.
    Outage { number: u32, begins: bool },
    /// The fault of a node happens.
    Fault { node: u32 },
}

/// Whose request to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SourceAsk {
    Fetch { blob: u32, request: RequestId },
    Recheck { blob: u32, piece: u32 },
}

#[derive(Debug)]
struct Queued {
    at: Duration,
    number: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// The one queue of a world.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<Queued>>,
    next_number: u64,
}

impl Queue {
    pub(super) fn push(&mut self, at: Duration, event: Event) {
        self.next_number += 1;
        self.heap.push(Reverse(Queued {
            at,
            number: self.next_number,
            event,
        }));
    }
    pub(super) fn next_at(&self) -> Option<Duration> {
        self.heap.peek().map(|Reverse(queued)| queued.at)
    }
    pub(super) fn pop(&mut self) -> Option<(Duration, Event)> {
        self.heap
            .pop()
            .map(|Reverse(queued)| (queued.at, queued.event))
    }
}
