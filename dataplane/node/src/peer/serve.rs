//! What this node does for its peers: tells what it holds, and sends it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pantala_quic::{Connection, Error as QuicError, RecvStream, SendStream};
use pantala_store::{Blob, Store, StoreError};
use pantala_wire::message::{self, Response, refusal::Reason, request, response};
use pantala_wire::{BlobDigest, ByteRange, GROUP_SIZE, PieceIndex, PieceSet, Priority};
use tokio::sync::Semaphore;

use crate::engine::Board;
use crate::metrics::{Metrics, OutcomeLabel};

/// Pieces sent at the same time, over all peers, for page faults, for waiting clients, and for the
/// rest: apart, so that bulk never keeps an urgent request waiting. Each holds one read buffer.
const SENDS_MAX: [usize; 3] = [16, 32, 32];
/// Requests of all peers at once, sent or waiting for a turn, before peers are told to go elsewhere.
const REQUESTS_MAX: usize = 512;
/// Bytes read from the store at once for a peer; times the sum of [`SENDS_MAX`] it bounds the memory
/// used (20 MiB).
const READ_SIZE: u64 = 4 * GROUP_SIZE;
/// How long a peer that opened a stream may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to accept a read buffer's worth of a piece it asked for; one that
/// stalls gives its turn back.
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
    turns: [Semaphore; 3],
    places: Semaphore,
}

impl Server {
    /// A server of what is in `store`; `board` rings when that grows.
    pub fn new(store: Store, board: Board, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            store,
            board,
            metrics,
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
                            if let Err(error) = server.stream(send, recv).await {
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

    async fn stream(&self, mut send: SendStream, mut recv: RecvStream) -> Result<(), ServeError> {
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
            Some(request::Kind::Fetch(fetch)) => self.fetch(&digest, &fetch, send).await,
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
        let piece = PieceIndex(fetch.piece);
        let Some(blob) = self.open(digest).await? else {
            return refuse(&mut send, Reason::NotHeld, "the blob is not held").await;
        };
        let layout = blob.layout();
        let Some(range) = wanted(&layout, fetch) else {
            return refuse(&mut send, Reason::Malformed, "the blob has no such groups").await;
        };
        let proof = {
            let blob = blob.clone();
            match crate::engine::blocking(move || blob.piece_proof(piece)).await {
                Ok(Some(proof)) => proof,
                Ok(None) => {
                    return refuse(&mut send, Reason::NotHeld, "the piece is not held").await;
                }
                Err(error) => {
                    tracing::warn!(%digest, piece = piece.0, %error, "a stored piece cannot be served");
                    self.metrics.pieces_dropped.inc();
                    self.board.ring(digest);
                    return refuse(&mut send, Reason::Failed, "the piece cannot be read").await;
                }
            }
        };
        let mut digests = Vec::with_capacity(proof.group_digests.len() * 32);
        for group in &proof.group_digests {
            digests.extend_from_slice(&group.0);
        }
        send.write_frame(&Response {
            kind: Some(response::Kind::Piece(message::PieceHead {
                piece: piece.0,
                first_group: fetch.first_group,
                group_digests: digests.into(),
                claim: Some((&proof.claim).into()),
                length: range.len() as u32,
            })),
        })
        .await?;
        self.send_bytes(&blob, range, &mut send).await?;
        send.finish()?;
        self.count("served");
        Ok(())
    }

    async fn send_bytes(
        &self,
        blob: &Blob,
        range: ByteRange,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let mut offset = range.start();
        while offset < range.end() {
            let len = READ_SIZE.min(range.end() - offset);
            let data = read(blob, offset, len).await?;
            let sent = data.len() as u64;
            tokio::time::timeout(SEND_TIMEOUT, send.write_bytes(data))
                .await
                .map_err(|_| ServeError::Slow(SEND_TIMEOUT))??;
            offset += sent;
            self.metrics.peer_sent.inc_by(sent);
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

/// Reads `len` bytes that were held a moment ago.
async fn read(blob: &Blob, offset: u64, len: u64) -> Result<Bytes, ServeError> {
    let blob = blob.clone();
    let data =
        crate::engine::blocking(move || crate::engine::read_bytes(&blob, offset, len)).await?;
    if (data.len() as u64) < len {
        return Err(ServeError::Dropped);
    }
    Ok(data)
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
