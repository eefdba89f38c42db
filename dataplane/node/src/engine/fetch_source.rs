//! Reads a run of pieces from the source into the store, and signs what was read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt};
use pantala_control::Command;
use pantala_source::{BodyStream, OpenedBlob, SourceError};
use pantala_store::StoreError;
use pantala_swarm::{Author, Failure, Input, RequestId};
use pantala_wire::{ByteRange, GROUP_SIZE, PieceIndex, PieceRun};

use super::Shared;
use super::task::{SourceAccess, Task};
use crate::metrics::{Origin, OutcomeLabel};

/// Bytes collected before they are written at once; fewer if the source pauses, so that a reader
/// does not wait for bytes that are here.
const WRITE_SIZE: usize = 8 * GROUP_SIZE as usize;
/// The same for the first: a reader waits for it.
const FIRST_WRITE_SIZE: usize = GROUP_SIZE as usize;

/// Why a fetch ended early.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no caller has shown a way to the source")]
    NoAccess,
    #[error("the source sent {0} bytes too few")]
    Short(u64),
}

/// Performs `Action::FetchSource` and reports its outcome to the task. `opened`: the blob's first bytes,
/// which are on their way already, for a run that starts there.
pub(super) async fn run(
    shared: Arc<Shared>,
    task: Arc<Task>,
    request: RequestId,
    pieces: PieceRun,
    opened: Option<OpenedBlob>,
) {
    let started = std::time::Instant::now();
    let access = task.access();
    let result = match &access {
        Some(access) => fetch(&shared, &task, request, pieces, access, opened).await,
        None => Err(FetchError::NoAccess),
    };
    let seconds = started.elapsed().as_secs_f64();
    shared.metrics.source_run.observe(seconds);
    let outcome = match &result {
        Ok(()) => "ok",
        Err(FetchError::Source(error)) if error.is_retryable() => "unavailable",
        Err(FetchError::Source(_)) => "refused",
        Err(FetchError::Store(_)) => "store",
        Err(FetchError::NoAccess) => "no_access",
        Err(FetchError::Short(_)) => "short",
    };
    shared
        .metrics
        .source_requests
        .get_or_create(&OutcomeLabel { outcome })
        .inc();
    let error = match result {
        Ok(()) => {
            tracing::debug!(digest = %task.digest, ?pieces, seconds, "source run done");
            task.input(Input::RequestDone { request }).await;
            return;
        }
        Err(error) => error,
    };
    tracing::info!(digest = %task.digest, ?pieces, %error, "source run failed");
    if let (FetchError::Source(SourceError::RateLimited { retry_after, .. }), Some(access)) =
        (&error, &access)
    {
        // The whole cluster is to leave it alone for a while.
        shared.control.send(Command::SourceLimited {
            host: access.upstream.host_port(),
            retry_after: *retry_after,
        });
    }
    report(&task, request, access, error).await;
}

/// Tells the task what to make of a failure.
async fn report(task: &Task, request: RequestId, access: Option<SourceAccess>, error: FetchError) {
    let failure = match &error {
        // Another writer, or a failed sync, came between: the piece is asked for again.
        FetchError::Store(
            StoreError::Dropped(_)
            | StoreError::Unwritten(_)
            | StoreError::BeingRead(_)
            | StoreError::WrongDigest { .. },
        )
        | FetchError::Short(_) => Failure::Retry {
            after: None,
            detail: error.to_string(),
        },
        FetchError::Store(error) => {
            tracing::warn!(digest = %task.digest, %error, "the store failed");
            let reason = error.to_string();
            return task.input(Input::StoreFailed { reason }).await;
        }
        FetchError::Source(error) => source_failure(error),
        FetchError::NoAccess => Failure::Unauthorised,
    };
    let refused = failure == Failure::Unauthorised;
    task.input(Input::RequestFailed { request, failure }).await;
    if refused {
        // Another caller may have shown another way.
        let available = access.is_some_and(|access| task.drop_access(&access));
        task.input(Input::SourceChanged { available }).await;
    }
}

/// What a source's error means for a download.
pub(super) fn source_failure(error: &SourceError) -> Failure {
    if matches!(error, SourceError::Refused { .. }) {
        Failure::Unauthorised
    } else if error.is_retryable() {
        Failure::Retry {
            after: error.retry_after(),
            detail: error.to_string(),
        }
    } else {
        Failure::Fatal(error.to_string())
    }
}

/// The bytes of `pieces`.
fn byte_range(task: &Task, pieces: PieceRun) -> Option<ByteRange> {
    let layout = task.blob.layout();
    let first = layout.piece_range(PieceIndex(pieces.first))?;
    let last = layout.piece_range(PieceIndex(pieces.range().end.checked_sub(1)?))?;
    ByteRange::new(first.start(), last.end())
}

async fn ask(
    shared: &Shared,
    task: &Task,
    range: ByteRange,
    access: &SourceAccess,
) -> Result<BodyStream, SourceError> {
    let size_bytes = task.blob.layout().blob_size();
    shared
        .source
        .fetch_blob(
            &access.upstream,
            &access.repository,
            &task.digest,
            size_bytes,
            range,
            &access.credential,
        )
        .await
}

async fn fetch(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    request: RequestId,
    pieces: PieceRun,
    access: &SourceAccess,
    opened: Option<OpenedBlob>,
) -> Result<(), FetchError> {
    let Some(range) = byte_range(task, pieces) else {
        return Ok(());
    };
    let mut body = match opened.and_then(|opened| opened.into_body(range.end())) {
        Some(body) => body,
        None => ask(shared, task, range, access).await?,
    };
    let mut offset = range.start();
    let mut buffer = BytesMut::with_capacity(WRITE_SIZE + GROUP_SIZE as usize);
    loop {
        let most = match offset == range.start() {
            true => FIRST_WRITE_SIZE,
            false => WRITE_SIZE,
        };
        let (next, ended) = collect(&mut body, &mut buffer, range.end() - offset, most).await?;
        if !next.is_empty() {
            let len = next.len() as u64;
            let groups = (offset + len - range.start()).div_ceil(GROUP_SIZE) as u32;
            write(shared, task, request, offset, next, groups).await?;
            offset += len;
        }
        if offset == range.end() {
            return Ok(());
        }
        if ended {
            return Err(FetchError::Short(range.end() - offset));
        }
    }
}

/// Collects whole groups (or the range's tail): as many as fit a write while the source keeps
/// them coming, fewer when it pauses. True if the source has ended.
async fn collect(
    body: &mut BodyStream,
    buffer: &mut BytesMut,
    remaining: u64,
    most: usize,
) -> Result<(Bytes, bool), SourceError> {
    let group = GROUP_SIZE as usize;
    let mut ended = false;
    loop {
        let whole = if buffer.len() as u64 >= remaining {
            remaining as usize
        } else {
            buffer.len() / group * group
        };
        let whole = match whole > most && whole as u64 != remaining {
            true => most,
            false => whole,
        };
        if whole >= most || (whole > 0 && whole as u64 == remaining) || ended {
            return Ok((buffer.split_to(whole).freeze(), ended));
        }
        let next = if whole > 0 {
            match body.next().now_or_never() {
                Some(next) => next,
                None => return Ok((buffer.split_to(whole).freeze(), false)),
            }
        } else {
            body.next().await
        };
        match next {
            Some(chunk) => buffer.extend_from_slice(&chunk?),
            None => ended = true,
        }
    }
}

/// Writes groups, and commits and announces the pieces that they complete.
async fn write(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    request: RequestId,
    offset: u64,
    data: Bytes,
    groups: u32,
) -> Result<(), FetchError> {
    let len = data.len() as u64;
    let done = {
        let (shared, task) = (Arc::clone(shared), Arc::clone(task));
        super::blocking(move || {
            let started = std::time::Instant::now();
            let done = store(&shared, &task, offset, &data);
            shared
                .metrics
                .store_write
                .observe(started.elapsed().as_secs_f64());
            done
        })
        .await?
    };
    task.from_source.fetch_add(len, Ordering::Relaxed);
    shared.metrics.received(Origin::Source, len);
    shared.board.ring(&task.digest);
    task.input(Input::Progress { request, groups }).await;
    for piece in &done {
        task.input(Input::PieceDone {
            request: Some(request),
            piece: *piece,
            author: Author::This,
        })
        .await;
    }
    if let (Some(first), count) = (done.first(), done.len() as u32) {
        shared.control.send(Command::Fetched {
            digest: task.digest,
            pieces: vec![PieceRun {
                first: first.0,
                count,
            }],
        });
    }
    Ok(())
}

fn store(
    shared: &Shared,
    task: &Task,
    offset: u64,
    data: &[u8],
) -> Result<Vec<PieceIndex>, StoreError> {
    let layout = task.blob.layout();
    let Some(range) = ByteRange::new(offset, offset + data.len() as u64) else {
        return Ok(Vec::new());
    };
    // A piece that a peer delivered meanwhile is held, verified, and stays as it is.
    let mut done = Vec::new();
    for index in layout.pieces_of(range) {
        let piece = PieceIndex(index);
        let Some(part) = layout.piece_range(piece).and_then(|p| p.intersect(&range)) else {
            continue;
        };
        if task.blob.held().contains(piece) {
            if Some(part.end()) == layout.piece_range(piece).map(|p| p.end()) {
                done.push(piece);
            }
            continue;
        }
        let bytes = &data[(part.start() - offset) as usize..(part.end() - offset) as usize];
        match write_piece(shared, task, piece, part.start(), bytes) {
            Ok(true) | Err(StoreError::AlreadyHeld(_)) => done.push(piece),
            Ok(false) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes a part of a piece; true if that completed and committed it.
fn write_piece(
    shared: &Shared,
    task: &Task,
    piece: PieceIndex,
    offset: u64,
    bytes: &[u8],
) -> Result<bool, StoreError> {
    task.blob.write_groups(offset, bytes)?;
    let Some(digest) = task.blob.written_digest(piece) else {
        return Ok(false);
    };
    let claim = shared.identity.sign_claim(&task.digest, piece, &digest);
    task.blob.commit_piece(piece, claim)?;
    Ok(true)
}
