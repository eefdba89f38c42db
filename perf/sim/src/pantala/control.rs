//! Control and the sessions of nodes with it: the twin of its service and of the node's client.

use std::collections::BTreeMap;
use std::time::Duration;

use pantala_control::Labels;
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, RefusedReason, TaskReport, ToNode};
use pantala_swarm::{Candidate, Input};
use pantala_wire::PieceIndex;

use super::World;
use super::node::Session;
use super::queue::Event;

/// Reports in one message of an announcement; as in the node.
const ANNOUNCE_BATCH: usize = 256;
/// Waits between two tries to reach control; as in its client.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// From a broken session to the moment at which an end that is not told of it finds out.
const NOTICE_TIME: Duration = Duration::from_millis(50);

/// Control as the world sees it.
pub(super) struct Control {
    pub(super) core: Core,
    /// It can be reached.
    pub(super) up: bool,
    /// The session of each node, as far as control knows.
    pub(super) sessions: BTreeMap<u32, u64>,
    tick_at: Option<Duration>,
    next_session: u64,
}

impl Control {
    pub(super) fn new(config: &CoreConfig) -> Self {
        Self {
            core: Core::new(config.clone(), Duration::ZERO),
            up: true,
            sessions: BTreeMap::new(),
            tick_at: None,
            next_session: 0,
        }
    }
}

impl World {
    /// The process of a node starts.
    pub(super) fn start(&mut self, node: u32) {
        let it = &mut self.nodes[node as usize];
        it.alive = true;
        it.session = Session::default();
        let epoch = it.epoch;
        self.connect(node, epoch);
    }

    /// The node's client tries to open a session.
    pub(super) fn connect(&mut self, node: u32, epoch: u32) {
        if !self.is_current(node, epoch) {
            return;
        }
        self.control.next_session += 1;
        let session = self.control.next_session;
        self.nodes[node as usize].session.number = session;
        // One round trip for the connection, then the greeting.
        let delay = self.delay(node, u32::MAX) * 2 + self.delay(u32::MAX, node);
        self.after(
            delay,
            Event::Hello {
                node,
                epoch,
                session,
            },
        );
    }

    pub(super) fn hello(&mut self, node: u32, epoch: u32, session: u64) {
        let it = &self.nodes[node as usize];
        if !self.is_current(node, epoch) || it.session.number != session {
            return;
        }
        let delay = self.delay(u32::MAX, node);
        if !self.control.up {
            return self.after(delay, Event::SessionLost { node, session });
        }
        let topology = &self.topology;
        let label = |what: &str, number: u32| match topology.has_racks() {
            true => format!("{what}-{number}"),
            false => String::new(),
        };
        let [b3, b2, b1, b0] = node.to_le_bytes();
        let info = NodeInfo {
            address: ([b0, b1, b2, b3], 4001).into(),
            labels: Labels {
                host: format!("host-{node}"),
                rack: label("rack", topology.rack(node)),
                zone: label("zone", topology.zone(node)),
            },
            resumed: it.session.resumed,
            uplink_bytes_per_s: Some(self.net.capacity(topology.uplink(node)) as u64),
            ..NodeInfo::default()
        };
        let id = it.id;
        let mut out = Vec::new();
        self.referee.joined(node, info.resumed);
        let is_in = self.control.core.joined(self.now, id, info, &mut out);
        if is_in {
            self.control.sessions.insert(node, session);
        }
        self.after(
            delay,
            match is_in {
                true => Event::Welcome { node, session },
                false => Event::SessionLost { node, session },
            },
        );
        self.control_answers(out);
    }

    pub(super) fn welcome(&mut self, node: u32, session: u64) {
        let it = &mut self.nodes[node as usize];
        if !it.alive || it.session.number != session {
            return;
        }
        it.session.connected = true;
        it.session.resumed = true;
        it.session.failures = 0;
        self.announce(node);
        for report in self.nodes[node as usize].accusations.clone() {
            self.tell_control(node, report);
        }
        self.post_all(node, &Input::ControlUp);
    }

    fn announce(&mut self, node: u32) {
        let it = &self.nodes[node as usize];
        let reports: Vec<TaskReport> = it
            .stores
            .iter()
            .filter(|(blob, stored)| stored.complete || it.tasks.contains_key(blob))
            .map(|(&blob, stored)| {
                let task = it.tasks.get(&blob);
                TaskReport {
                    digest: self.digests[blob as usize],
                    size_bytes: self.layouts[blob as usize].blob_size(),
                    has_source: task.is_some() && it.has_source,
                    wanted: task.is_some(),
                    complete: stored.complete,
                    held: task.map_or_else(Vec::new, |_| stored.held.runs()),
                    fetching: task.map_or_else(Vec::new, |task| task.leased.runs()),
                }
            })
            .collect();
        let mut rest = reports.as_slice();
        loop {
            let (batch, after) = rest.split_at(rest.len().min(ANNOUNCE_BATCH));
            rest = after;
            let message = FromNode::Announce {
                holdings: batch.to_vec(),
                last: rest.is_empty(),
            };
            self.tell_control(node, message);
            if rest.is_empty() {
                return;
            }
        }
    }

    /// Says something to control, if there is a session. A message that is lost costs the session.
    pub(super) fn tell_control(&mut self, node: u32, message: FromNode) {
        let it = &self.nodes[node as usize];
        if !it.session.connected {
            return;
        }
        let session = it.session.number;
        if self.rng.chance(self.scenario.messages.control_loss) {
            return self.drop_session(node, session);
        }
        let delay = self.delay(node, u32::MAX);
        let message = Box::new(message);
        self.after(
            delay,
            Event::ToControl {
                node,
                session,
                message,
            },
        );
    }

    /// A session breaks: both ends find out.
    pub(super) fn drop_session(&mut self, node: u32, session: u64) {
        self.after(NOTICE_TIME, Event::SessionLost { node, session });
        self.after(NOTICE_TIME, Event::SessionLeft { node, session });
    }

    pub(super) fn session_lost(&mut self, node: u32, session: u64) {
        let it = &mut self.nodes[node as usize];
        if !it.alive || it.session.number != session {
            return;
        }
        it.session.number = 0;
        let was_connected = std::mem::take(&mut it.session.connected);
        it.session.failures = it.session.failures.saturating_add(1);
        let (failures, epoch) = (it.session.failures, it.epoch);
        let full = BACKOFF_MIN
            .saturating_mul(1 << failures.min(16))
            .min(BACKOFF_MAX);
        let wait = full / 2 + self.rng.time(full / 2);
        self.after(wait, Event::Connect { node, epoch });
        if was_connected {
            self.post_all(node, &Input::ControlDown);
        }
    }

    pub(super) fn session_left(&mut self, node: u32, session: u64) {
        if self.control.sessions.get(&node) != Some(&session) {
            return;
        }
        self.control.sessions.remove(&node);
        let id = self.nodes[node as usize].id;
        let grace_ends = self.now + self.policy.core.reconnect_grace;
        self.referee.left(node, grace_ends);
        self.control.core.left(self.now, id);
        self.schedule_control_tick();
    }

    pub(super) fn control_hears(&mut self, node: u32, session: u64, message: FromNode) {
        if !self.control.up || self.control.sessions.get(&node) != Some(&session) {
            return;
        }
        self.counts.control_messages += 1;
        let id = self.nodes[node as usize].id;
        self.referee
            .hears(self.now, node, &message, &self.by_digest);
        let mut out = Vec::new();
        self.control.core.handle(self.now, id, message, &mut out);
        self.control_answers(out);
    }

    pub(super) fn control_tick(&mut self) {
        if self.control.tick_at != Some(self.now) {
            return;
        }
        self.control.tick_at = None;
        let mut out = Vec::new();
        if self.control.up {
            self.control.core.tick(self.now, &mut out);
        }
        self.control_answers(out);
    }

    fn schedule_control_tick(&mut self) {
        let Some(at) = self.control.core.next_timeout().filter(|_| self.control.up) else {
            return;
        };
        let at = at.max(self.now);
        if self.control.tick_at.is_none_or(|tick| at < tick) {
            self.control.tick_at = Some(at);
            self.queue.push(at, Event::ControlTick);
        }
    }

    /// What the core says goes out, past the referee.
    fn control_answers(&mut self, out: Vec<(pantala_wire::NodeId, ToNode)>) {
        for (to, message) in out {
            let Some(&node) = self.by_id.get(&to) else {
                continue;
            };
            let message = self
                .referee
                .bent_answer(self.now, node, message, &self.by_digest);
            let checked =
                self.referee
                    .checks(self.now, node, &message, &self.by_digest, &self.by_id);
            if let Err(violation) = checked {
                return self.breaks(violation);
            }
            match message {
                ToNode::Lease { .. } => self.counts.leases += 1,
                ToNode::LeaseWait { .. } => self.counts.lease_waits += 1,
                _ => {}
            }
            let Some(&session) = self.control.sessions.get(&node) else {
                continue;
            };
            if self.rng.chance(self.scenario.messages.control_loss) {
                self.drop_session(node, session);
                continue;
            }
            let delay = self.delay(u32::MAX, node);
            let message = Box::new(message);
            self.after(
                delay,
                Event::ToNode {
                    node,
                    session,
                    message,
                },
            );
        }
        self.schedule_control_tick();
    }

    pub(super) fn node_hears(&mut self, node: u32, session: u64, message: ToNode) {
        let it = &self.nodes[node as usize];
        if !it.alive || it.session.number != session || !it.session.connected {
            return;
        }
        let of = |digest| self.by_digest.get(digest).copied();
        match message {
            ToNode::Parents { digest, peers } => {
                let me = it.id;
                let others = peers.iter().filter(|peer| peer.node != me);
                let parents = others.map(|peer| Candidate {
                    id: peer.node,
                    near: peer.near,
                });
                let input = Input::Parents(parents.collect());
                if let Some(blob) = of(&digest) {
                    self.post(node, blob, input);
                }
            }
            ToNode::Lease {
                digest,
                pieces,
                expires_in,
            } => {
                let Some(blob) = of(&digest) else {
                    return;
                };
                match self.nodes[node as usize].tasks.get_mut(&blob) {
                    Some(task) => {
                        task.leased.insert_run(pieces);
                        self.post(node, blob, Input::Lease { pieces, expires_in });
                    }
                    None => {
                        let pieces = vec![pieces];
                        self.tell_control(node, FromNode::ReturnLease { digest, pieces });
                    }
                }
            }
            ToNode::LeaseCut { digest, pieces } => {
                if let Some(blob) = of(&digest)
                    && let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob)
                {
                    for piece in pieces.range() {
                        task.leased.remove(PieceIndex(piece));
                    }
                    self.post(node, blob, Input::LeaseCut { pieces });
                }
            }
            ToNode::LeaseWait {
                digest,
                retry_after,
                sharing_count,
            } => {
                if let Some(blob) = of(&digest) {
                    self.post(
                        node,
                        blob,
                        Input::LeaseWait {
                            retry_after,
                            sharing_count,
                        },
                    );
                }
            }
            ToNode::Refused { digest, reason } => {
                let Some(blob) = of(&digest) else {
                    return;
                };
                match reason {
                    RefusedReason::UnknownTask => self.open_at_control(node, blob),
                    _ => self.post(node, blob, Input::ControlDown),
                }
            }
            ToNode::ShutOut(list) => {
                let blobs: Vec<u32> = it.tasks.keys().copied().collect();
                for blob in blobs {
                    self.post(node, blob, Input::ShutOut(list.clone()));
                }
                self.nodes[node as usize].shut_out = std::rc::Rc::new(list.into_iter().collect());
            }
            ToNode::Opening { .. } => {}
        }
    }

    /// Control goes away or comes back.
    pub(super) fn outage(&mut self, number: u32, begins: bool) {
        let outage = self.scenario.outages[number as usize];
        self.control.up = !begins;
        if begins {
            let sessions = std::mem::take(&mut self.control.sessions);
            for (node, session) in sessions {
                self.after(NOTICE_TIME, Event::SessionLost { node, session });
                if !outage.restart {
                    let id = self.nodes[node as usize].id;
                    let grace_ends = self.now + self.policy.core.reconnect_grace;
                    self.referee.left(node, grace_ends);
                    self.control.core.left(self.now, id);
                }
            }
            return;
        }
        if outage.restart {
            self.control.core = Core::new(self.policy.core.clone(), self.now);
            self.control.tick_at = None;
            self.referee.control_restarted();
        }
        self.schedule_control_tick();
    }
}
