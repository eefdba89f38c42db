//! A client's way through a blob: bytes as soon as they are here, in order, never wrong ones.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pantala_source::SourceError;
use pantala_store::StoreError;
use pantala_swarm::{Input, ReaderId};
use pantala_wire::{ByteRange, GROUP_SIZE, PieceIndex, Priority};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Shared;
use super::direct::{DirectError, DirectStream};
use super::task::{Hold, SourceAccess, Task, TaskEvent, TaskState};
use crate::metrics::Origin;

/// Bytes handed on at once: enough that a local hit costs few switches between threads, and no memory,
/// since they are lent where they lie in the page cache. A client that does not read keeps twice as
/// much from being looked at again: what it is sending, and what comes next.
const SLICE_BYTES_MAX: u64 = 2 << 20;
/// The end of a whole-blob read that is kept back until the blob's sha256 is verified, so that no
/// client ever receives a whole wrong blob.
pub(super) const HELD_BACK: u64 = GROUP_SIZE;
/// Pieces read between two words to the download of where the reader is: a part of its window.
const ANNOUNCE_PIECES: u64 = 8;
/// Times that a reader goes back to the engine after a task ended under it (parked, or a piece
/// rotted) before it gives up.
const REOPENS_MAX: u32 = 3;

/// Why a client's read ended early.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The download failed and the source could not be read directly either.
    #[error("{why}; reading directly from the source failed too: {source}")]
    Failed {
        /// Why the download failed.
        why: Arc<str>,
        /// Why the source did not help.
        source: SourceError,
    },
    /// The download failed and this caller has no way to the source.
    #[error("{0}")]
    NoWay(Arc<str>),
    /// The source, read directly, failed.
    #[error(transparent)]
    Direct(#[from] DirectError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Bytes that were read turned out to be wrong and have been replaced meanwhile.
    #[error("{0} was found wrong while it was read, and has been mended: read it again")]
    Mended(pantala_wire::BlobDigest),
    /// The download kept ending before its end.
    #[error("the download of {0} was interrupted too often")]
    Interrupted(pantala_wire::BlobDigest),
}

/// The bytes of a blob, in order, as they arrive; ends after an error.
pub type ReadStream = Pin<Box<dyn Stream<Item = Result<Bytes, ReadError>> + Send>>;

/// What a reader is after.
#[derive(Clone)]
pub struct ReadRequest {
    /// The bytes.
    pub range: ByteRange,
    /// How urgent.
    pub priority: Priority,
    /// The caller's own way to the source, the last resort.
    pub access: Option<SourceAccess>,
}

pub(super) struct Reader {
    shared: Arc<Shared>,
    task: Arc<Task>,
    request: ReadRequest,
    id: ReaderId,
    position: u64,
    /// Where the last announced want began.
    announced: Option<u64>,
    bell: watch::Receiver<u64>,
    state: watch::Receiver<TaskState>,
    reopens: u32,
    /// Replaced pieces of the task when this reader came.
    replaced: u64,
    direct: Option<DirectStream>,
    ahead: Option<Ahead>,
    _hold: Hold,
    waited: bool,
}

/// The next bytes, made ready while those before them are sent.
struct Ahead {
    position: u64,
    slice: JoinHandle<Result<Option<Bytes>, StoreError>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        let leave = TaskEvent::Machine(Input::Unwant { reader: self.id });
        // A full queue: the actor is busy and finds out by the reader count. A closed one: it ended.
        if self.task.events.try_send(leave).is_err() {
            tracing::trace!(digest = %self.task.digest, "reader left unannounced");
        }
    }
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, task: Arc<Task>, request: ReadRequest) -> Self {
        Self {
            id: ReaderId(task.next_reader.fetch_add(1, Ordering::Relaxed)),
            replaced: task.replaced.load(Ordering::Acquire),
            state: task.state.subscribe(),
            _hold: task.hold(),
            bell: shared.board.watch(&task.digest),
            position: request.range.start(),
            announced: None,
            shared,
            task,
            request,
            reopens: 0,
            direct: None,
            ahead: None,
            waited: false,
        }
    }

    /// A reader that has been given the first `position` bytes already, before the task was there.
    pub(super) fn resumed(
        shared: Arc<Shared>,
        task: Arc<Task>,
        request: ReadRequest,
        position: u64,
    ) -> Self {
        let mut reader = Self::new(shared, task, request);
        reader.position = position;
        // Whatever was ever replaced may be what it was given.
        reader.replaced = 0;
        reader
    }

    /// The bytes, in chunks of up to 2 MiB; ends after an error.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Bytes, ReadError>> + Send {
        futures_util::stream::unfold(Some(self), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(None) => None,
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Err(error) => {
                    tracing::warn!(digest = %reader.task.digest, position = reader.position, %error, "read ended early");
                    Some((Err(error), None))
                }
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ReadError> {
        while self.position < self.request.range.end() {
            if self.direct.is_some() {
                return self.next_direct().await;
            }
            self.keep_ahead();
            self.bell.mark_unchanged();
            let state = self.state.borrow_and_update().clone();
            if self.task.replaced.load(Ordering::Acquire) != self.replaced
                && self.position > self.request.range.start()
            {
                return Err(ReadError::Mended(self.task.digest));
            }
            let ready = self.ready(&state);
            if ready > 0 {
                match self.read(ready).await {
                    Ok(Some(chunk)) => {
                        self.look_ahead();
                        return Ok(Some(chunk));
                    }
                    // Dropped between the look and the read.
                    Ok(None) => {}
                    Err(StoreError::Corrupt { piece, .. }) => self.lost(piece).await?,
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            self.ahead = None;
            match state {
                TaskState::Running => self.wait().await,
                TaskState::Complete | TaskState::Parked => self.reopen().await?,
                TaskState::Corrupt(why) => return Err(ReadError::NoWay(why)),
                TaskState::Failed(why) => self.go_direct(why).await?,
            }
        }
        Ok(None)
    }

    /// Bytes that may be handed on from the position.
    fn ready(&self, state: &TaskState) -> u64 {
        let blob = &self.task.blob;
        if *state == TaskState::Running && self.task.suspect.load(Ordering::Acquire) {
            return 0;
        }
        let mut end = blob
            .readable_from(self.position)
            .min(self.request.range.end());
        let whole = self.request.range.start() == 0
            && self.request.range.end() == blob.layout().blob_size();
        let is_verified = self.task.verified.load(Ordering::Acquire) || blob.is_complete();
        if whole && *state != TaskState::Complete && !is_verified {
            end = end.min(self.request.range.end().saturating_sub(HELD_BACK));
        }
        end.saturating_sub(self.position).min(SLICE_BYTES_MAX)
    }

    /// The bytes from the position on, up to `len` of them, which are ready; `None` where they are not
    /// readable any more.
    async fn read(&mut self, len: u64) -> Result<Option<Bytes>, StoreError> {
        let ahead = self.ahead.take();
        let slice = match ahead.filter(|ahead| ahead.position == self.position) {
            Some(ahead) => ahead.slice,
            None => match self.slice(len) {
                Some(slice) => slice,
                None => return Ok(None),
            },
        };
        let Some(mut chunk) = super::joined(slice).await? else {
            return Ok(None);
        };
        // What was ready then may be more than is ready now: a piece came into doubt.
        chunk.truncate(len as usize);
        self.position += chunk.len() as u64;
        if !self.waited {
            self.shared
                .metrics
                .received(Origin::Local, chunk.len() as u64);
        }
        self.waited = false;
        self.shared.metrics.client_sent.inc_by(chunk.len() as u64);
        Ok(Some(chunk))
    }

    /// Has the bytes from the position on brought into memory and verified, on a thread that may block.
    fn slice(&self, len: u64) -> Option<JoinHandle<Result<Option<Bytes>, StoreError>>> {
        let range = ByteRange::new(self.position, self.position + len)?;
        let blob = self.task.blob.clone();
        Some(tokio::task::spawn_blocking(move || blob.slice(range)))
    }

    /// Makes the next bytes ready while the client is sent those before them. Whether they may be
    /// handed on is judged when it comes to that.
    fn look_ahead(&mut self) {
        let state = self.state.borrow().clone();
        let len = self.ready(&state);
        if len < SLICE_BYTES_MAX && self.position + len < self.request.range.end() {
            // They are just arriving: more of them at once is cheaper.
            return;
        }
        self.ahead = self.slice(len).map(|slice| Ahead {
            position: self.position,
            slice,
        });
    }

    /// What is wanted from the position on, where that has not been said from `pieces` pieces
    /// before it.
    fn want(&mut self, pieces: u64) -> Option<TaskEvent> {
        let piece_size = self.task.blob.layout().piece_size();
        let piece = self.position / piece_size;
        if self
            .announced
            .is_some_and(|from| piece < from / piece_size + pieces)
        {
            return None;
        }
        let range = ByteRange::new(self.position, self.request.range.end())?;
        self.announced = Some(self.position);
        Some(TaskEvent::Machine(Input::Want {
            reader: self.id,
            range,
            priority: self.request.priority,
        }))
    }

    /// Moves the window of pieces that are fetched in order, before the reader comes to its end.
    fn keep_ahead(&mut self) {
        if self.announced.is_some()
            && let Some(want) = self.want(ANNOUNCE_PIECES)
            && self.task.events.try_send(want).is_err()
        {
            // The actor is behind: said again when there is something to wait for.
            self.announced = None;
        }
    }

    /// Says what is wanted from the position on, and waits for news.
    async fn wait(&mut self) {
        self.waited = true;
        if let Some(want) = self.want(1) {
            self.task.tell(want).await;
        }
        tokio::select! {
            _ = self.bell.changed() => {}
            _ = self.state.changed() => {}
        }
    }

    /// A stored piece was wrong and is gone: the task fetches it again, or a new one does.
    async fn lost(&mut self, piece: PieceIndex) -> Result<(), ReadError> {
        self.shared.metrics.pieces_dropped.inc();
        tracing::warn!(digest = %self.task.digest, piece = piece.0, "a stored piece was wrong: fetching it again");
        self.announced = None;
        if self.task.state() == TaskState::Running {
            self.task.input(Input::PieceLost { piece }).await;
            return Ok(());
        }
        self.reopen().await
    }

    /// The task ended, but bytes are missing (again): joins or starts another.
    async fn reopen(&mut self) -> Result<(), ReadError> {
        self.reopens += 1;
        if self.reopens > REOPENS_MAX {
            return Err(ReadError::Interrupted(self.task.digest));
        }
        let size = self.task.blob.layout().blob_size();
        let task = self
            .shared
            .join(self.task.digest, size, self.request.access.clone())
            .await?;
        let next = Self::new(Arc::clone(&self.shared), task, self.request.clone());
        let (position, reopens) = (self.position, self.reopens);
        *self = next;
        self.position = position;
        self.reopens = reopens;
        Ok(())
    }

    /// The download failed: reads the rest directly from the source, with the caller's rights.
    async fn go_direct(&mut self, why: Arc<str>) -> Result<(), ReadError> {
        let Some(access) = self.request.access.clone() else {
            return Err(ReadError::NoWay(why));
        };
        let Some(rest) = ByteRange::new(self.position, self.request.range.end()) else {
            return Ok(());
        };
        tracing::warn!(digest = %self.task.digest, %why, position = self.position, "download failed: reading directly from the source");
        let size = self.task.blob.layout().blob_size();
        let body = self
            .shared
            .direct(&self.task.digest, size, rest, &access)
            .await
            .map_err(|source| ReadError::Failed { why, source })?;
        self.direct = Some(body);
        Ok(())
    }

    async fn next_direct(&mut self) -> Result<Option<Bytes>, ReadError> {
        let Some(body) = &mut self.direct else {
            return Ok(None);
        };
        match body.next().await {
            Some(chunk) => {
                let chunk = chunk?;
                let len = chunk.len() as u64;
                self.position += len;
                self.shared.metrics.received(Origin::Passthrough, len);
                self.shared.metrics.client_sent.inc_by(len);
                Ok(Some(chunk))
            }
            None => Ok(None),
        }
    }
}
