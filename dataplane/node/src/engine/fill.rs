//! Making a range of a blob present in the store, for whoever reads the blob's file past this process.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pantala_store::{Blob, StoreError};
use pantala_swarm::{Input, ReaderId};
use pantala_wire::{BlobDigest, ByteRange, Priority};

use super::Shared;
use super::task::{SourceAccess, Task, TaskEvent, TaskState};

/// Times that a fill goes back to the engine after a task ended under it (parked, or a piece rotted)
/// before it gives up.
const REOPENS_MAX: u32 = 3;

/// Where the bytes of a range were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// On this node's disk already.
    Local,
    /// With a peer or the source: at least a part of them.
    Remote,
}

/// Why a range is not present.
#[derive(Debug, thiserror::Error)]
pub enum FillFailed {
    /// The download failed.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The bytes do not have the blob's sha256.
    #[error("{0}")]
    Corrupt(Arc<str>),
    /// The blob was removed from the store and is not the one that is mounted any more.
    #[error("the stored blob was replaced by another while it was mounted")]
    Replaced,
    /// The download kept ending before its end.
    #[error("the download was interrupted too often")]
    Interrupted,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A want that is taken back when it is dropped.
struct Want<'a> {
    task: &'a Task,
    reader: ReaderId,
}

impl Drop for Want<'_> {
    fn drop(&mut self) {
        let reader = self.reader;
        let leave = TaskEvent::Machine(Input::Unwant { reader });
        // A full queue: the actor is busy and finds out by the reader count. A closed one: it ended.
        if self.task.events.try_send(leave).is_err() {
            tracing::trace!(digest = %self.task.digest, "a fill left unannounced");
        }
    }
}

impl Shared {
    /// Returns when every byte of `range` is in `blob`'s file, verified. Takes as long as the download
    /// does: the caller sets a limit.
    ///
    /// # Errors
    /// [`FillFailed`]; a later call tries again.
    pub async fn fill(
        self: &Arc<Self>,
        blob: &Blob,
        range: ByteRange,
        priority: Priority,
        access: Option<SourceAccess>,
    ) -> Result<Filled, FillFailed> {
        let digest = *blob.digest();
        // A blob in which something is wrong gives nothing until it is known what.
        let size_bytes = blob.layout().blob_size();
        if !self.is_suspect(&digest) && self.is_present(blob, range).await? {
            let is_unproven = !blob.is_complete() && blob.held().is_full();
            if is_unproven && !self.is_running(&digest) {
                // The download ended when nobody wanted more, before the whole was verified. It is now, or the
                // file would be watched for as long as it is mounted.
                if let Err(error) = self.join(digest, size_bytes, access).await {
                    // The bytes asked for are here and verified all the same.
                    tracing::warn!(%digest, %error, "the blob is not verified as a whole yet");
                }
            }
            return Ok(Filled::Local);
        }
        for _ in 0..=REOPENS_MAX {
            let task = self.join(digest, size_bytes, access.clone()).await?;
            if !task.blob.is_same(blob) {
                return Err(FillFailed::Replaced);
            }
            match self.wait_for(&task, range, priority).await? {
                TaskState::Running => return Ok(Filled::Remote),
                TaskState::Failed(why) => return Err(FillFailed::Failed(why)),
                TaskState::Corrupt(why) => return Err(FillFailed::Corrupt(why)),
                // Complete, or nobody wanted it any more: what is missing now was lost meanwhile.
                TaskState::Complete | TaskState::Parked => {
                    if self.is_present(blob, range).await? {
                        return Ok(Filled::Remote);
                    }
                }
            }
        }
        Err(FillFailed::Interrupted)
    }

    fn is_suspect(&self, digest: &BlobDigest) -> bool {
        let tasks = self.tasks.lock();
        let task = tasks.get(digest);
        task.is_some_and(|task| task.suspect.load(Ordering::Acquire))
    }

    /// Waits until the range is there, and then returns `Running`, or until the task has ended.
    async fn wait_for(
        &self,
        task: &Arc<Task>,
        range: ByteRange,
        priority: Priority,
    ) -> Result<TaskState, FillFailed> {
        let _hold = task.hold();
        let reader = ReaderId(task.next_reader.fetch_add(1, Ordering::Relaxed));
        let _want = Want { task, reader };
        let mut bell = self.board.watch(&task.digest);
        let mut state = task.state.subscribe();
        task.input(Input::Want {
            reader,
            range,
            priority,
        })
        .await;
        loop {
            bell.mark_unchanged();
            let now = state.borrow_and_update().clone();
            let is_suspect = task.suspect.load(Ordering::Acquire);
            if !is_suspect && self.is_present(&task.blob, range).await? {
                return Ok(TaskState::Running);
            }
            if now != TaskState::Running {
                return Ok(now);
            }
            // Both senders outlive this: an error would be news as well.
            tokio::select! {
                _ = bell.changed() => {}
                _ = state.changed() => {}
            }
        }
    }

    /// Whether the range is there. What is found damaged on the disk is reported as lost.
    async fn is_present(&self, blob: &Blob, range: ByteRange) -> Result<bool, StoreError> {
        if blob.is_ready(range) {
            return Ok(true);
        }
        if blob.readable_from(range.start()) < range.end() {
            return Ok(false);
        }
        let checked = blob.clone();
        let verified = super::blocking(move || checked.verify_range(range)).await;
        match verified {
            // False where a piece is there in part: then its groups are as they were verified.
            Ok(_) => Ok(blob.is_ready(range)),
            Err(StoreError::Corrupt { piece, .. }) => {
                self.metrics.pieces_dropped.inc();
                tracing::warn!(digest = %blob.digest(), piece = piece.0, "a stored piece was wrong: fetching it again");
                self.tell(blob.digest(), Input::PieceLost { piece }).await;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
