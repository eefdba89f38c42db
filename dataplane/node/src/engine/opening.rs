//! The start of a download that nobody in the cluster has begun: one request to the source tells
//! whether the caller may read the blob and how large it is, and brings its first bytes.
//!
//! Control grants an opening to one node at a time, so that these bytes, too, leave the source once.
//! The source's answer is the caller's verdict: it was asked with the caller's own credential, for this
//! blob of this repository. Until it is there nothing exists here that anybody could read, and a refusal
//! leaves nothing behind but the opening's return.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::StatusCode;
use pantala_control::Command;
use pantala_control::core::config::OPENING_BYTES;
use pantala_source::{OpenedBlob, SourceError};
use pantala_store::{Blob, StoreError};
use pantala_swarm::Input;
use pantala_wire::layout::BLOB_SIZE_MAX;
use pantala_wire::{BlobDigest, GROUP_SIZE, PieceLayout, PieceRun, Priority};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::reader::{HELD_BACK, ReadError, ReadRequest, ReadStream, Reader};
use super::task::{SourceAccess, Task, TaskState};
use super::{Shared, actor};
use crate::control_link::ControlLink;

/// Openings under way at one time: as many as control grants to a node. Who comes then asks first and
/// downloads after.
const OPENINGS_MAX: usize = 64;
/// How long a reader waits for the source's answer to somebody else, so that the download that begins
/// with it is joined and not begun twice. As long as control keeps the opening for it.
const OPENING_PATIENCE: Duration = Duration::from_millis(2500);

/// How long the rest of a blob waits for its first bytes to be passed on: far more than that takes.
const HEAD_PATIENCE: Duration = Duration::from_millis(10);

/// What came of opening a blob.
#[derive(Debug)]
pub enum Opened {
    /// The source sends it to this caller; the download has begun.
    Sized(u64),
    /// The source refuses it to this caller.
    Refused(SourceError),
    /// It is known here or elsewhere already, or the source's answer tells nothing: to be asked in
    /// another way.
    Not,
}

/// What is about to become a download.
enum Start {
    /// The source has been asked for the first bytes.
    Opening {
        /// Closed at its end.
        end: watch::Receiver<()>,
        /// The blob's first bytes, once they are there.
        head: Option<Bytes>,
        /// Told when a reader has passed those on.
        passed_on: Arc<Notify>,
    },
    /// So many readers know the size and are making the download.
    Joining(usize),
}

/// The downloads that are about to begin: an opening and a join of one blob never overlap.
#[derive(Default)]
pub(super) struct Starts(Mutex<HashMap<BlobDigest, Start>>);

/// One entry of [`Starts`], taken out when this is dropped.
pub(super) struct Starting {
    starts: Arc<Starts>,
    digest: BlobDigest,
    /// Wakes those who wait for an opening; absent for a join.
    _end: Option<watch::Sender<()>>,
}

impl Starting {
    /// Lends the first bytes to readers; who waits on what is returned learns that one has passed them
    /// on.
    fn lend(&self, bytes: Bytes) -> Option<Arc<Notify>> {
        match self.starts.0.lock().get_mut(&self.digest)? {
            Start::Opening {
                head, passed_on, ..
            } => {
                *head = Some(bytes);
                Some(Arc::clone(passed_on))
            }
            Start::Joining(_) => None,
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.starts.0.lock().entry(self.digest) {
            match entry.get_mut() {
                Start::Joining(count) if *count > 1 => *count -= 1,
                _ => drop(entry.remove()),
            }
        }
    }
}

impl Starts {
    /// Begins to join; waits for an opening of the same blob, but not for ever.
    pub(super) async fn join(self: &Arc<Self>, digest: BlobDigest) -> Option<Starting> {
        loop {
            let mut opening = match self.0.lock().entry(digest).or_insert(Start::Joining(0)) {
                Start::Joining(count) => {
                    *count += 1;
                    return Some(Starting {
                        starts: Arc::clone(self),
                        digest,
                        _end: None,
                    });
                }
                Start::Opening { end, .. } => end.clone(),
            };
            // The opening's end drops the sender: an error is what is waited for.
            if timeout(OPENING_PATIENCE, opening.changed()).await.is_err() {
                return None;
            }
        }
    }

    /// The first bytes of a blob that is being opened, if they are there.
    pub(super) fn head(&self, digest: &BlobDigest) -> Option<Bytes> {
        match self.0.lock().get(digest)? {
            Start::Opening { head, .. } => head.clone(),
            Start::Joining(_) => None,
        }
    }

    /// A reader has passed the first bytes on.
    fn passed_on(&self, digest: &BlobDigest) {
        if let Some(Start::Opening { passed_on, .. }) = self.0.lock().get(digest) {
            passed_on.notify_one();
        }
    }

    /// Begins to open, unless somebody is beginning anything with the blob.
    fn open(
        self: &Arc<Self>,
        digest: BlobDigest,
        is_known: impl FnOnce() -> bool,
    ) -> Option<Starting> {
        let mut starts = self.0.lock();
        let opening_count = starts
            .values()
            .filter(|start| matches!(start, Start::Opening { .. }))
            .count();
        // Looked up under the lock: whoever made it known has left the table after that.
        if opening_count >= OPENINGS_MAX || starts.contains_key(&digest) || is_known() {
            return None;
        }
        let (sender, end) = watch::channel(());
        let passed_on = Arc::new(Notify::new());
        let opening = Start::Opening {
            end,
            head: None,
            passed_on,
        };
        starts.insert(digest, opening);
        Some(Starting {
            starts: Arc::clone(self),
            digest,
            _end: Some(sender),
        })
    }
}

/// An opening that control granted; returned unless it has become a task.
struct Granted {
    control: ControlLink,
    digest: BlobDigest,
    is_used: bool,
}

impl Drop for Granted {
    fn drop(&mut self) {
        if !self.is_used {
            let digest = self.digest;
            self.control.send(Command::ReturnOpening { digest });
        }
    }
}

impl Shared {
    /// Opens a blob of which nothing is known with this caller's rights.
    pub async fn open_first(self: &Arc<Self>, digest: BlobDigest, access: SourceAccess) -> Opened {
        let is_known = || self.tasks.lock().contains_key(&digest) || self.store.contains(&digest);
        let Some(starting) = self.starts.open(digest, is_known) else {
            return Opened::Not;
        };
        if !self.control.ask_opening(digest).await {
            return Opened::Not;
        }
        let mut granted = Granted {
            control: self.control.clone(),
            digest,
            is_used: false,
        };
        let opened = self
            .source
            .open_blob(
                &access.upstream,
                &access.repository,
                &digest,
                OPENING_BYTES,
                &access.credential,
            )
            .await;
        let mut blob = match opened {
            Ok(blob) if blob.size() <= BLOB_SIZE_MAX => blob,
            Ok(_) => return Opened::Not,
            Err(error) if is_verdict(&error) => return Opened::Refused(error),
            Err(error) => {
                tracing::debug!(%digest, %error, "not opened: asking the source for the size first");
                return Opened::Not;
            }
        };
        let size_bytes = blob.size();
        let head = head_of(&mut blob).await;
        let lent = head.clone().and_then(|head| starting.lend(head));
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            // To write and hash what follows would take the processor from what passes these on. A
            // caller that has gone away passes nothing on.
            if let Some(passed_on) = lent {
                drop(timeout(HEAD_PATIENCE, passed_on.notified()).await);
            }
            let making = Arc::clone(&shared);
            let made = super::blocking(move || making.open_blob(&digest, size_bytes)).await;
            match made.and_then(|made| shared.begin(made, blob, head, access)) {
                Ok(()) => granted.is_used = true,
                // The caller's read meets the same failure, and goes past the store.
                Err(error) => tracing::debug!(%digest, %error, "opened, but not stored"),
            }
            drop(granted);
            drop(starting);
        });
        Opened::Sized(size_bytes)
    }

    /// Starts the download whose first bytes are on their way.
    fn begin(
        self: &Arc<Self>,
        made: Blob,
        opened: OpenedBlob,
        head: Option<Bytes>,
        access: SourceAccess,
    ) -> Result<(), StoreError> {
        let digest = *made.digest();
        let size_bytes = opened.size();
        let (task, events) = Task::new(digest, made, Some(access));
        let run = opening_run(&task.blob.layout());
        task.leased.lock().insert_run(run);
        *task.opened.lock() = Some(opened);
        *task.head.lock() = head;
        {
            let mut tasks = self.tasks.lock();
            if tasks.contains_key(&digest) || task.blob.is_complete() {
                // A reader lost its patience with this opening.
                return Ok(());
            }
            tasks.insert(digest, Arc::clone(&task));
            self.metrics.tasks_active.set(tasks.len() as i64);
        }
        tracing::info!(%digest, size_bytes, "download started by its first bytes");
        let actor = actor::Actor::opened(Arc::clone(self), task, run);
        tokio::spawn(actor.run(events));
        Ok(())
    }

    /// The rest of a whole blob whose first bytes its reader has been given from memory, before there
    /// was a task. Where none comes of it, the source is read from the start, to know the whole's sha256.
    pub(super) async fn read_on(
        self: Arc<Self>,
        digest: BlobDigest,
        size_bytes: u64,
        request: ReadRequest,
        head_bytes: u64,
    ) -> ReadStream {
        self.starts.passed_on(&digest);
        let access = request.access.clone();
        let why = match self.join(digest, size_bytes, access.clone()).await {
            Ok(task) => {
                if task.state() == TaskState::Running {
                    let priority = Priority::Bulk;
                    task.input(Input::FetchAll { priority }).await;
                }
                let reader = Reader::resumed(Arc::clone(&self), task, request, head_bytes);
                return Box::pin(reader.into_stream());
            }
            Err(error) => error,
        };
        tracing::warn!(%digest, error = %why, "cannot store the blob: passing it through from the source");
        let Some(access) = access else {
            return failed(why.into());
        };
        let body = match self
            .direct(&digest, size_bytes, request.range, &access)
            .await
        {
            Ok(body) => body,
            Err(source) => {
                let why = why.to_string().into();
                return failed(ReadError::Failed { why, source });
            }
        };
        let mut given_bytes = head_bytes;
        Box::pin(body.map(move |chunk| {
            let mut chunk = chunk?;
            let known_bytes = given_bytes.min(chunk.len() as u64);
            given_bytes -= known_bytes;
            Ok(chunk.split_off(known_bytes as usize))
        }))
    }
}

fn failed(error: ReadError) -> ReadStream {
    Box::pin(futures_util::stream::iter([Err(error)]))
}

/// The first bytes that a reader of the whole blob may be given before they are stored: a group at
/// most, and nothing of what is kept back until the sha256 is right.
async fn head_of(blob: &mut OpenedBlob) -> Option<Bytes> {
    let len_max = blob.size().checked_sub(HELD_BACK)?.min(GROUP_SIZE);
    match blob.peek().await {
        Ok(mut bytes) => {
            bytes.truncate(len_max as usize);
            // A copy of its own: a slice would keep the whole network buffer.
            (!bytes.is_empty()).then(|| Bytes::copy_from_slice(&bytes))
        }
        // The download meets the same, and knows how to go on.
        Err(error) => {
            tracing::debug!(%error, "the first bytes are late");
            None
        }
    }
}

/// The pieces that an opening covers.
fn opening_run(layout: &PieceLayout) -> PieceRun {
    let count = (OPENING_BYTES / layout.piece_size()).max(1) as u32;
    PieceRun {
        first: 0,
        count: count.min(layout.piece_count()),
    }
}

/// Whether the registry has spoken on the caller's right. One that asks for patience has not: the way
/// that follows an opening is patient.
fn is_verdict(error: &SourceError) -> bool {
    match error {
        SourceError::Refused { status, .. } => {
            matches!(*status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
        }
        SourceError::NotFound { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: BlobDigest = BlobDigest::new([1; 32]);

    #[tokio::test]
    async fn a_join_waits_for_an_opening_and_an_opening_gives_way_to_a_join() {
        let starts = Arc::new(Starts::default());
        let opening = starts.open(DIGEST, || false).unwrap();
        let passed_on = opening.lend(Bytes::from_static(b"head")).unwrap();
        starts.passed_on(&DIGEST);
        passed_on.notified().await;
        assert_eq!(starts.head(&DIGEST).as_deref(), Some(&b"head"[..]));
        assert!(starts.open(DIGEST, || false).is_none());
        let mut join = Box::pin(starts.join(DIGEST));
        assert!(futures_util::poll!(&mut join).is_pending());
        drop(opening);
        let first = join.await.unwrap();
        assert_eq!(starts.head(&DIGEST), None);
        let second = starts.join(DIGEST).await.unwrap();
        drop(first);
        assert!(
            starts.open(DIGEST, || false).is_none(),
            "one is still there"
        );
        drop(second);
        assert!(starts.open(DIGEST, || true).is_none(), "known already");
        assert!(starts.open(DIGEST, || false).is_some());
        assert!(starts.0.lock().is_empty());
    }

    #[tokio::test]
    async fn an_opening_that_hangs_does_not_hold_a_reader_for_ever() {
        let starts = Arc::new(Starts::default());
        let _opening = starts.open(DIGEST, || false).unwrap();
        assert!(starts.join(DIGEST).await.is_none());
    }

    #[test]
    fn openings_at_one_time_are_bounded() {
        let starts = Arc::new(Starts::default());
        let numbered = |n: usize| BlobDigest::new([n as u8; 32]);
        let all: Vec<_> = (0..OPENINGS_MAX)
            .map(|n| starts.open(numbered(n), || false).unwrap())
            .collect();
        assert!(starts.open(numbered(255), || false).is_none());
        drop(all);
        assert!(starts.open(numbered(255), || false).is_some());
    }
}
