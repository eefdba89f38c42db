//! Fetches a piece from a parent into the store, verifying each group before anyone can read it.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use pantala_quic::{Blame, Error as QuicError, RecvStream};
use pantala_store::StoreError;
use pantala_swarm::{Author, Failure, Input, RequestId};
use pantala_wire::claim::ClaimError;
use pantala_wire::message::{self, refusal, request, response};
use pantala_wire::tree::{TreeError, check_group_digests};
use pantala_wire::{ByteRange, Claim, GROUP_SIZE, GroupDigest, NodeId, PieceIndex, Priority};

use tokio::sync::Semaphore;

use super::Shared;
use super::task::Task;
use crate::metrics::{Origin, OutcomeLabel};

/// Bytes collected before they are written at once: enough that switching threads costs little beside
/// hashing them, few enough that a reader who waits for them notices no steps. The most that a request
/// holds while nothing is written; the machine bounds the requests. The store takes as much again for
/// each part that is being written, and as many are as there are threads to block.
const PART_BYTES: u64 = 4 * GROUP_SIZE;
/// The same for the first part of what somebody waits for: one group, so that it is handed on at once.
const FIRST_PART_BYTES: u64 = GROUP_SIZE;
/// Parts collected, over all downloads, while another part of their request is written: 16 MiB at most,
/// and as much again where small packets pin their receive buffers. Past it, a request does one after
/// the other.
const PARTS_AHEAD_MAX: usize = 64;

/// Turns to collect a part while the one before it is written.
static PARTS_AHEAD: Semaphore = Semaphore::const_new(PARTS_AHEAD_MAX);

/// How much of a parent's own words is kept.
const DETAIL_CHARS_MAX: usize = 200;

/// Why a parent did not deliver.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Quic(#[from] QuicError),
    #[error("the parent refuses: {0:?} {1}")]
    Refused(refusal::Reason, String),
    #[error("the parent ended the stream early")]
    Short,
    #[error("the parent sent a frame that does not belong here")]
    Unexpected,
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error("the piece is vouched for by {0}, which is shut out")]
    Author(NodeId),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FetchError {
    /// What it means for the download, and its name in the metrics.
    fn failure(&self, ask: &PieceRequest) -> (Failure, &'static str) {
        match self {
            Self::Quic(error) if error.blame() == Blame::Peer && !error.is_retryable() => {
                (Failure::Lied, "malformed")
            }
            Self::Quic(_) | Self::Short => (Failure::Unreachable, "unreachable"),
            Self::Refused(refusal::Reason::Busy, _) => (Failure::Busy, "busy"),
            Self::Refused(refusal::Reason::NotHeld, _) => (Failure::NotHeld, "not_held"),
            Self::Refused(_, detail) => {
                let detail = detail.chars().take(DETAIL_CHARS_MAX).collect();
                (Failure::Refused { detail }, "refused")
            }
            Self::Author(_) => {
                let detail = self.to_string();
                (Failure::Refused { detail }, "refused")
            }
            Self::Unexpected => (Failure::Lied, "malformed"),
            Self::Claim(_) | Self::Tree(_) => (Failure::Lied, "wrong_digest"),
            // Every group of this request matched; those before it are another parent's.
            Self::Store(StoreError::WrongDigest { .. }) if ask.first_group > 0 => {
                (Failure::Conflict, "conflict")
            }
            Self::Store(StoreError::WrongGroup { .. } | StoreError::WrongDigest { .. }) => {
                (Failure::Lied, "wrong_bytes")
            }
            Self::Store(
                StoreError::Unwritten(_) | StoreError::Dropped(_) | StoreError::BeingRead(_),
            ) => (Failure::Conflict, "conflict"),
            Self::Store(_) => (Failure::Stalled, "store"),
        }
    }

    /// The store's own fault, which no other parent can mend.
    fn of_the_store(&self) -> Option<String> {
        let Self::Store(error) = self else {
            return None;
        };
        let of_the_data = matches!(
            error,
            StoreError::WrongGroup { .. }
                | StoreError::WrongDigest { .. }
                | StoreError::Unwritten(_)
                | StoreError::Dropped(_)
                | StoreError::BeingRead(_)
        );
        (!of_the_data).then(|| error.to_string())
    }
}

/// What to fetch, from whom, how urgently.
#[derive(Debug, Clone, Copy)]
pub(super) struct PieceRequest {
    pub(super) request: RequestId,
    pub(super) parent: NodeId,
    pub(super) piece: PieceIndex,
    pub(super) first_group: u32,
    pub(super) priority: Priority,
}

/// Performs `Action::Fetch` and reports its outcome to the task.
pub(super) async fn run(shared: Arc<Shared>, task: Arc<Task>, ask: PieceRequest) {
    let started = std::time::Instant::now();
    let result = {
        let _asking = shared.peers.paths().ask(ask.parent);
        fetch(&shared, &task, ask).await
    };
    let failure = result.as_ref().err().map(|error| error.failure(&ask));
    let outcome = failure.as_ref().map_or("ok", |(_, label)| *label);
    shared
        .metrics
        .peer_requests
        .get_or_create(&OutcomeLabel { outcome })
        .inc();
    let request = ask.request;
    match (result, failure) {
        (Ok(author), _) => {
            let seconds = started.elapsed().as_secs_f64();
            shared.metrics.peer_piece.observe(seconds);
            shared.board.ring(&task.digest);
            task.input(Input::PieceDone {
                request: Some(request),
                piece: ask.piece,
                author: Author::Other(author),
            })
            .await;
            task.input(Input::RequestDone { request }).await;
        }
        (Err(error), failure) => {
            tracing::info!(digest = %task.digest, parent = ?ask.parent, piece = ask.piece.0, %error, "piece not delivered");
            if let (None, Some((failure, _))) = (error.of_the_store(), &failure)
                && is_of_the_path(failure)
            {
                shared.peers.paths().failed(ask.parent);
            }
            match (error.of_the_store(), failure) {
                (None, Some((failure, _))) => {
                    task.input(Input::RequestFailed { request, failure }).await;
                }
                (reason, _) => {
                    let reason = reason.unwrap_or_default();
                    task.input(Input::StoreFailed { reason }).await;
                }
            }
        }
    }
}

/// Whether another child of this parent might see the same: its being busy or without the piece is no
/// fault.
fn is_of_the_path(failure: &Failure) -> bool {
    matches!(
        failure,
        Failure::Unreachable | Failure::Stalled | Failure::Lied
    )
}

async fn fetch(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    ask: PieceRequest,
) -> Result<NodeId, FetchError> {
    let connection = shared.peers.connection(ask.parent).await?;
    let (mut send, mut recv) = connection.open(ask.priority).await?;
    send.write_frame(&message::Request {
        digest: task.digest.as_bytes().to_vec().into(),
        kind: Some(request::Kind::Fetch(message::Fetch {
            piece: ask.piece.0,
            first_group: ask.first_group,
            group_count: 0,
            priority: ask.priority as u32,
        })),
    })
    .await?;
    send.finish()?;

    let head = match recv.read_frame::<message::Response>().await? {
        None => return Err(FetchError::Short),
        Some(message::Response {
            kind: Some(response::Kind::Piece(head)),
        }) => head,
        Some(message::Response {
            kind: Some(response::Kind::Refusal(refusal)),
        }) => return Err(FetchError::Refused(refusal.reason(), refusal.detail)),
        Some(_) => return Err(FetchError::Unexpected),
    };
    let layout = task.blob.layout();
    let range = layout
        .piece_range(ask.piece)
        .ok_or(FetchError::Unexpected)?;
    let skipped = u64::from(ask.first_group) * GROUP_SIZE;
    if head.piece != ask.piece.0
        || head.first_group != ask.first_group
        || u64::from(head.length) + skipped != range.len()
    {
        return Err(FetchError::Unexpected);
    }
    let claim = Claim::try_from(head.claim.as_ref().ok_or(ClaimError::Malformed)?)?;
    claim.verify(&task.digest, ask.piece)?;
    if shared.peers.is_shut_out(&claim.author) {
        return Err(FetchError::Author(claim.author));
    }
    let groups = check_group_digests(&layout, ask.piece, &head.group_digests, &claim.piece_digest)?;
    let receipt = Receipt {
        shared: Arc::clone(shared),
        task: Arc::clone(task),
        ask,
        range,
        claim,
        groups,
    };
    receipt.receive(&mut recv).await?;
    task.relayers.lock().insert(ask.piece, ask.parent);
    Ok(claim.author)
}

/// A piece that a parent is sending.
struct Receipt {
    shared: Arc<Shared>,
    task: Arc<Task>,
    ask: PieceRequest,
    /// The bytes of the whole piece.
    range: ByteRange,
    claim: Claim,
    groups: Vec<GroupDigest>,
}

impl Receipt {
    /// Takes the piece's bytes off the stream, verified group by group. While one part is hashed and
    /// written, the next is collected.
    async fn receive(&self, recv: &mut RecvStream) -> Result<(), FetchError> {
        let first_bytes = match self.ask.priority {
            Priority::Fault | Priority::Client => FIRST_PART_BYTES,
            Priority::Bulk | Priority::Prefetch => PART_BYTES,
        };
        let Some(mut part) = self.part_from(self.start(), first_bytes) else {
            return Ok(());
        };
        let mut slices = collect(recv, part).await?;
        while let Some(next) = self.part_from(part.end(), PART_BYTES) {
            let Ok(_turn) = PARTS_AHEAD.try_acquire() else {
                self.write(part, slices).await?;
                slices = collect(recv, next).await?;
                part = next;
                continue;
            };
            let mut writing = pin!(self.write(part, slices));
            let mut collecting = pin!(collect(recv, next));
            slices = tokio::select! {
                collected = &mut collecting => {
                    // Also where the parent has failed: what came before that is right and counts.
                    writing.await?;
                    collected?
                }
                written = &mut writing => {
                    written?;
                    collecting.await?
                }
            };
            part = next;
        }
        self.write(part, slices).await
    }

    /// Where the bytes that were asked for start.
    fn start(&self) -> u64 {
        self.range.start() + u64::from(self.ask.first_group) * GROUP_SIZE
    }

    /// Up to `len` bytes from `at` on; `None` at the end.
    fn part_from(&self, at: u64, len: u64) -> Option<ByteRange> {
        ByteRange::new(at, self.range.end().min(at + len))
    }

    /// Verifies and writes a part, and tells everybody who waits for it.
    async fn write(&self, part: ByteRange, slices: Vec<Bytes>) -> Result<(), FetchError> {
        let first = ((part.start() - self.range.start()) / GROUP_SIZE) as usize;
        let count = part.len().div_ceil(GROUP_SIZE) as usize;
        let expected = self.groups[first..first + count].to_vec();
        let last = part.end() == self.range.end();
        let (piece, claim) = (self.ask.piece, self.claim);
        let (shared, task) = (Arc::clone(&self.shared), Arc::clone(&self.task));
        super::blocking(move || {
            let started = std::time::Instant::now();
            let written = task
                .blob
                .write_verified_slices(part.start(), &slices, &expected)
                .and_then(|()| match last {
                    true => task.blob.commit_piece(piece, claim),
                    false => Ok(()),
                });
            let seconds = started.elapsed().as_secs_f64();
            shared.metrics.store_write.observe(seconds);
            match written {
                // A duplicate of this request delivered the piece meanwhile.
                Err(StoreError::AlreadyHeld(_)) => Ok(()),
                other => other,
            }
        })
        .await?;
        self.task.by_peer.add(self.ask.parent, part.len());
        self.shared.by_peer.add(self.ask.parent, part.len());
        self.shared
            .peers
            .paths()
            .received(self.ask.parent, part.len());
        self.shared.metrics.received(Origin::Peer, part.len());
        self.shared.board.ring(&self.task.digest);
        let progress = Input::Progress {
            request: self.ask.request,
            groups: (part.end() - self.start()).div_ceil(GROUP_SIZE) as u32,
        };
        self.task.input(progress).await;
        Ok(())
    }
}

/// The bytes of `part`, off the stream, as they were decrypted.
async fn collect(recv: &mut RecvStream, part: ByteRange) -> Result<Vec<Bytes>, FetchError> {
    let mut slices = Vec::new();
    let mut missing = part.len() as usize;
    while missing > 0 {
        let came = recv.read_slices(missing).await?;
        if came.is_empty() {
            return Err(FetchError::Short);
        }
        missing -= came.iter().map(Bytes::len).sum::<usize>();
        slices.extend(came);
    }
    Ok(slices)
}
