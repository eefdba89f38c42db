//! Fetches a piece from a parent into the store, verifying each group before anyone can read it.

use std::sync::Arc;

use bytes::BytesMut;
use pantala_quic::{Blame, Error as QuicError, RecvStream};
use pantala_store::StoreError;
use pantala_swarm::{Author, Failure, Input, RequestId};
use pantala_wire::claim::ClaimError;
use pantala_wire::message::{self, refusal, request, response};
use pantala_wire::tree::{TreeError, check_group_digests};
use pantala_wire::{Claim, GROUP_SIZE, GroupDigest, NodeId, PieceIndex, Priority};

use super::Shared;
use super::task::Task;
use crate::metrics::{Origin, OutcomeLabel};

/// Bytes collected before they are written at once.
const WRITE_SIZE: usize = 4 * GROUP_SIZE as usize;

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
            Self::Store(StoreError::Unwritten(_) | StoreError::Dropped(_)) => {
                (Failure::Conflict, "conflict")
            }
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
    let result = fetch(&shared, &task, ask).await;
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
    receive(shared, task, ask, &mut recv, &groups, claim).await?;
    task.relayers.lock().insert(ask.piece, ask.parent);
    Ok(claim.author)
}

/// Takes the piece's bytes off the stream, verified group by group.
async fn receive(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    ask: PieceRequest,
    recv: &mut RecvStream,
    groups: &[GroupDigest],
    claim: Claim,
) -> Result<(), FetchError> {
    let layout = task.blob.layout();
    let range = layout
        .piece_range(ask.piece)
        .ok_or(FetchError::Unexpected)?;
    let start = range.start() + u64::from(ask.first_group) * GROUP_SIZE;
    let mut offset = start;
    let mut buffer = BytesMut::with_capacity(WRITE_SIZE);
    while offset < range.end() {
        let want = WRITE_SIZE.min((range.end() - offset) as usize);
        while buffer.len() < want {
            match recv.read_chunk(want - buffer.len()).await? {
                Some(chunk) => buffer.extend_from_slice(&chunk),
                None => return Err(FetchError::Short),
            }
        }
        let data = buffer.split().freeze();
        let first = ((offset - range.start()) / GROUP_SIZE) as usize;
        let expected = groups[first..first + want.div_ceil(GROUP_SIZE as usize)].to_vec();
        let last = offset + want as u64 == range.end();
        let blocking_task = Arc::clone(task);
        let metrics = Arc::clone(&shared.metrics);
        super::blocking(move || {
            let started = std::time::Instant::now();
            let blob = &blocking_task.blob;
            let written = blob
                .write_verified_groups(offset, &data, &expected)
                .and_then(|()| match last {
                    true => blob.commit_piece(ask.piece, claim),
                    false => Ok(()),
                });
            metrics.store_write.observe(started.elapsed().as_secs_f64());
            match written {
                // A duplicate of this request delivered the piece meanwhile.
                Err(StoreError::AlreadyHeld(_)) => Ok(()),
                other => other,
            }
        })
        .await?;
        offset += want as u64;
        task.by_peer.add(ask.parent, want as u64);
        shared.by_peer.add(ask.parent, want as u64);
        shared.metrics.received(Origin::Peer, want as u64);
        shared.board.ring(&task.digest);
        task.input(Input::Progress {
            request: ask.request,
            groups: (offset - start).div_ceil(GROUP_SIZE) as u32,
        })
        .await;
        buffer.reserve(WRITE_SIZE);
    }
    Ok(())
}
