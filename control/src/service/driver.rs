//! The task that owns the core: it takes inputs one by one, and never waits for a node.

use std::collections::HashMap;
use std::time::Duration;

use pantala_wire::NodeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::core::{Core, CoreConfig, CoreStatus, FromNode, NodeInfo, ToNode};

/// Inputs that wait for the core. When it is full, the sessions wait, and the nodes with them.
const INPUTS_MAX: usize = 4096;
/// How far away the next look at the clock is when nothing is due.
const IDLE_WAIT: Duration = Duration::from_secs(3600);

/// Tells the sessions of one node apart.
pub(super) type SessionId = u64;

/// The core's way to one session.
pub(super) struct Outlet {
    pub(super) messages: mpsc::Sender<ToNode>,
    /// Ends the session with this status.
    pub(super) end: oneshot::Sender<Status>,
}

/// What the core's task is told.
pub(super) enum Input {
    Joined {
        node: NodeId,
        session: SessionId,
        info: NodeInfo,
        outlet: Outlet,
    },
    Message {
        node: NodeId,
        session: SessionId,
        message: FromNode,
    },
    Left {
        node: NodeId,
        session: SessionId,
        status: Status,
    },
    Status(oneshot::Sender<(CoreStatus, Duration)>),
}

struct Session {
    id: SessionId,
    outlet: Outlet,
}

struct Driver {
    core: Core,
    epoch: Instant,
    sessions: HashMap<NodeId, Session>,
    out: Vec<(NodeId, ToNode)>,
}

/// Starts the task; it ends when `stopped` says so, or when every sender is gone.
pub(super) fn start(config: CoreConfig, mut stopped: watch::Receiver<bool>) -> mpsc::Sender<Input> {
    let (inputs, mut queue) = mpsc::channel(INPUTS_MAX);
    tokio::spawn(async move {
        let mut driver = Driver {
            core: Core::new(config, Duration::ZERO),
            epoch: Instant::now(),
            sessions: HashMap::new(),
            out: Vec::new(),
        };
        loop {
            let due = driver.core.next_timeout();
            let due = due.map_or_else(|| Instant::now() + IDLE_WAIT, |due| driver.epoch + due);
            tokio::select! {
                input = queue.recv() => match input {
                    Some(input) => driver.take(input),
                    None => break,
                },
                () = sleep_until(due) => {}
                _ = stopped.wait_for(|stop| *stop) => break,
            }
            driver.core.tick(driver.epoch.elapsed(), &mut driver.out);
            driver.deliver();
        }
        for session in driver.sessions.into_values() {
            // A session that has ended already does not listen.
            session
                .outlet
                .end
                .send(Status::unavailable("control is stopping"))
                .ok();
        }
    });
    inputs
}

impl Driver {
    fn take(&mut self, input: Input) {
        let now = self.epoch.elapsed();
        match input {
            Input::Joined {
                node,
                session,
                info,
                outlet,
            } => self.join(now, node, session, info, outlet),
            Input::Message {
                node,
                session,
                message,
            } => {
                if self.is_current(&node, session) {
                    self.core.handle(now, node, message, &mut self.out);
                }
            }
            Input::Left {
                node,
                session,
                status,
            } => {
                if self.is_current(&node, session) {
                    self.end(now, node, status);
                }
            }
            // Who asked may have gone.
            Input::Status(reply) => drop(reply.send((self.core.status(), now))),
        }
        self.deliver();
    }

    fn is_current(&self, node: &NodeId, session: SessionId) -> bool {
        self.sessions.get(node).is_some_and(|s| s.id == session)
    }

    fn join(&mut self, now: Duration, node: NodeId, id: SessionId, info: NodeInfo, outlet: Outlet) {
        let address = info.address;
        let is_in = self.core.joined(now, node, info, &mut self.out);
        let before = self.sessions.insert(node, Session { id, outlet });
        if let Some(before) = before {
            tracing::info!(node = %node.short(), "a new session replaces the one before");
            let status = Status::aborted("a new session of this node has replaced this one");
            before.outlet.end.send(status).ok();
        }
        if is_in {
            tracing::info!(node = %node.short(), %address, "node joined");
        } else {
            tracing::warn!(node = %node.short(), %address, "node refused");
            let status = Status::permission_denied(
                "control has no room for this node, or the node is shut out",
            );
            self.end(now, node, status);
        }
    }

    fn end(&mut self, now: Duration, node: NodeId, status: Status) {
        if let Some(session) = self.sessions.remove(&node) {
            tracing::info!(node = %node.short(), reason = status.message(), "session ended");
            session.outlet.end.send(status).ok();
            self.core.left(now, node);
        }
    }

    fn deliver(&mut self) {
        let now = self.epoch.elapsed();
        for (node, message) in std::mem::take(&mut self.out) {
            let Some(session) = self.sessions.get(&node) else {
                continue;
            };
            if session.outlet.messages.try_send(message).is_err() {
                let status =
                    Status::resource_exhausted("this node takes messages too slowly; reconnect");
                self.end(now, node, status);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::message::Labels;
    use pantala_wire::BlobDigest;

    struct End {
        messages: mpsc::Receiver<ToNode>,
        ended: oneshot::Receiver<Status>,
    }

    async fn join(inputs: &mpsc::Sender<Input>, number: u8, room: usize) -> End {
        let (sender, messages) = mpsc::channel(room);
        let (end, ended) = oneshot::channel();
        let joined = Input::Joined {
            node: NodeId::new([number; 32]),
            session: u64::from(number),
            info: NodeInfo {
                address: ([127, 0, 0, 1], 1).into(),
                labels: Labels::default(),
                resumed: false,
                ..NodeInfo::default()
            },
            outlet: Outlet {
                messages: sender,
                end,
            },
        };
        assert!(inputs.send(joined).await.is_ok());
        End { messages, ended }
    }

    async fn ask(inputs: &mpsc::Sender<Input>, number: u8, session: SessionId) {
        let message = FromNode::AskLease {
            digest: BlobDigest::new([0; 32]),
            wanted: Vec::new(),
            urgent: None,
        };
        let node = NodeId::new([number; 32]);
        let input = Input::Message {
            node,
            session,
            message,
        };
        assert!(inputs.send(input).await.is_ok());
    }

    #[tokio::test]
    async fn a_node_whose_messages_pile_up_is_cut_off_and_the_others_are_served() {
        let (_stop, stopped) = watch::channel(false);
        let inputs = start(CoreConfig::default(), stopped);
        let mut slow = join(&inputs, 1, 3).await;
        let mut quick = join(&inputs, 2, 3).await;
        for _ in 0..4 {
            ask(&inputs, 1, 1).await;
        }
        ask(&inputs, 2, 2).await;
        assert!(quick.messages.recv().await.is_some());
        let status = slow.ended.await.unwrap();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        // What fitted is there, and then nothing: the core has let go of the session.
        for _ in 0..3 {
            assert!(slow.messages.recv().await.is_some());
        }
        assert!(slow.messages.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_session_that_was_replaced_cannot_speak_or_leave_for_the_new_one() {
        let (_stop, stopped) = watch::channel(false);
        let inputs = start(CoreConfig::default(), stopped);
        let node = NodeId::new([1; 32]);
        let old = join(&inputs, 1, 3).await;
        let (sender, mut messages) = mpsc::channel(3);
        let (end, mut ended) = oneshot::channel();
        let info = NodeInfo {
            address: ([127, 0, 0, 1], 1).into(),
            labels: Labels::default(),
            resumed: true,
            ..NodeInfo::default()
        };
        let outlet = Outlet {
            messages: sender,
            end,
        };
        let session = 77;
        let joined = Input::Joined {
            node,
            session,
            info,
            outlet,
        };
        assert!(inputs.send(joined).await.is_ok());
        assert_eq!(old.ended.await.unwrap().code(), tonic::Code::Aborted);
        ask(&inputs, 1, 1).await;
        let status = Status::cancelled("late");
        let left = Input::Left {
            node,
            session: 1,
            status,
        };
        assert!(inputs.send(left).await.is_ok());
        ask(&inputs, 1, session).await;
        assert!(messages.recv().await.is_some());
        assert!(
            messages.try_recv().is_err(),
            "the old session's request was answered"
        );
        assert!(ended.try_recv().is_err());
    }
}
