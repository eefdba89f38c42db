//! Downloads: one task for each blob that somebody reads, and what all of them share.
//!
//! `mirror` opens blobs here and reads them; the policy of a download is `pantala_swarm`'s, the
//! bytes are `pantala_store`'s. This module performs: it fetches from parents and from the source,
//! writes, hashes, and reports. A task that fails leaves its readers a last resort: the source,
//! read directly with the caller's own rights, past the store.

mod actor;
mod board;
mod direct;
mod fetch_peer;
mod fetch_source;
mod fill;
mod opening;
mod reader;
mod recheck;
mod subscribe;
mod task;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use pantala_control::{Command, Identity, TaskReport};
use pantala_source::{Source, SourceError};
use pantala_store::{Blob, Store, StoreError};
use pantala_swarm::{DownloadConfig, Input};
use pantala_wire::{BlobDigest, ByteRange, NodeId, Priority};
use parking_lot::Mutex;

pub use board::Board;
pub use direct::{DirectError, DirectStream};
pub use fill::{FillFailed, Filled};
pub use opening::Opened;
pub use reader::{ReadError, ReadRequest, ReadStream};
pub use task::{SourceAccess, Task, TaskState, TaskSummary};

use crate::control_link::ControlLink;
use crate::metrics::{ByPeer, Metrics};
use crate::peer::Peers;
use task::TaskEvent;

/// Blobs in one message of an announcement.
const ANNOUNCE_BATCH: usize = 256;
/// Blobs kept open after use: opening one anew would verify its pieces anew. A few images' layers,
/// two descriptors each.
const WARM_BLOBS_MAX: usize = 128;
/// Ended tasks that `status` still shows.
const ENDED_SHOWN_MAX: usize = 256;

/// Runs `work`, which may block on the disk or hash for long, off the threads that serve sockets.
///
/// A panic in `work` goes on in the caller: it is a bug, and must not pass for an answer.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(tokio::task::spawn_blocking(work)).await
}

/// What became of work on a thread that may block.
pub(crate) async fn joined<T>(work: tokio::task::JoinHandle<T>) -> T {
    match work.await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down; whoever waits goes down with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// What all downloads of a node use.
pub struct Shared {
    /// Blobs on disk.
    pub store: Store,
    /// Registries.
    pub source: Source,
    /// Other nodes.
    pub peers: Peers,
    /// Control.
    pub control: ControlLink,
    /// This node.
    pub identity: Arc<Identity>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Bytes from each peer, all blobs together.
    pub by_peer: ByPeer,
    /// Who waits for which blob.
    pub board: Board,
    /// The bounds of each download.
    pub download: DownloadConfig,
    tasks: Mutex<HashMap<BlobDigest, Arc<Task>>>,
    starts: Arc<opening::Starts>,
    ended: Mutex<VecDeque<TaskSummary>>,
    /// The last used first.
    warm: Mutex<VecDeque<Blob>>,
}

impl Shared {
    /// No download yet.
    pub fn new(
        store: Store,
        source: Source,
        peers: Peers,
        control: ControlLink,
        identity: Arc<Identity>,
        metrics: Arc<Metrics>,
        board: Board,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            source,
            peers,
            control,
            identity,
            metrics,
            by_peer: ByPeer::default(),
            board,
            download: DownloadConfig::default(),
            tasks: Mutex::default(),
            starts: Arc::default(),
            ended: Mutex::default(),
            warm: Mutex::default(),
        })
    }

    /// Joins the blob's download, or starts it.
    ///
    /// # Errors
    /// [`StoreError`] where there is no room for it, or its size contradicts what is stored.
    pub async fn join(
        self: &Arc<Self>,
        digest: BlobDigest,
        size_bytes: u64,
        access: Option<SourceAccess>,
    ) -> Result<Arc<Task>, StoreError> {
        // Whoever opens the blob at this moment makes a task of it: then that is joined.
        let _starting = match self.is_running(&digest) {
            true => None,
            false => self.starts.join(digest).await,
        };
        let running = self.tasks.lock().get(&digest).cloned();
        if let Some(task) = running {
            let stored_bytes = task.blob.layout().blob_size();
            if stored_bytes != size_bytes {
                return Err(StoreError::WrongSize {
                    digest,
                    stored_bytes,
                    asked_bytes: size_bytes,
                });
            }
            if let Some(access) = access {
                task.tell(TaskEvent::Access(access)).await;
            }
            return Ok(task);
        }
        let shared = Arc::clone(self);
        let blob = blocking(move || shared.open_blob(&digest, size_bytes)).await?;
        let (task, events) = Task::new(digest, blob, access.clone());
        if task.blob.is_complete() {
            // Nothing to download: a task without an actor, which nobody else needs to find.
            task.state.send_replace(TaskState::Complete);
            return Ok(task);
        }
        let winner = {
            let mut tasks = self.tasks.lock();
            match tasks.get(&digest) {
                Some(other) => Arc::clone(other),
                None => {
                    tasks.insert(digest, Arc::clone(&task));
                    self.metrics.tasks_active.set(tasks.len() as i64);
                    Arc::clone(&task)
                }
            }
        };
        if Arc::ptr_eq(&winner, &task) {
            tracing::info!(%digest, size_bytes, "download started");
            tokio::spawn(actor::Actor::new(Arc::clone(self), task).run(events));
        } else if let Some(access) = access {
            winner.tell(TaskEvent::Access(access)).await;
        }
        Ok(winner)
    }

    fn is_running(&self, digest: &BlobDigest) -> bool {
        self.tasks.lock().contains_key(digest)
    }

    /// Opens or creates a blob, and keeps it open for the next use.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub(crate) fn open_blob(
        &self,
        digest: &BlobDigest,
        size_bytes: u64,
    ) -> Result<Blob, StoreError> {
        let blob = match self.store.create(digest, size_bytes) {
            // An open blob cannot be evicted: those that only wait for a next use make room.
            Err(error) if error.is_full() => {
                self.warm.lock().clear();
                self.store.create(digest, size_bytes)?
            }
            other => other?,
        };
        let mut warm = self.warm.lock();
        warm.retain(|other| other.digest() != digest);
        warm.truncate(WARM_BLOBS_MAX - 1);
        warm.push_front(blob.clone());
        Ok(blob)
    }

    /// Drops a blob from the store.
    fn forget(&self, digest: &BlobDigest) -> Result<bool, StoreError> {
        self.warm.lock().retain(|blob| blob.digest() != digest);
        self.store.remove(digest)
    }

    /// Reads part of a blob as it arrives.
    pub async fn read(
        self: &Arc<Self>,
        digest: BlobDigest,
        size_bytes: u64,
        request: ReadRequest,
    ) -> Result<ReadStream, StoreError> {
        let is_whole = request.range.len() == size_bytes;
        if is_whole && let Some(head) = self.starts.head(&digest) {
            return Ok(self.headed(digest, size_bytes, request, head));
        }
        let task = self
            .join(digest, size_bytes, request.access.clone())
            .await?;
        // Who reads the whole blob wants the rest of it soon; who reads a part may want no more.
        if is_whole && task.state() == TaskState::Running {
            let head = task.head.lock().clone();
            if let Some(head) = head.filter(|_| task.blob.readable_from(0) == 0) {
                return Ok(self.headed(digest, size_bytes, request, head));
            }
            let priority = Priority::Bulk;
            task.input(Input::FetchAll { priority }).await;
        }
        let reader = reader::Reader::new(Arc::clone(self), task, request);
        Ok(Box::pin(reader.into_stream()))
    }

    /// A whole blob whose first bytes are in memory: these at once, the rest from its task.
    fn headed(
        self: &Arc<Self>,
        digest: BlobDigest,
        size_bytes: u64,
        request: ReadRequest,
        head: Bytes,
    ) -> ReadStream {
        let head_bytes = head.len() as u64;
        self.metrics.client_sent.inc_by(head_bytes);
        let shared = Arc::clone(self);
        let rest = shared.read_on(digest, size_bytes, request, head_bytes);
        let rest = futures_util::stream::once(rest).flatten();
        Box::pin(futures_util::stream::iter([Ok(head)]).chain(rest))
    }

    /// Downloads the whole blob though nobody reads it now; returns when that has ended.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub async fn prefetch(
        self: &Arc<Self>,
        digest: BlobDigest,
        size_bytes: u64,
        access: Option<SourceAccess>,
    ) -> Result<TaskState, StoreError> {
        let task = self.join(digest, size_bytes, access).await?;
        let _reader = task.hold();
        let priority = Priority::Prefetch;
        task.input(Input::FetchAll { priority }).await;
        let mut state = task.state.subscribe();
        // The sender lives in the task, which this holds.
        let ended = state.wait_for(|state| *state != TaskState::Running).await;
        Ok(ended.map_or(TaskState::Parked, |state| state.clone()))
    }

    /// Reads past the store and the swarm; a whole blob's last bytes are kept back until its
    /// sha256 is right.
    ///
    /// # Errors
    /// The source's.
    pub async fn direct(
        &self,
        digest: &BlobDigest,
        size_bytes: u64,
        range: ByteRange,
        access: &SourceAccess,
    ) -> Result<direct::DirectStream, SourceError> {
        let body = self
            .source
            .fetch_blob(
                &access.upstream,
                &access.repository,
                digest,
                size_bytes,
                range,
                &access.credential,
            )
            .await?;
        let whole = range.len() == size_bytes;
        Ok(direct::stream(body, whole.then_some(*digest)))
    }

    /// A download has ended.
    async fn retire(&self, task: &Arc<Task>, state: TaskState) {
        {
            let mut tasks = self.tasks.lock();
            if tasks
                .get(&task.digest)
                .is_some_and(|t| Arc::ptr_eq(t, task))
            {
                tasks.remove(&task.digest);
            }
            self.metrics.tasks_active.set(tasks.len() as i64);
        }
        task.state.send_replace(state);
        self.board.ring(&task.digest);
        {
            let mut ended = self.ended.lock();
            ended.retain(|e| e.digest != task.digest.to_string());
            ended.truncate(ENDED_SHOWN_MAX - 1);
            ended.push_front(task.summary());
        }
        let digest = task.digest;
        self.control.send(Command::Holding {
            digest,
            runs: task.blob.held().runs(),
            complete: task.blob.is_complete(),
        });
        self.control.send(Command::CloseTask { digest });
    }

    /// Tells control that the blob is being downloaded here.
    pub fn open_at_control(&self, digest: &BlobDigest) {
        let Some(task) = self.tasks.lock().get(digest).cloned() else {
            return;
        };
        self.control.send(Command::OpenTask {
            digest: *digest,
            size_bytes: task.blob.layout().blob_size(),
            has_source: task.access().is_some(),
            held: task.blob.held().runs(),
            complete: task.blob.is_complete(),
        });
    }

    /// Tells control, at the start of a session, all that is held and wanted.
    pub async fn announce(&self) {
        let store = self.store.clone();
        let stored = blocking(move || store.list()).await;
        // A task that starts meanwhile says so after this announcement, not in the middle of it:
        // tasks are added under this lock.
        let tasks = self.tasks.lock();
        let mut reports: Vec<TaskReport> = tasks.values().map(|task| task.report()).collect();
        reports.extend(
            stored
                .iter()
                .filter(|blob| blob.complete && !tasks.contains_key(&blob.digest))
                .map(|blob| TaskReport {
                    digest: blob.digest,
                    size_bytes: blob.size,
                    has_source: false,
                    wanted: false,
                    complete: true,
                    held: Vec::new(),
                    fetching: Vec::new(),
                }),
        );
        let mut rest = reports.as_slice();
        loop {
            let (batch, after) = rest.split_at(rest.len().min(ANNOUNCE_BATCH));
            rest = after;
            self.control.send(Command::Announce {
                holdings: batch.to_vec(),
                last: rest.is_empty(),
            });
            if rest.is_empty() {
                return;
            }
        }
    }

    /// A parent could not be reached; control may know better ones.
    fn parent_failed(&self, digest: BlobDigest, node: NodeId) {
        self.control.send(Command::ParentFailed { digest, node });
    }

    /// Every metric, brought up to date.
    pub fn metrics_text(&self) -> String {
        let used = i64::try_from(self.store.usage_bytes()).unwrap_or(i64::MAX);
        self.metrics.store_used.set(used);
        self.metrics.text()
    }

    /// Tells the blob's download; false where there is none.
    pub async fn tell(&self, digest: &BlobDigest, input: Input) -> bool {
        let task = self.tasks.lock().get(digest).cloned();
        match task {
            Some(task) => {
                task.input(input).await;
                true
            }
            None => false,
        }
    }

    /// Tells every download.
    pub async fn tell_all(&self, input: Input) {
        let tasks: Vec<_> = self.tasks.lock().values().cloned().collect();
        for task in tasks {
            task.input(input.clone()).await;
        }
    }

    /// Running downloads and the last ended ones.
    pub fn summaries(&self) -> Vec<TaskSummary> {
        let running: Vec<_> = self.tasks.lock().values().cloned().collect();
        let mut all: Vec<TaskSummary> = running.iter().map(|t| t.summary()).collect();
        let ended = self.ended.lock();
        all.extend(
            ended
                .iter()
                .filter(|e| running.iter().all(|t| t.digest.to_string() != e.digest))
                .cloned(),
        );
        all
    }

    /// Ends every download, for a shutdown; what is held becomes durable.
    pub async fn shutdown(&self) {
        let tasks: Vec<_> = self.tasks.lock().values().cloned().collect();
        for task in tasks {
            let digest = task.digest;
            let blob = task.blob.clone();
            if let Err(error) = blocking(move || blob.flush()).await {
                tracing::warn!(%digest, %error, "pieces could not be made durable");
            }
        }
    }
}

/// How long a shutdown waits for transfers under way.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
