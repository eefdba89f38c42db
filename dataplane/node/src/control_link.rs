//! Between control and the downloads: commands go up, events come down to the task they are for.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pantala_control::core::message::RefusedReason;
use pantala_control::{Command, ControlHandle, Event};
use pantala_swarm::{Candidate, Input};
use pantala_wire::BlobDigest;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::engine::Shared;
use crate::peer::REPORT_INTERVAL;

/// How long an event may wait for a download that is behind with its own. Its machine asks again
/// for what it misses; the link must not stand still for it.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(1);

/// How long control's answer to the question for an opening is waited for: many round trips in a
/// cluster, and less than the round trip to the source that it may save.
const OPENING_ANSWER_PATIENCE: Duration = Duration::from_millis(100);

/// False claims remembered: what control hears of one node in a minute.
const ACCUSATIONS_KEPT_MAX: usize = 64;

/// The way to control.
#[derive(Clone)]
pub struct ControlLink {
    handle: ControlHandle,
    /// Who waits for an opening. Bounded by the engine, which asks once for a blob at a time.
    openings: Arc<Mutex<HashMap<BlobDigest, oneshot::Sender<bool>>>>,
    /// False claims that this node has found, the last one last: said again in each session, since
    /// control may have been away, and may have forgotten.
    accusations: Arc<Mutex<VecDeque<Command>>>,
}

impl ControlLink {
    /// Over this client's session.
    pub fn new(handle: ControlHandle) -> Self {
        Self {
            handle,
            openings: Arc::default(),
            accusations: Arc::default(),
        }
    }

    /// Whether this node, and no other, may ask the source for the first bytes of a blob of unknown
    /// size. A yes that comes too late is returned.
    pub async fn ask_opening(&self, digest: BlobDigest) -> bool {
        let (answer, mut granted) = oneshot::channel();
        self.openings.lock().insert(digest, answer);
        if self.handle.send(Command::AskOpening { digest }).is_err() {
            self.openings.lock().remove(&digest);
            return false;
        }
        match tokio::time::timeout(OPENING_ANSWER_PATIENCE, &mut granted).await {
            Ok(granted) => granted.unwrap_or(false),
            Err(_) => {
                self.openings.lock().remove(&digest);
                granted.close();
                granted.try_recv().unwrap_or(false)
            }
        }
    }

    fn opening_answered(&self, digest: BlobDigest, granted: bool) {
        let waiting = self.openings.lock().remove(&digest);
        let is_heard = waiting.is_some_and(|waiting| waiting.send(granted).is_ok());
        if granted && !is_heard {
            self.send(Command::ReturnOpening { digest });
        }
    }

    /// Whether control answers.
    pub fn is_connected(&self) -> bool {
        self.handle.is_connected()
    }

    /// Says something to control. What cannot be said now needs no repeating: a download that
    /// waits for an answer goes on alone, and the next session begins with an announcement of all
    /// that is held and wanted.
    pub fn send(&self, command: Command) {
        if let Err(unsent) = self.handle.send(command) {
            tracing::trace!(%unsent, "command not sent");
        }
    }

    /// Reports a false claim, now and in each session to come.
    pub fn accuse(&self, report: Command) {
        let mut kept = self.accusations.lock();
        if kept.len() == ACCUSATIONS_KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(report.clone());
        drop(kept);
        self.send(report);
    }

    fn accuse_again(&self) {
        let kept = self.accusations.lock().clone();
        for report in kept {
            self.send(report);
        }
    }

    /// Tells control now and then what parents deliver, for as long as the node runs.
    pub async fn report_paths(shared: std::sync::Weak<Shared>) {
        loop {
            tokio::time::sleep(REPORT_INTERVAL).await;
            let Some(shared) = shared.upgrade() else {
                return;
            };
            let meter = shared.peers.meter();
            for reports in shared.peers.paths().take(|node| meter.deliverable(node)) {
                shared.control.send(Command::Paths { reports });
            }
        }
    }

    /// Delivers control's events to the downloads until the client ends.
    pub async fn run(mut events: mpsc::Receiver<Event>, shared: Arc<Shared>) {
        while let Some(event) = events.recv().await {
            if tokio::time::timeout(DELIVERY_PATIENCE, deliver(event, &shared))
                .await
                .is_err()
            {
                tracing::warn!("an event of control was dropped: a download is too far behind");
            }
        }
    }
}

async fn deliver(event: Event, shared: &Arc<Shared>) {
    match event {
        Event::Connected => {
            tracing::info!("control connected");
            shared.metrics.control_connected.set(1);
            shared.announce().await;
            shared.control.accuse_again();
            shared.tell_all(Input::ControlUp).await;
        }
        Event::Disconnected { reason } => {
            if shared.metrics.control_connected.set(0) == 1 {
                tracing::warn!(%reason, "control lost: downloads go on without it");
            } else {
                tracing::debug!(%reason, "control cannot be reached");
            }
            // Nobody answers these any more.
            shared.control.openings.lock().clear();
            shared.tell_all(Input::ControlDown).await;
        }
        Event::Opening { digest, granted } => shared.control.opening_answered(digest, granted),
        Event::Parents { digest, peers } => {
            shared.peers.learn(&peers);
            let me = shared.identity.node_id();
            let others = peers.iter().filter(|peer| peer.node != me);
            let parents = others.map(|peer| Candidate {
                id: peer.node,
                near: peer.near,
            });
            let input = Input::Parents(parents.collect());
            shared.tell(&digest, input).await;
        }
        Event::Lease {
            digest,
            pieces,
            expires_in,
        } => {
            let input = Input::Lease { pieces, expires_in };
            if !shared.tell(&digest, input).await {
                // The download ended meanwhile: somebody else may fetch these.
                let pieces = vec![pieces];
                shared.control.send(Command::ReturnLease { digest, pieces });
            }
        }
        Event::LeaseCut { digest, pieces } => {
            shared.tell(&digest, Input::LeaseCut { pieces }).await;
        }
        Event::LeaseWait {
            digest,
            retry_after,
            sharing_count,
        } => {
            shared
                .tell(
                    &digest,
                    Input::LeaseWait {
                        retry_after,
                        sharing_count,
                    },
                )
                .await;
        }
        Event::Refused {
            digest,
            reason: RefusedReason::UnknownTask,
        } => shared.open_at_control(&digest),
        Event::Refused { digest, reason } => {
            tracing::warn!(%digest, %reason, "control does not help with this download");
            shared.tell(&digest, Input::ControlDown).await;
        }
        Event::ShutOut(nodes) => {
            tracing::warn!(?nodes, "control shut nodes out");
            shared.peers.shut_out(&nodes);
            shared.tell_all(Input::ShutOut(nodes)).await;
        }
    }
}
