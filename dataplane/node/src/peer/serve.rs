//! What this node does for its peers: tells what it holds, and sends it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pantala_quic::{Connection, Error as QuicError, RecvStream, SendStream};
use pantala_store::{Blob, PieceProof, Store, StoreError};
use pantala_wire::layout::PIECE_SIZE_MIN;
use pantala_wire::message::{self, Response, refusal::Reason, request, response};
use pantala_wire::{BlobDigest, ByteRange, GROUP_SIZE, NodeId, PieceIndex, PieceSet, Priority};
use tokio::sync::Semaphore;

use crate::engine::Board;
use crate::meter::Meter;
use crate::metrics::{Metrics, OutcomeLabel};

/// Pieces sent at the same time, over all peers, for page faults, for waiting clients, and for the
/// rest: apart, so that bulk never keeps an urgent request waiting. Each holds [`SLICE_BYTES`].
const SENDS_MAX: [usize; 3] = [16, 32, 32];
/// Requests of all peers at once, sent or waiting for a turn, before peers are told to go elsewhere.
const REQUESTS_MAX: usize = 512;
/// Bytes asked of the store at once: a piece of all but huge blobs. They are lent where they lie in the
/// page cache and cost no memory; where the kernel cannot do that (before 5.14), they are copied, and
/// times the sum of [`SENDS_MAX`] that bounds the memory used (80 MiB).
const SLICE_BYTES: u64 = PIECE_SIZE_MIN;
/// Bytes handed to the transport at once, to see whether a peer still takes any.
const SEND_BYTES: usize = 4 * GROUP_SIZE as usize;
/// How long a peer that opened a stream may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to accept [`SEND_BYTES`] of a piece it asked for; one that stalls gives
/// its turn back.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two Have frames of a busy download, so that one frame names several pieces.
const HAVE_INTERVAL: Duration = Duration::from_millis(2);

/// Why a stream ended before its answer was whole.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Quic(#[from] QuicError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the piece was dropped while it was sent")]
    Dropped,
    #[error("the peer took longer than {0:?}")]
    Slow(Duration),
}

/// Answers the requests of peers.
pub struct Server {
    store: Store,
    board: Board,
    metrics: Arc<Metrics>,
    meter: Arc<Meter>,
    turns: [Semaphore; 3],
    places: Semaphore,
}

impl Server {
    /// A server of what is in `store`; `board` rings when that grows.
    pub fn new(store: Store, board: Board, metrics: Arc<Metrics>, meter: Arc<Meter>) -> Arc<Self> {
        Arc::new(Self {
            store,
            board,
            metrics,
            meter,
            turns: SENDS_MAX.map(Semaphore::new),
            places: Semaphore::new(REQUESTS_MAX),
        })
    }

    /// Serves one connection until it ends. The streams a peer may open at once are bounded by the
    /// transport.
    pub async fn connection(self: Arc<Self>, connection: Connection) {
        let peer = connection.remote_node();
        let mut streams = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                stream = connection.accept() => match stream {
                    Ok((send, recv)) => {
                        let server = Arc::clone(&self);
                        streams.spawn(async move {
                            if let Err(error) = server.stream(peer, send, recv).await {
                                tracing::debug!(?peer, %error, "stream of a peer ended early");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::debug!(?peer, %error, "connection of a peer ended");
                        return;
                    }
                },
                Some(_) = streams.join_next() => {}
            }
        }
    }

    async fn stream(
        &self,
        peer: NodeId,
        mut send: SendStream,
        mut recv: RecvStream,
    ) -> Result<(), ServeError> {
        let request = tokio::time::timeout(REQUEST_TIMEOUT, recv.read_frame::<message::Request>())
            .await
            .map_err(|_| ServeError::Slow(REQUEST_TIMEOUT))??;
        let Some(request) = request else {
            return Ok(());
        };
        let Ok(digest) = BlobDigest::try_from(request.digest.as_ref()) else {
            return refuse(&mut send, Reason::Malformed, "the digest has not 32 bytes").await;
        };
        match request.kind {
            Some(request::Kind::Subscribe(_)) => self.subscribe(&digest, send).await,
            Some(request::Kind::Fetch(fetch)) => self.fetch(&digest, &fetch, peer, send).await,
            None => refuse(&mut send, Reason::Malformed, "the request has no kind").await,
        }
    }

    /// Sends what is held now, then what is added, until the peer ends the stream.
    async fn subscribe(&self, digest: &BlobDigest, mut send: SendStream) -> Result<(), ServeError> {
        let mut bell = self.board.watch(digest);
        let mut told: Option<Told> = None;
        // Kept open between the looks: a blob that is opened anew verifies its pieces anew.
        let mut _open = None;
        loop {
            bell.mark_unchanged();
            let blob = self.open(digest).await?;
            for have in news(&mut told, blob.as_ref()) {
                send.write_frame(&Response {
                    kind: Some(response::Kind::Have(have)),
                })
                .await?;
            }
            _open = blob;
            tokio::select! {
                changed = bell.changed() => if changed.is_err() { return Ok(()) },
                stopped = send.delivered() => {
                    stopped?;
                    return Ok(());
                }
            }
            tokio::time::sleep(HAVE_INTERVAL).await;
        }
    }

    async fn open(&self, digest: &BlobDigest) -> Result<Option<Blob>, StoreError> {
        let (store, digest) = (self.store.clone(), *digest);
        crate::engine::blocking(move || store.open_existing(&digest)).await
    }

    async fn fetch(
        &self,
        digest: &BlobDigest,
        fetch: &message::Fetch,
        peer: NodeId,
        mut send: SendStream,
    ) -> Result<(), ServeError> {
        let Ok(_place) = self.places.try_acquire() else {
            self.count("busy");
            return refuse(&mut send, Reason::Busy, "too many requests at once").await;
        };
        let priority = Priority::from_wire(fetch.priority);
        send.set_priority(priority);
        let turns = match priority {
            Priority::Fault => &self.turns[0],
            Priority::Client => &self.turns[1],
            Priority::Bulk | Priority::Prefetch => &self.turns[2],
        };
        let Ok(_turn) = turns.acquire().await else {
            return Ok(());
        };
        let (store, digest, asked) = (self.store.clone(), *digest, *fetch);
        let answer = crate::engine::blocking(move || answer(&store, &digest, &asked)).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(%digest, piece = fetch.piece, %error, "a stored piece cannot be served");
                if matches!(error, StoreError::Corrupt { .. }) {
                    self.metrics.pieces_dropped.inc();
                    self.board.ring(&digest);
                }
                return refuse(&mut send, Reason::Failed, "the piece cannot be read").await;
            }
        };
        let (proof, range, blob, first) = match answer {
            Answer::Piece {
                proof,
                range,
                blob,
                first,
            } => (proof, range, blob, first),
            Answer::Refusal(reason, detail) => return refuse(&mut send, reason, detail).await,
        };
        let mut digests = Vec::with_capacity(proof.group_digests.len() * 32);
        for group in &proof.group_digests {
            digests.extend_from_slice(&group.0);
        }
        send.write_frame(&Response {
            kind: Some(response::Kind::Piece(message::PieceHead {
                piece: fetch.piece,
                first_group: fetch.first_group,
                group_digests: digests.into(),
                claim: Some((&proof.claim).into()),
                length: range.len() as u32,
            })),
        })
        .await?;
        // A page fault stops a program: it waits for nothing but its bytes, which count all the same.
        let waits = priority != Priority::Fault;
        self.send_bytes(first, (peer, waits), &mut send).await?;
        let mut rest = ByteRange::new(range.start() + SLICE_BYTES, range.end());
        while let Some(left) = rest {
            let blob = blob.clone();
            let next = crate::engine::blocking(move || blob.slice(head(left))).await?;
            let next = next.ok_or(ServeError::Dropped)?;
            self.send_bytes(next, (peer, waits), &mut send).await?;
            rest = ByteRange::new(head(left).end(), left.end());
        }
        send.finish()?;
        self.count("served");
        Ok(())
    }

    async fn send_bytes(
        &self,
        mut bytes: Bytes,
        (peer, waits): (NodeId, bool),
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(SEND_BYTES));
            let len = part.len() as u64;
            if waits {
                self.meter.turn(peer, len).await;
            }
            tokio::time::timeout(SEND_TIMEOUT, send.write_bytes(part))
                .await
                .map_err(|_| ServeError::Slow(SEND_TIMEOUT))??;
            self.metrics.peer_sent.inc_by(len);
        }
        Ok(())
    }

    fn count(&self, outcome: &'static str) {
        self.metrics
            .peer_served
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }
}

/// What a peer is told that asked for groups.
enum Answer {
    Piece {
        proof: PieceProof,
        /// What was asked for.
        range: ByteRange,
        blob: Blob,
        /// Its first [`SLICE_BYTES`].
        first: Bytes,
    },
    Refusal(Reason, &'static str),
}

/// Opens the blob, verifies the piece where that has not been done, and brings what is sent first into
/// memory. Blocks on the disk.
fn answer(
    store: &Store,
    digest: &BlobDigest,
    fetch: &message::Fetch,
) -> Result<Answer, StoreError> {
    let Some(blob) = store.open_existing(digest)? else {
        return Ok(Answer::Refusal(Reason::NotHeld, "the blob is not held"));
    };
    let Some(range) = wanted(&blob.layout(), fetch) else {
        let detail = "the blob has no such groups";
        return Ok(Answer::Refusal(Reason::Malformed, detail));
    };
    let not_held = Answer::Refusal(Reason::NotHeld, "the piece is not held");
    let Some(proof) = blob.piece_proof(PieceIndex(fetch.piece))? else {
        return Ok(not_held);
    };
    let first = blob.slice(head(range))?;
    Ok(first.map_or(not_held, |first| Answer::Piece {
        proof,
        range,
        blob,
        first,
    }))
}

/// The start of `range` that the store is asked for at once.
fn head(range: ByteRange) -> ByteRange {
    let end = range.end().min(range.start() + SLICE_BYTES);
    ByteRange::new(range.start(), end).unwrap_or(range)
}

/// The bytes that `fetch` asks for, or `None` where the blob has none such.
fn wanted(layout: &pantala_wire::PieceLayout, fetch: &message::Fetch) -> Option<ByteRange> {
    let piece = layout.piece_range(PieceIndex(fetch.piece))?;
    let start = piece.start() + u64::from(fetch.first_group) * GROUP_SIZE;
    let end = match fetch.group_count {
        0 => piece.end(),
        count => (start + u64::from(count) * GROUP_SIZE).min(piece.end()),
    };
    ByteRange::new(start, end)
}

async fn refuse(send: &mut SendStream, reason: Reason, detail: &str) -> Result<(), ServeError> {
    send.write_frame(&Response {
        kind: Some(response::Kind::Refusal(message::Refusal {
            reason: reason.into(),
            detail: detail.to_owned(),
        })),
    })
    .await?;
    send.finish()?;
    Ok(())
}

/// What a subscriber has been told.
struct Told {
    held: PieceSet,
    complete: bool,
    sized: bool,
}

/// The frames that bring a subscriber up to date.
fn news(told: &mut Option<Told>, blob: Option<&Blob>) -> Vec<message::Have> {
    let Some(blob) = blob else {
        // Said once, so that the peer need not wait to learn that there is nothing yet.
        return match told {
            None => {
                *told = Some(Told {
                    held: PieceSet::empty(0),
                    complete: false,
                    sized: false,
                });
                vec![message::Have::default()]
            }
            Some(told) if !told.held.is_empty() => {
                told.held = PieceSet::empty(0);
                told.complete = false;
                vec![message::Have {
                    dropped: true,
                    ..Default::default()
                }]
            }
            Some(_) => Vec::new(),
        };
    };
    let (held, complete) = (blob.held(), blob.is_complete());
    let layout = blob.layout();
    let mut fresh = PieceSet::empty(layout.piece_count());
    for piece in held.iter() {
        if !told.as_ref().is_some_and(|t| t.held.contains(piece)) {
            fresh.insert(piece);
        }
    }
    let sized = told.as_ref().is_some_and(|t| t.sized);
    let newly_complete = complete && !told.as_ref().is_some_and(|t| t.complete);
    *told = Some(Told {
        held,
        complete,
        sized: true,
    });
    if fresh.is_empty() && !newly_complete && sized {
        return Vec::new();
    }
    vec![message::Have {
        blob_size: layout.blob_size(),
        piece_size_log2: layout.piece_size_log2(),
        runs: fresh
            .runs()
            .iter()
            .flat_map(|run| [run.first, run.count])
            .collect(),
        complete,
        dropped: false,
    }]
}
