//! Between control and the downloads: commands go up, events come down to the task they are for.

use std::sync::Arc;
use std::time::Duration;

use pantala_control::core::message::RefusedReason;
use pantala_control::{Command, ControlHandle, Event};
use pantala_swarm::Input;
use tokio::sync::mpsc;

use crate::engine::Shared;

/// How long an event may wait for a download that is behind with its own. Its machine asks again
/// for what it misses; the link must not stand still for it.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(1);

/// The way to control.
#[derive(Clone)]
pub struct ControlLink(ControlHandle);

impl ControlLink {
    /// Over this client's session.
    pub const fn new(handle: ControlHandle) -> Self {
        Self(handle)
    }

    /// Whether control answers.
    pub fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    /// Says something to control. What cannot be said now needs no repeating: a download that
    /// waits for an answer goes on alone, and the next session begins with an announcement of all
    /// that is held and wanted.
    pub fn send(&self, command: Command) {
        if let Err(unsent) = self.0.send(command) {
            tracing::trace!(%unsent, "command not sent");
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
            shared.tell_all(Input::ControlUp).await;
        }
        Event::Disconnected { reason } => {
            if shared.metrics.control_connected.set(0) == 1 {
                tracing::warn!(%reason, "control lost: downloads go on without it");
            } else {
                tracing::debug!(%reason, "control cannot be reached");
            }
            shared.tell_all(Input::ControlDown).await;
        }
        Event::Parents { digest, peers } => {
            shared.peers.learn(&peers);
            let me = shared.identity.node_id();
            let parents = peers.iter().map(|p| p.node).filter(|n| *n != me).collect();
            shared.tell(&digest, Input::Parents(parents)).await;
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
        Event::LeaseWait {
            digest,
            retry_after,
        } => {
            shared.tell(&digest, Input::LeaseWait { retry_after }).await;
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
        }
    }
}
