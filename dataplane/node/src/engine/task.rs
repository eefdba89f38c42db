//! One blob's download: what its readers, its shells and its actor share.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use pantala_control::TaskReport;
use pantala_source::{Credential, OpenedBlob, Upstream};
use pantala_store::{Blob, StoreError};
use pantala_swarm::Input;
use pantala_wire::name::RepositoryName;
use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceSet};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::metrics::ByPeer;

/// Events a task's actor may be behind with before those who send them wait.
pub(super) const EVENTS_MAX: usize = 1024;
/// Ways to the source that a task remembers: one for each caller's credential, the newest first.
pub(super) const ACCESSES_MAX: usize = 8;

/// How a blob can be read from a source, and with whose rights.
#[derive(Clone)]
pub struct SourceAccess {
    /// The registry.
    pub upstream: Upstream,
    /// The repository there.
    pub repository: RepositoryName,
    /// What the caller showed; kept in memory as long as the task is.
    pub credential: Credential,
}

impl SourceAccess {
    /// Whether both lead to the same place with the same rights. Compares fingerprints under a key
    /// of this process, so that no comparison depends on a secret's bytes.
    fn same_as(&self, other: &Self) -> bool {
        static KEY: std::sync::LazyLock<[u8; 32]> = std::sync::LazyLock::new(|| {
            let mut key = [0; 32];
            // Without random bytes the key is a constant: the comparison is still right.
            if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut key).is_err() {
                tracing::warn!("the system gives no random bytes");
            }
            key
        });
        self.upstream == other.upstream
            && self.repository == other.repository
            && self.credential.fingerprint(&KEY) == other.credential.fingerprint(&KEY)
    }
}

/// What became of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskState {
    /// Bytes are arriving, or will.
    Running,
    /// The whole blob is held and its sha256 is right.
    Complete,
    /// It cannot go on; the text says why.
    Failed(Arc<str>),
    /// The bytes do not have the blob's sha256, and which are wrong could not be found out or mended:
    /// nobody should be given them.
    Corrupt(Arc<str>),
    /// Nobody read it any more; it can be opened again.
    Parked,
}

/// What an actor is told.
pub enum TaskEvent {
    /// Something for the download's state machine.
    Machine(Input),
    /// The blob's sha256 has been computed.
    Hashed(super::actor::Hashed),
    /// Pieces have been made durable.
    Flushed,
    /// The blob has been marked complete, durably, or could not be.
    Sealed(Result<(), StoreError>),
    /// A caller showed another way to the source.
    Access(SourceAccess),
}

/// The shared part of one download.
pub struct Task {
    /// The blob's sha256.
    pub digest: BlobDigest,
    /// Its file.
    pub blob: Blob,
    pub(super) events: mpsc::Sender<TaskEvent>,
    pub(super) state: watch::Sender<TaskState>,
    pub(super) accesses: Mutex<Vec<SourceAccess>>,
    /// The first bytes that the source is sending already, until they are fetched.
    pub(super) opened: Mutex<Option<OpenedBlob>>,
    /// The same bytes' beginning, for readers, until it is stored.
    pub(super) head: Mutex<Option<Bytes>>,
    /// Pieces that control leased to this node and that are not held yet.
    pub(super) leased: Mutex<PieceSet>,
    /// Which peer sent a piece, to be named if its claim turns out to be false.
    pub(super) relayers: Mutex<HashMap<PieceIndex, NodeId>>,
    pub(super) readers: AtomicU64,
    pub(super) next_reader: AtomicU64,
    /// The whole blob's sha256 is right, though that may not be on the disk yet: its last bytes may be
    /// handed on.
    pub(super) verified: AtomicBool,
    /// The whole blob's sha256 was wrong: until the wrong piece is found, nobody is given more.
    pub(super) suspect: AtomicBool,
    /// Pieces that were replaced because they were wrong: who read before has wrong bytes, perhaps.
    pub(super) replaced: AtomicU64,
    /// Bytes that came from the source.
    pub from_source: AtomicU64,
    /// Bytes that came from each peer.
    pub by_peer: ByPeer,
}

impl Task {
    pub(super) fn new(
        digest: BlobDigest,
        blob: Blob,
        access: Option<SourceAccess>,
    ) -> (Arc<Self>, mpsc::Receiver<TaskEvent>) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let piece_count = blob.layout().piece_count();
        let task = Arc::new(Self {
            digest,
            blob,
            opened: Mutex::default(),
            head: Mutex::default(),
            leased: Mutex::new(PieceSet::empty(piece_count)),
            relayers: Mutex::default(),
            events,
            state: watch::Sender::new(TaskState::Running),
            accesses: Mutex::new(access.into_iter().collect()),
            readers: AtomicU64::new(0),
            next_reader: AtomicU64::new(0),
            verified: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            replaced: AtomicU64::new(0),
            from_source: AtomicU64::new(0),
            by_peer: ByPeer::default(),
        });
        (task, receiver)
    }

    /// Tells the actor; an actor that has ended needs to know nothing any more.
    pub async fn tell(&self, event: TaskEvent) {
        if self.events.send(event).await.is_err() {
            tracing::trace!(digest = %self.digest, "event for a task that has ended");
        }
    }

    /// Tells the download's state machine.
    pub async fn input(&self, input: Input) {
        self.tell(TaskEvent::Machine(input)).await;
    }

    /// Keeps the download from being parked while the returned value lives.
    pub(super) fn hold(self: &Arc<Self>) -> Hold {
        self.readers.fetch_add(1, Ordering::AcqRel);
        Hold(Arc::clone(self))
    }

    /// What became of it so far.
    pub fn state(&self) -> TaskState {
        self.state.borrow().clone()
    }

    /// The newest way to the source, if there is one.
    pub fn access(&self) -> Option<SourceAccess> {
        self.accesses.lock().first().cloned()
    }

    /// Remembers a way to the source; true if it is new.
    pub(super) fn add_access(&self, access: SourceAccess) -> bool {
        let mut accesses = self.accesses.lock();
        let known = accesses.iter().position(|a| a.same_as(&access));
        if let Some(index) = known {
            accesses.remove(index);
        }
        accesses.insert(0, access);
        accesses.truncate(ACCESSES_MAX);
        known.is_none()
    }

    /// Forgets a way that the source refused; true if another is left.
    pub(super) fn drop_access(&self, refused: &SourceAccess) -> bool {
        let mut accesses = self.accesses.lock();
        accesses.retain(|a| !a.same_as(refused));
        !accesses.is_empty()
    }

    /// A line for `status`.
    pub fn summary(&self) -> TaskSummary {
        let layout = self.blob.layout();
        let held = self.blob.held();
        let held_bytes = if held.is_full() {
            layout.blob_size()
        } else {
            (u64::from(held.len()) * layout.piece_size()).min(layout.blob_size())
        };
        let (state, error) = match self.state() {
            TaskState::Running => ("downloading", None),
            TaskState::Complete => ("complete", None),
            TaskState::Failed(why) | TaskState::Corrupt(why) => ("failed", Some(why.to_string())),
            TaskState::Parked => ("partial", None),
        };
        let peers = self.by_peer.snapshot();
        TaskSummary {
            digest: self.digest.to_string(),
            size_bytes: layout.blob_size(),
            state,
            held_bytes,
            from_registry_bytes: self.from_source.load(Ordering::Relaxed),
            from_peer_bytes: peers.values().sum(),
            peers: peers.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
            error,
        }
    }

    /// What control is told of it at the start of a session.
    pub(super) fn report(&self) -> TaskReport {
        TaskReport {
            digest: self.digest,
            size_bytes: self.blob.layout().blob_size(),
            has_source: self.access().is_some(),
            wanted: true,
            complete: self.blob.is_complete(),
            held: self.blob.held().runs(),
            fetching: self.leased.lock().runs(),
        }
    }
}

/// What `status` says of a task.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TaskSummary {
    /// The blob.
    pub digest: String,
    /// Its size.
    pub size_bytes: u64,
    /// `downloading`, `complete`, `partial` or `failed`.
    pub state: &'static str,
    /// Verified bytes on disk.
    pub held_bytes: u64,
    /// Bytes that this task read from the registry.
    pub from_registry_bytes: u64,
    /// Bytes that it got from peers.
    pub from_peer_bytes: u64,
    /// The same, for each peer.
    pub peers: BTreeMap<String, u64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Somebody wants the task's bytes.
pub(super) struct Hold(Arc<Task>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::AcqRel);
    }
}
