//! What the core is told and what it answers, free of any encoding.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex, PieceRun};

/// Where a node stands in the building, for preferring near parents; empty where not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels {
    /// The machine.
    pub host: String,
    /// The rack.
    pub rack: String,
    /// The zone or row.
    pub zone: String,
}

/// What a node says about itself when its session starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Where its piece plane listens.
    pub address: SocketAddr,
    /// Where it stands.
    pub labels: Labels,
    /// Its process had a session before, so the cluster is older than this connection.
    pub resumed: bool,
    /// What its operator says that it can send, bytes a second.
    pub uplink_bytes_per_s: Option<u64>,
    /// It is here to serve others: they are given it before nodes that are not.
    pub is_seed: bool,
}

impl Default for NodeInfo {
    /// A new process that says nothing of itself, not even where it listens.
    fn default() -> Self {
        Self {
            address: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
            labels: Labels::default(),
            resumed: false,
            uplink_bytes_per_s: None,
            is_seed: false,
        }
    }
}

/// What a node got from one parent since it reported last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathReport {
    /// The parent.
    pub node: NodeId,
    /// Verified bytes that it delivered.
    pub bytes: u64,
    /// Time in which at least one request to it was under way.
    pub busy: Duration,
    /// Requests that it failed, its being busy left out.
    pub failures: u32,
}

/// A node that another may fetch pieces from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Who it is; its certificate must say the same.
    pub node: NodeId,
    /// Where its piece plane listens.
    pub address: SocketAddr,
    /// It stands in the rack of the node that is told of it.
    pub near: bool,
}

/// What a node has of a blob and does about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskReport {
    /// The blob.
    pub digest: BlobDigest,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// The node can fetch the blob from its source itself.
    pub has_source: bool,
    /// The node downloads the blob; else it only serves what it holds.
    pub wanted: bool,
    /// The node holds the whole blob and has verified its sha256.
    pub complete: bool,
    /// Pieces that it holds, verified.
    pub held: Vec<PieceRun>,
    /// Pieces that it is fetching from the source under a lease it was given earlier.
    pub fetching: Vec<PieceRun>,
}

/// What a node tells control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromNode {
    /// The node starts to download a blob; answered with `Parents` now and whenever they change.
    OpenTask {
        /// The blob.
        digest: BlobDigest,
        /// Bytes of the blob.
        size_bytes: u64,
        /// The node can fetch the blob from its source itself.
        has_source: bool,
        /// Pieces that it holds already.
        held: Vec<PieceRun>,
        /// It holds the whole blob, verified, and is here to serve.
        complete: bool,
    },
    /// Asks for the first [`OPENING_BYTES`](super::config::OPENING_BYTES) of a blob whose size the node
    /// does not know; answered with `Opening`. Who is granted it fetches them and opens the task, which
    /// makes a lease of it, or returns it.
    AskOpening {
        /// The blob.
        digest: BlobDigest,
    },
    /// The node got nothing from the source: somebody else may try.
    ReturnOpening {
        /// The blob.
        digest: BlobDigest,
    },
    /// The node downloads the blob no longer; what it holds it goes on serving.
    CloseTask {
        /// The blob.
        digest: BlobDigest,
    },
    /// Asks for pieces to fetch from the source; answered with `Lease`, `LeaseWait` or `Refused`.
    AskLease {
        /// The blob.
        digest: BlobDigest,
        /// Pieces that the node lacks and would fetch, ascending.
        wanted: Vec<PieceRun>,
        /// The piece that it needs first.
        urgent: Option<PieceIndex>,
    },
    /// The registry host that the node would fetch the blob from; counts for its leases from now on.
    SourceHost {
        /// The blob.
        digest: BlobDigest,
        /// The host, with its port where it is not the usual one.
        host: String,
    },
    /// A registry has told the node that it is asked too much (429, or 503 with a time).
    SourceLimited {
        /// The host.
        host: String,
        /// When it may be asked again, as it says.
        retry_after: Option<Duration>,
    },
    /// Gives leased pieces back that the node will not fetch.
    ReturnLease {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        pieces: Vec<PieceRun>,
    },
    /// Leased pieces that the node has fetched and now holds; extends its other leases of the task.
    Fetched {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        pieces: Vec<PieceRun>,
    },
    /// Pieces that the node holds, verified, and did not name before.
    Holding {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        runs: Vec<PieceRun>,
        /// It now holds the whole blob and has verified its sha256.
        complete: bool,
    },
    /// The node holds nothing of the blob any more.
    Dropped {
        /// The blob.
        digest: BlobDigest,
    },
    /// A parent did not deliver to this node.
    ParentFailed {
        /// The blob.
        digest: BlobDigest,
        /// The parent.
        node: NodeId,
    },
    /// A piece is not what its author signed.
    FalseClaim {
        /// The blob.
        digest: BlobDigest,
        /// The piece.
        piece: PieceIndex,
        /// What the author signed.
        claim: Claim,
        /// What the source gives.
        true_digest: PieceDigest,
        /// The node that sent the piece with this claim.
        relayer: NodeId,
    },
    /// What the node got from its parents lately.
    Paths {
        /// One report for each parent, [`PATHS_PER_REPORT_MAX`](super::config::PATHS_PER_REPORT_MAX) at
        /// most.
        reports: Vec<PathReport>,
    },
    /// What the node has, after a connect; may come in many messages.
    Announce {
        /// One report for each blob.
        holdings: Vec<TaskReport>,
        /// The announcement ends with this message: what the node does not name, it does not have.
        last: bool,
    },
}

/// Why control does not do what a node asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusedReason {
    /// A bound of control is reached; the node goes on alone.
    Full,
    /// The blob has another size according to the others, or one that cannot be.
    Size,
    /// The node did not open the task, or control has forgotten it: open it again.
    UnknownTask,
    /// The node is shut out.
    ShutOut,
    /// It names pieces that the blob does not have.
    Impossible,
}

impl fmt::Display for RefusedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "control has reached one of its bounds",
            Self::Size => "the size is not the one that other nodes name, or cannot be",
            Self::UnknownTask => "control does not know that this node has the task open",
            Self::ShutOut => "this node is shut out of the cluster",
            Self::Impossible => "pieces were named that the blob does not have",
        })
    }
}

/// What control tells a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToNode {
    /// All parents of the node for this blob; replaces those named before.
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
    /// Pieces that the node shall not begin to fetch: its lease on them has ended, as others are faster.
    LeaseCut {
        /// The blob.
        digest: BlobDigest,
        /// The pieces.
        pieces: PieceRun,
    },
    /// Nothing can be leased to this node now.
    LeaseWait {
        /// The blob.
        digest: BlobDigest,
        /// When to ask again; zero: something has come free, ask at once.
        retry_after: Duration,
        /// Nodes that download the blob and could fetch it from the source, this one included.
        sharing_count: u32,
    },
    /// The answer to `AskOpening`.
    Opening {
        /// The blob.
        digest: BlobDigest,
        /// Whether this node, and no other, may fetch the blob's first bytes from the source. If not,
        /// somebody has or fetches them, or may.
        granted: bool,
    },
    /// All nodes that are shut out.
    ShutOut(Vec<NodeId>),
    /// The node's request is not served.
    Refused {
        /// The blob.
        digest: BlobDigest,
        /// Why.
        reason: RefusedReason,
    },
}
