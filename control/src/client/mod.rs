//! The node's end of its session with control.
//!
//! [`ControlClient::start`] gives a handle, over which the node tells, and a queue of events, which it
//! must drain. The client reconnects for as long as the handle lives. It holds no state of the
//! cluster: after every [`Event::Connected`] the node sends [`Command::Announce`] with all that it has
//! (its last message with `last: true`, even where it has nothing), and only then control's picture of
//! it is right again.
//!
//! While there is no session, commands are refused ([`Unsent::Disconnected`]): the node goes on alone,
//! and what it does meanwhile is in its next announcement.

pub(crate) mod channel;
mod session;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pantala_wire::{BlobDigest, NodeId, PieceRun};
use tokio::sync::{Notify, mpsc};

use crate::core::message::{Labels, Peer, RefusedReason};
use crate::identity::Identity;

pub use crate::core::message::FromNode as Command;
pub use channel::ChannelError;

/// Commands that wait for the connection: some for each of hundreds of tasks at once.
const COMMANDS_MAX: usize = 1024;
/// Events that wait for the node. When it is full, reading stops, and control sees a slow node.
const EVENTS_MAX: usize = 256;

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Control's address, `host:port`.
    pub address: String,
    /// Who this node is.
    pub identity: Identity,
    /// Where this node's piece plane listens; an unspecified IP stands for the one control sees.
    pub advertise_addr: SocketAddr,
    /// Where this node stands.
    pub labels: Labels,
    /// What this node can send, bytes a second; found out where absent.
    pub uplink_bytes_per_s: Option<u64>,
    /// This node is here to serve others.
    pub is_seed: bool,
    /// How often the node says that it lives. Must be well below control's liveness timeout.
    pub heartbeat_interval: Duration,
    /// How long a silent control counts as alive.
    pub liveness_timeout: Duration,
}

impl ClientConfig {
    /// The configuration with the default times: a heartbeat every 5 s, dead after 15 s.
    pub fn new(address: String, identity: Identity, advertise_addr: SocketAddr) -> Self {
        Self {
            address,
            identity,
            advertise_addr,
            labels: Labels::default(),
            uplink_bytes_per_s: None,
            is_seed: false,
            heartbeat_interval: Duration::from_secs(5),
            liveness_timeout: Duration::from_secs(15),
        }
    }
}

/// What control tells the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A session has started: announce everything.
    Connected,
    /// The session has ended, or the first attempt failed; leases run out, the client tries on.
    Disconnected {
        /// Why, for people.
        reason: String,
    },
    /// All parents of this node for the blob; replaces those named before.
    Parents {
        /// The blob.
        digest: BlobDigest,
        /// The parents, the most promising first.
        peers: Vec<Peer>,
    },
    /// Pieces that this node, and no other, may fetch from the source.
    Lease {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        pieces: PieceRun,
        /// Time until the lease ends, unless progress extends it.
        expires_in: Duration,
    },
    /// Pieces that this node shall not begin to fetch: its lease on them has ended.
    LeaseCut {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        pieces: PieceRun,
    },
    /// Nothing can be leased now.
    LeaseWait {
        /// The blob.
        digest: BlobDigest,
        /// When to ask again; zero: at once.
        retry_after: Duration,
        /// Nodes that download the blob and could fetch it from the source, this one included.
        sharing_count: u32,
    },
    /// Whether this node, and no other, may fetch the first bytes of a blob of unknown size.
    Opening {
        /// The blob.
        digest: BlobDigest,
        /// Whether it may.
        granted: bool,
    },
    /// All nodes that are shut out: take nothing from them and believe no claim of theirs.
    ShutOut(Vec<NodeId>),
    /// What the node asked for this blob is not served.
    Refused {
        /// The blob.
        digest: BlobDigest,
        /// Why.
        reason: RefusedReason,
    },
}

/// A command that did not go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// There is no session; go on alone and announce at the next one.
    #[error("no session with control")]
    Disconnected,
    /// Control takes commands too slowly. The session is ended, so that the next announcement sets
    /// right what control now misses.
    #[error("control takes commands too slowly; the session starts anew")]
    Overflow,
    /// The client has stopped.
    #[error("the control client has stopped")]
    Stopped,
}

#[derive(Debug, Default)]
struct Shared {
    connected: AtomicBool,
    overflow: Notify,
}

/// The node's way to tell control. Clones share one session, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl ControlHandle {
    /// Queues `command`; never waits.
    ///
    /// # Errors
    /// [`Unsent`]: the command is gone, and the next announcement makes up for it.
    pub fn send(&self, command: Command) -> Result<(), Unsent> {
        if !self.is_connected() {
            return Err(if self.commands.is_closed() {
                Unsent::Stopped
            } else {
                Unsent::Disconnected
            });
        }
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => {
                    self.shared.overflow.notify_one();
                    Unsent::Overflow
                }
                mpsc::error::TrySendError::Closed(_) => Unsent::Stopped,
            })
    }
    /// Whether there is a session now.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }
}

/// The client's start.
#[derive(Debug)]
pub struct ControlClient;

impl ControlClient {
    /// Starts the client on the current runtime. It ends when every handle, or the receiver, is gone.
    pub fn start(config: ClientConfig) -> (ControlHandle, mpsc::Receiver<Event>) {
        let (commands, queue) = mpsc::channel(COMMANDS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Shared::default());
        tokio::spawn(session::run(config, queue, events, shared.clone()));
        (ControlHandle { commands, shared }, receiver)
    }
}
