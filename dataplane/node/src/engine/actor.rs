//! Drives one download: feeds its state machine and performs what that decides.
//!
//! One actor owns one `pantala_swarm::Download`. It never waits for I/O itself: each action runs
//! as a task of its own that reports back as an event, so a slow peer, source or disk holds up
//! nothing but itself. The actor ends when the blob is complete, has failed, or nobody has read
//! it for [`LINGER`]; ending aborts what is still under way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pantala_control::Command;
use pantala_source::OpenedBlob;
use pantala_store::{Sha256Progress, Sha256Proof, Sha256Verdict, StoreError};
use pantala_swarm::{Action, Download, FailReason, Input, ReaderId, RequestId};
use pantala_wire::{ByteRange, NodeId, PieceIndex, PieceRun, Priority};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::task::{Task, TaskEvent, TaskState};
use super::{Shared, fetch_peer, fetch_source, recheck, subscribe};
use crate::metrics::OutcomeLabel;

/// How long a download without readers goes on before it is parked: a client that was cut off
/// comes back within seconds, and what others lease from the source should not be given up for it.
const LINGER: Duration = Duration::from_secs(30);
/// Verified bytes between two steps of the running sha256: small enough that little is left to
/// hash when the last piece arrives, large enough that a step is worth a thread switch.
const HASH_STEP_BYTES: u64 = 2 << 20;
/// The reader that wants what came with the opening, whoever else reads.
const OPENER: ReaderId = ReaderId(u64::MAX);
/// How long the lease on it lasts until control has said so itself.
const OPENING_LEASE: Duration = Duration::from_secs(30);
/// Unflushed bytes after which pieces are made durable: what a crash can cost each download.
const FLUSH_BYTES: u64 = 32 << 20;

/// The sha256 as far as it has been computed.
pub struct Hashed {
    hasher: Sha256Progress,
    outcome: Result<Sha256Verdict, StoreError>,
}

pub(super) struct Actor {
    shared: Arc<Shared>,
    task: Arc<Task>,
    machine: Download,
    epoch: Instant,
    shells: JoinSet<()>,
    requests: HashMap<RequestId, AbortHandle>,
    subscriptions: HashMap<NodeId, AbortHandle>,
    /// Absent while a thread computes with it.
    hasher: Option<Sha256Progress>,
    verify_wanted: bool,
    flushing: bool,
    idle_since: Option<Instant>,
    /// The registry that control knows for this blob.
    told_host: Option<String>,
}

impl Actor {
    pub(super) fn new(shared: Arc<Shared>, task: Arc<Task>) -> Self {
        let epoch = Instant::now();
        let held = task.blob.held();
        // Nodes that start the same blob at once should not all begin with the same pieces.
        let seed = u64::from_le_bytes(
            shared.identity.node_id().as_bytes()[..8]
                .try_into()
                .expect("a node ID has 32 bytes"),
        );
        let mut machine = Download::new(
            shared.download.clone(),
            task.blob.layout(),
            held,
            seed,
            Duration::ZERO,
        );
        let now = epoch.elapsed();
        machine.handle(
            now,
            Input::SourceChanged {
                available: task.access().is_some(),
            },
        );
        let control = if shared.control.is_connected() {
            Input::ControlUp
        } else {
            Input::ControlDown
        };
        machine.handle(now, control);
        let hasher = Some(Sha256Progress::new());
        Self {
            shared,
            task,
            machine,
            epoch,
            shells: JoinSet::new(),
            requests: HashMap::new(),
            subscriptions: HashMap::new(),
            hasher,
            verify_wanted: false,
            flushing: false,
            idle_since: None,
            told_host: None,
        }
    }

    /// The same for a download whose first `run` of pieces the source is sending already.
    pub(super) fn opened(shared: Arc<Shared>, task: Arc<Task>, run: PieceRun) -> Self {
        let last = PieceIndex(run.range().end.saturating_sub(1));
        let end = task.blob.layout().piece_range(last).map_or(0, |r| r.end());
        let mut actor = Self::new(shared, task);
        if let Some(range) = ByteRange::new(0, end) {
            // Who asked for them reads them soon; they are paid for in any case.
            actor.input(Input::Want {
                reader: OPENER,
                range,
                priority: Priority::Client,
            });
            actor.input(Input::Lease {
                pieces: run,
                expires_in: OPENING_LEASE,
            });
        }
        actor
    }

    /// Runs until the download ends.
    pub(super) async fn run(mut self, mut events: mpsc::Receiver<TaskEvent>) {
        self.shared.open_at_control(&self.task.digest);
        let state = loop {
            if let Some(state) = self.perform_all() {
                break state;
            }
            let timeout = self
                .machine
                .next_timeout()
                .unwrap_or(LINGER)
                .saturating_sub(self.epoch.elapsed())
                .min(LINGER);
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.event(event),
                    None => break TaskState::Parked,
                },
                Some(_) = self.shells.join_next() => {}
                () = tokio::time::sleep(timeout) => self.input(Input::Tick),
            }
            if self.idle() {
                break TaskState::Parked;
            }
        };
        self.end(state, events).await;
    }

    fn input(&mut self, input: Input) {
        self.machine.handle(self.epoch.elapsed(), input);
    }

    /// Whether nobody has read for long enough to stop.
    fn idle(&mut self) -> bool {
        if self.task.readers.load(Ordering::Acquire) > 0 {
            self.idle_since = None;
            return false;
        }
        self.idle_since.get_or_insert_with(Instant::now).elapsed() >= LINGER
    }

    fn event(&mut self, event: TaskEvent) {
        match event {
            TaskEvent::Machine(input) => {
                tracing::trace!(digest = %self.task.digest, ?input);
                match &input {
                    Input::Lease { pieces, .. } => self.task.leased.lock().insert_run(*pieces),
                    Input::LeaseCut { pieces } => {
                        let mut leased = self.task.leased.lock();
                        for piece in pieces.range() {
                            leased.remove(PieceIndex(piece));
                        }
                    }
                    // Control may be another, that was told nothing.
                    Input::ControlUp => self.told_host = None,
                    Input::PieceDone { piece, .. } => {
                        self.task.head.lock().take();
                        self.task.leased.lock().remove(*piece);
                        self.hash_on();
                        self.flush_on();
                    }
                    Input::RequestDone { request } | Input::RequestFailed { request, .. } => {
                        self.requests.remove(request);
                    }
                    Input::PieceLost { .. } => self.task.verified.store(false, Ordering::Release),
                    Input::ParentGone { parent, .. } => {
                        self.subscriptions.remove(parent);
                    }
                    _ => {}
                }
                self.input(input);
            }
            TaskEvent::Access(access) => {
                if self.task.add_access(access) {
                    self.input(Input::SourceChanged { available: true });
                }
            }
            TaskEvent::Hashed(hashed) => self.hashed(hashed),
            TaskEvent::Flushed => self.flushing = false,
            TaskEvent::Sealed(sealed) => self.sealed(sealed),
        }
    }

    /// Goes on with the sha256 where enough has arrived, or the whole is to be verified.
    fn hash_on(&mut self) {
        let Some(hasher) = &self.hasher else {
            return;
        };
        let hashed_bytes = hasher.hashed_bytes();
        let ready = self.task.blob.readable_from(hashed_bytes) - hashed_bytes;
        if !self.verify_wanted && ready < HASH_STEP_BYTES {
            return;
        }
        let Some(mut hasher) = self.hasher.take() else {
            return;
        };
        let (task, blob) = (Arc::clone(&self.task), self.task.blob.clone());
        self.shells.spawn(async move {
            let hashed = super::blocking(move || {
                let outcome = blob.verify_sha256(&mut hasher);
                Hashed { hasher, outcome }
            })
            .await;
            task.tell(TaskEvent::Hashed(hashed)).await;
        });
    }

    fn hashed(&mut self, hashed: Hashed) {
        let Hashed { hasher, outcome } = hashed;
        match outcome {
            Ok(Sha256Verdict::Unfinished) => {
                self.hasher = Some(hasher);
                self.hash_on();
            }
            Ok(Sha256Verdict::Match(proof)) => {
                self.hasher = Some(hasher);
                self.verify_wanted = false;
                // Clients need not wait for the disk.
                self.task.verified.store(true, Ordering::Release);
                self.shared.board.ring(&self.task.digest);
                self.seal(proof);
            }
            Ok(Sha256Verdict::Mismatch) => {
                tracing::warn!(digest = %self.task.digest, "the whole blob's sha256 is wrong: asking the source for its pieces again");
                self.hasher = Some(Sha256Progress::new());
                self.verify_wanted = false;
                self.task.suspect.store(true, Ordering::Release);
                self.input(Input::Verified { ok: false });
            }
            Err(StoreError::Corrupt { piece, .. }) => {
                self.shared.metrics.pieces_dropped.inc();
                tracing::warn!(digest = %self.task.digest, piece = piece.0, "a stored piece was wrong: fetching it again");
                self.hasher = Some(Sha256Progress::new());
                self.verify_wanted = false;
                self.input(Input::PieceLost { piece });
            }
            Err(error) => self.store_failed(&error),
        }
    }

    fn seal(&mut self, proof: Sha256Proof) {
        let task = Arc::clone(&self.task);
        self.shells.spawn(async move {
            let blob = task.blob.clone();
            let sealed = super::blocking(move || blob.mark_complete(proof)).await;
            task.tell(TaskEvent::Sealed(sealed)).await;
        });
    }

    fn sealed(&mut self, sealed: Result<(), StoreError>) {
        match sealed {
            Ok(()) => self.input(Input::Verified { ok: true }),
            // A piece was lost meanwhile: the machine fetches it and wants to verify again.
            Err(StoreError::StaleProof(_)) if !self.task.verified.load(Ordering::Acquire) => {}
            Err(error) => self.store_failed(&error),
        }
    }

    fn store_failed(&mut self, error: &StoreError) {
        tracing::warn!(digest = %self.task.digest, %error, "the store failed");
        self.input(Input::StoreFailed {
            reason: error.to_string(),
        });
    }

    /// Makes pieces durable now and then, so that a crash costs little.
    fn flush_on(&mut self) {
        if self.flushing || self.task.blob.unflushed_bytes() < FLUSH_BYTES {
            return;
        }
        self.flushing = true;
        let task = Arc::clone(&self.task);
        self.shells.spawn(async move {
            let blob = task.blob.clone();
            if let Err(error) = super::blocking(move || blob.flush()).await {
                tracing::warn!(digest = %task.digest, %error, "pieces could not be made durable");
            }
            task.tell(TaskEvent::Flushed).await;
        });
    }

    /// Performs what the machine wants done; the end state once there is one.
    fn perform_all(&mut self) -> Option<TaskState> {
        while let Some(action) = self.machine.poll_action() {
            tracing::trace!(digest = %self.task.digest, ?action);
            match action {
                Action::Complete => return Some(TaskState::Complete),
                Action::Fail { reason } => {
                    let why = reason.to_string().into();
                    return Some(match reason {
                        // Readers have been given wrong bytes: the rest must not make them whole.
                        FailReason::SourceCorrupt | FailReason::Unaudited(_) => {
                            TaskState::Corrupt(why)
                        }
                        _ => TaskState::Failed(why),
                    });
                }
                action => self.perform(action),
            }
        }
        None
    }

    fn perform(&mut self, action: Action) {
        let digest = self.task.digest;
        match action {
            Action::Subscribe { parent } => {
                let shell =
                    subscribe::run(Arc::clone(&self.shared), Arc::clone(&self.task), parent);
                let handle = self.shells.spawn(shell);
                self.subscriptions.insert(parent, handle);
            }
            Action::Unsubscribe { parent, failed } => {
                if failed {
                    self.shared.parent_failed(digest, parent);
                }
                if let Some(handle) = self.subscriptions.remove(&parent) {
                    handle.abort();
                }
            }
            Action::Fetch {
                request,
                parent,
                piece,
                first_group,
                priority,
            } => self.fetch(fetch_peer::PieceRequest {
                request,
                parent,
                piece,
                first_group,
                priority,
            }),
            Action::FetchSource {
                request, pieces, ..
            } => {
                let opened = self.take_opened(pieces);
                let shell = fetch_source::run(
                    Arc::clone(&self.shared),
                    Arc::clone(&self.task),
                    request,
                    pieces,
                    opened,
                );
                let handle = self.shells.spawn(shell);
                self.requests.insert(request, handle);
            }
            Action::Cancel { request } => {
                if let Some(handle) = self.requests.remove(&request) {
                    handle.abort();
                }
            }
            Action::AskLease { wanted, urgent } => {
                self.tell_host();
                self.shared.control.send(Command::AskLease {
                    digest,
                    wanted,
                    urgent: Some(urgent),
                });
            }
            Action::ReturnLease { pieces } => {
                drop(self.take_opened(pieces));
                let mut leased = self.task.leased.lock();
                for piece in pieces.range() {
                    leased.remove(PieceIndex(piece));
                }
                self.shared.control.send(Command::ReturnLease {
                    digest,
                    pieces: vec![pieces],
                });
            }
            Action::Verify => {
                self.verify_wanted = true;
                self.hash_on();
            }
            Action::Recheck { piece } => {
                let shell = recheck::run(Arc::clone(&self.shared), Arc::clone(&self.task), piece);
                self.shells.spawn(shell);
            }
            Action::Blame { node, why } => {
                self.shared.metrics.liars.inc();
                tracing::warn!(%digest, %node, ?why, "a peer is shut out of this download");
            }
            Action::Complete | Action::Fail { .. } => {}
        }
    }

    /// Tells control which registry the blob would be fetched from, where it does not know.
    fn tell_host(&mut self) {
        let host = self.task.access().map(|access| access.upstream.host_port());
        if let Some(host) = host.filter(|host| self.told_host.as_ref() != Some(host)) {
            self.shared.control.send(Command::SourceHost {
                digest: self.task.digest,
                host: host.clone(),
            });
            self.told_host = Some(host);
        }
    }

    /// The bytes that came with the opening, if they belong to this run.
    fn take_opened(&self, pieces: PieceRun) -> Option<OpenedBlob> {
        let mut opened = self.task.opened.lock();
        opened.take_if(|_| pieces.first == 0)
    }

    fn fetch(&mut self, ask: fetch_peer::PieceRequest) {
        let shell = fetch_peer::run(Arc::clone(&self.shared), Arc::clone(&self.task), ask);
        let handle = self.shells.spawn(shell);
        self.requests.insert(ask.request, handle);
    }

    async fn end(mut self, state: TaskState, mut events: mpsc::Receiver<TaskEvent>) {
        events.close();
        self.shells.abort_all();
        let outcome = match &state {
            TaskState::Complete => "complete",
            TaskState::Failed(_) | TaskState::Corrupt(_) => "failed",
            TaskState::Parked | TaskState::Running => "parked",
        };
        self.shared
            .metrics
            .tasks_ended
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
        match &state {
            TaskState::Failed(why) | TaskState::Corrupt(why) => {
                tracing::warn!(digest = %self.task.digest, %why, "download failed");
            }
            _ => tracing::info!(digest = %self.task.digest, outcome, "download ended"),
        }
        // Clients wait for the state, peers for the news; the disk may take its time after that.
        let corrupt = matches!(state, TaskState::Corrupt(_));
        self.shared.retire(&self.task, state).await;
        if corrupt {
            // Some of its pieces are wrong, and none is known to be right: the next starts afresh.
            let (shared, digest) = (Arc::clone(&self.shared), self.task.digest);
            if let Err(error) = super::blocking(move || shared.forget(&digest)).await {
                tracing::warn!(digest = %self.task.digest, %error, "a wrong blob could not be removed");
            }
            let digest = self.task.digest;
            self.shared.control.send(Command::Dropped { digest });
            return;
        }
        let blob = self.task.blob.clone();
        if let Err(error) = super::blocking(move || blob.flush()).await {
            tracing::warn!(digest = %self.task.digest, %error, "pieces could not be made durable");
        }
    }
}
