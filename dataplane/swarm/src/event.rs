//! What goes into a download and what comes out of it.

use std::time::Duration;

use pantala_wire::{ByteRange, NodeId, PieceIndex, PieceRun, Priority};

/// Names one request to a parent or to the source; never used twice by a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Names one reader of the blob; the caller chooses the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReaderId(pub u64);

/// Who vouches for a piece: the node that fetched it from the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// This node fetched it.
    This,
    /// That node did, and signed a claim.
    Other(NodeId),
    /// Held since before this download and not known.
    Unknown,
}

/// A node that control names as a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Who it is.
    pub id: NodeId,
    /// It stands in this node's rack: what comes from it crosses no link that racks share.
    pub near: bool,
}

impl From<NodeId> for Candidate {
    /// A candidate of which nobody knows where it stands.
    fn from(id: NodeId) -> Self {
        Self { id, near: false }
    }
}

/// Something that happened. The shell reports it with [`Download::handle`](crate::Download::handle).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A reader wants `range`, from its start on: new, or moved. Repeated as the reader advances.
    Want {
        /// The reader.
        reader: ReaderId,
        /// What it still has to read.
        range: ByteRange,
        /// How urgent the start of the range is. The first pieces of a `Fault` or `Client` range
        /// are fetched in order; the rest of it is bulk.
        priority: Priority,
    },
    /// The reader is gone or has read all.
    Unwant {
        /// The reader.
        reader: ReaderId,
    },
    /// The whole blob is wanted: as `Prefetch`, or else as `Bulk`.
    FetchAll {
        /// `Prefetch`, or anything else for bulk.
        priority: Priority,
    },
    /// `FetchAll` no longer holds.
    FetchAllEnd,
    /// Control can be reached.
    ControlUp,
    /// Control cannot be reached.
    ControlDown,
    /// Control's candidates, best first; replaces the list before. This node is not among them.
    Parents(Vec<Candidate>),
    /// A subscribed parent offers more pieces. The first, possibly empty, says that it is connected.
    Have {
        /// The parent.
        parent: NodeId,
        /// Pieces that it holds, besides those it named before.
        runs: Vec<PieceRun>,
        /// It holds all of them.
        complete: bool,
    },
    /// A subscription ended, or never began. Its requests are taken as failed.
    ParentGone {
        /// The parent.
        parent: NodeId,
        /// Why.
        reason: Gone,
    },
    /// Control grants this node the right to fetch these pieces from the source.
    Lease {
        /// The pieces.
        pieces: PieceRun,
        /// For how long.
        expires_in: Duration,
    },
    /// Control takes these pieces out of the lease again: others are faster. The piece that a request is
    /// at is brought to its end; what comes after it is not begun.
    LeaseCut {
        /// The pieces.
        pieces: PieceRun,
    },
    /// Control has shut these nodes out: what they vouch for is not to be believed.
    ShutOut(Vec<NodeId>),
    /// Control has nothing to lease now: others are fetching the pieces asked for, or hold them.
    LeaseWait {
        /// When to ask again.
        retry_after: Duration,
        /// Nodes that download the blob and could fetch it from the source, this one included.
        sharing_count: u32,
    },
    /// Bytes of a request arrived, verified.
    Progress {
        /// The request.
        request: RequestId,
        /// Groups of it that are written so far, from its start on without a gap.
        groups: u32,
    },
    /// A piece is verified and stored. Valid even after its request was cancelled.
    PieceDone {
        /// The request that brought it; `None` if it came otherwise.
        request: Option<RequestId>,
        /// The piece.
        piece: PieceIndex,
        /// Who vouches for it.
        author: Author,
    },
    /// A request ended well: each of its pieces was reported with `PieceDone` before.
    RequestDone {
        /// The request.
        request: RequestId,
    },
    /// A request failed. Pieces of it reported before stay held.
    RequestFailed {
        /// The request.
        request: RequestId,
        /// Why.
        failure: Failure,
    },
    /// Whether the node has a credential that the source accepts for this blob. `true` also
    /// revives a source that counted as dead.
    SourceChanged {
        /// It has.
        available: bool,
    },
    /// The store cannot write or read any more.
    StoreFailed {
        /// What it said.
        reason: String,
    },
    /// A held piece was found rotten and dropped.
    PieceLost {
        /// The piece.
        piece: PieceIndex,
    },
    /// The answer to [`Action::Verify`].
    Verified {
        /// The sha256 is the blob's.
        ok: bool,
    },
    /// The answer to [`Action::Recheck`].
    Rechecked {
        /// The piece.
        piece: PieceIndex,
        /// What the source says.
        outcome: Recheck,
    },
    /// Time passed; due at [`Download::next_timeout`](crate::Download::next_timeout).
    Tick,
}

/// Why a subscription ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// No connection could be made.
    Unreachable,
    /// The connection or the stream ended.
    Closed,
    /// The parent dropped the blob: what it offered is void. No fault of its.
    Dropped,
    /// The parent does not hold the blob, or refused the subscription.
    Refused,
    /// The parent broke the protocol or gave wrong data.
    Lied,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Parent: the connection is lost or cannot be made.
    Unreachable,
    /// Parent or source: nothing arrived for too long.
    Stalled,
    /// Parent: too many requests at once.
    Busy,
    /// Parent: it does not hold the piece.
    NotHeld,
    /// Parent: its bytes do not match the digests it sent, or its claim is not its author's. It is
    /// shut out.
    Lied,
    /// Parent: its digests differ from those of groups that another parent sent before. Nobody is
    /// blamed; the piece is fetched whole from one parent.
    Conflict,
    /// Parent: it cannot serve this piece, or its claim is by an author who is shut out.
    Refused {
        /// What it said.
        detail: String,
    },
    /// Source: a fault that may pass (cut, 429, 5xx, timeout).
    Retry {
        /// What the source asks to wait.
        after: Option<Duration>,
        /// What happened, for the operator.
        detail: String,
    },
    /// Source: it will not give this blob (404, wrong length, forbidden address).
    Fatal(String),
    /// Source: it refuses the credential.
    Unauthorised,
}

/// What the source said of a piece in an audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recheck {
    /// The piece is what the source has.
    Same,
    /// The piece was another; the source's is stored in its place, in this node's name.
    Replaced {
        /// Who vouched for the wrong one.
        author: Author,
    },
    /// The source did not answer.
    Failed(Failure),
}

/// Something to do. The shell takes it with [`Download::poll_action`](crate::Download::poll_action).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Connect to a parent and report its `Have`s, or `ParentGone`.
    Subscribe {
        /// The parent.
        parent: NodeId,
    },
    /// End a subscription; nothing more may be reported of it, since a new one may follow at once.
    /// Its requests were cancelled before.
    Unsubscribe {
        /// The parent.
        parent: NodeId,
        /// It stalled, could not be reached or lied: control should know. False where it merely makes
        /// room or is not needed.
        failed: bool,
    },
    /// Ask a parent for a piece, from `first_group` to its end.
    Fetch {
        /// Names the request.
        request: RequestId,
        /// The parent.
        parent: NodeId,
        /// The piece.
        piece: PieceIndex,
        /// The groups before it are written already. If 0, all are written again.
        first_group: u32,
        /// How urgent.
        priority: Priority,
    },
    /// End a request; nothing need be reported of it any more but pieces that are done.
    Cancel {
        /// The request.
        request: RequestId,
    },
    /// Ask control for a lease; it answers with `Lease` or `LeaseWait`.
    AskLease {
        /// Missing pieces that no known parent offers, most urgent first.
        wanted: Vec<PieceRun>,
        /// The most urgent of them.
        urgent: PieceIndex,
    },
    /// Give leased pieces back to control unfetched.
    ReturnLease {
        /// The pieces.
        pieces: PieceRun,
    },
    /// Fetch pieces from the source, in order. `PieceDone` for each, then `RequestDone`.
    FetchSource {
        /// Names the request.
        request: RequestId,
        /// The pieces.
        pieces: PieceRun,
        /// Control granted them; else this node acts alone.
        leased: bool,
        /// How urgent.
        priority: Priority,
    },
    /// Compare the sha256 of the whole blob with its digest; answer with `Verified`.
    Verify,
    /// Ask the source for a piece again and compare; answer with `Rechecked`.
    Recheck {
        /// The piece.
        piece: PieceIndex,
    },
    /// A node did wrong; tell control and shut it out.
    Blame {
        /// The node.
        node: NodeId,
        /// What it did.
        why: Blame,
    },
    /// The blob is whole and its sha256 right.
    Complete,
    /// The download has failed; every request was cancelled before.
    Fail {
        /// Why.
        reason: FailReason,
    },
}

/// What a node is blamed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// As a parent, it sent bytes or claims that contradict themselves.
    WrongBytes,
    /// As an author, it signed a digest that is not that of the source's piece.
    FalseClaim(PieceIndex),
}

/// Where a download stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Pieces are missing (wanted or not).
    Running,
    /// All pieces are held; the blob's sha256 is being checked, or the wrong piece sought.
    Verifying,
    /// All pieces are held and the sha256 is right.
    Complete,
    /// It ended without the blob. Only a new download can try again.
    Failed(FailReason),
}

/// Why a download failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FailReason {
    /// Nobody can give the missing pieces.
    #[error("no parent offers the missing pieces and there is no source for them: {last}")]
    NoSource {
        /// The last thing that went wrong.
        last: String,
    },
    /// The source does not give the blob, and no parent can.
    #[error("the source does not give the blob ({0}), and no parent has the missing pieces")]
    Source(String),
    /// The source refuses the credential, and no parent can help.
    #[error("the source refuses the credentials, and no parent has the missing pieces")]
    Unauthorised,
    /// Nothing progressed for too long.
    #[error("no progress for {idle_s} s; last fault: {last}")]
    Stuck {
        /// How long, in seconds.
        idle_s: u64,
        /// The last thing that went wrong.
        last: String,
    },
    /// The pieces are what the source gives, but their sha256 is not the blob's digest.
    #[error("the source's bytes do not have the blob's sha256")]
    SourceCorrupt,
    /// The sha256 is wrong and the source cannot be asked which piece is.
    #[error("the blob's sha256 is wrong and the source cannot be asked for the wrong piece: {0}")]
    Unaudited(String),
    /// The store failed.
    #[error("the store failed: {0}")]
    Store(String),
}
