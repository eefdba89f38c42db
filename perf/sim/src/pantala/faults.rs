//! What goes wrong, and who notices.

use std::time::Duration;

use pantala_swarm::{Failure, Gone, RequestId};

use super::World;
use super::node::Live;
use super::queue::{Event, PeerMessage};
use crate::scenario::{FaultKind, seconds};

/// From a lost packet that is never made good to the moment at which the child gives the connection up.
const LOSS_NOTICE_TIME: Duration = Duration::from_millis(500);

impl World {
    /// The fault of the node's group happens to it.
    pub(super) fn fault(&mut self, node: u32) {
        let group = self.nodes[node as usize].group as usize;
        let Some(fault) = self.scenario.groups[group].fault.clone() else {
            return;
        };
        if !self.nodes[node as usize].alive {
            return;
        }
        match fault.kind {
            FaultKind::Slow { factor, down } => self.slowed(node, factor, down),
            FaultKind::SessionLoss => {
                let session = self.nodes[node as usize].session.number;
                self.drop_session(node, session);
            }
            FaultKind::Crash { back_s } => self.crash(node, back_s),
            FaultKind::Death => self.die(node),
        }
    }

    fn crash(&mut self, node: u32, back_s: Option<f64>) {
        let session = self.nodes[node as usize].session.number;
        self.after(Duration::ZERO, Event::SessionLeft { node, session });
        let children = self.end_process(node);
        for child in children {
            let delay = self.delay(node, child);
            self.after(
                delay,
                Event::Broken {
                    child,
                    parent: node,
                },
            );
        }
        match back_s {
            Some(back_s) => {
                self.after(seconds(back_s), Event::Start { node });
                for number in 0..self.nodes[node as usize].pulls.len() as u32 {
                    let state = &self.nodes[node as usize].pulls[number as usize];
                    let again = seconds(back_s) + Duration::from_millis(50);
                    if state.done.is_none() && state.started.is_some() {
                        self.after(again, Event::Pull { node, number });
                    } else if state.started.is_none() {
                        // It may be asked while it is down: then again once it is back.
                        let at = (state.at + super::SETTLE_TIME).max(self.now + again);
                        self.queue.push(at, Event::Pull { node, number });
                    }
                }
            }
            None => self.give_up_pulls(node),
        }
    }

    /// The machine falls silent: nobody is told.
    fn die(&mut self, node: u32) {
        self.referee.died(node);
        let session = self.nodes[node as usize].session.number;
        // Control's keepalive finds out.
        self.after(seconds(10.0), Event::SessionLeft { node, session });
        self.end_process(node);
        self.give_up_pulls(node);
    }

    fn give_up_pulls(&mut self, node: u32) {
        let now = self.now;
        for state in &mut self.nodes[node as usize].pulls {
            if state.done.is_none() {
                state.started = None;
                state.done = Some(now);
                self.open_pulls -= 1;
            }
        }
    }

    /// Ends everything that the process did; who fetched from it or listened to it.
    fn end_process(&mut self, node: u32) -> Vec<u32> {
        let it = &mut self.nodes[node as usize];
        it.alive = false;
        it.epoch += 1;
        it.session.number = 0;
        it.session.connected = false;
        it.connections.clear();
        let tasks = std::mem::take(&mut it.tasks);
        let mut children: Vec<u32> = Vec::new();
        for stored in it.stores.values_mut() {
            children.extend(stored.children.drain(..).map(|child| child.node));
            stored.telling = false;
        }
        let server = std::mem::take(&mut it.server);
        for (child, line) in server.lines {
            children.push(child);
            if let Some((flow, _)) = line.active {
                self.flows.remove(&flow);
                self.counts.wasted_bytes += self.net.cancel(self.now, flow);
            }
        }
        for waiting in &server.waiting {
            children.extend(waiting.iter().map(|upload| upload.child));
        }
        for task in tasks.values() {
            for live in task.live.values() {
                if let Live::Source {
                    flow: Some(flow), ..
                } = live
                {
                    self.flows.remove(flow);
                    self.counts.wasted_bytes += self.net.cancel(self.now, *flow);
                }
            }
        }
        for parent in 0..self.nodes.len() as u32 {
            self.forget_child(parent, node);
        }
        children.sort_unstable();
        children.dedup();
        children
    }

    /// What a parent did for a child ends.
    fn forget_child(&mut self, parent: u32, child: u32) {
        self.end_line(parent, child);
        for stored in self.nodes[parent as usize].stores.values_mut() {
            stored.children.retain(|other| other.node != child);
        }
    }

    /// A message between two nodes is lost for good, and the connection with it.
    pub(super) fn lose_connection(&mut self, from: u32, to: u32, message: &PeerMessage) {
        let is_from_child = matches!(
            message,
            PeerMessage::Subscribe { .. }
                | PeerMessage::Unsubscribe { .. }
                | PeerMessage::Fetch { .. }
                | PeerMessage::Cancel { .. }
        );
        let (child, parent) = if is_from_child {
            (from, to)
        } else {
            (to, from)
        };
        self.after(LOSS_NOTICE_TIME, Event::Broken { child, parent });
    }

    /// The child finds its connection to the parent gone, with all that went over it.
    pub(super) fn broken_for_child(&mut self, child: u32, parent: u32) {
        self.forget_child(parent, child);
        let it = &mut self.nodes[child as usize];
        it.connections.remove(&parent);
        let mut lost: Vec<(u32, RequestId)> = Vec::new();
        let mut gone: Vec<(u32, u64)> = Vec::new();
        for (&blob, task) in &it.tasks {
            let to_it =
                |live: &Live| matches!(live, Live::Parent { parent: p, .. } if *p == parent);
            lost.extend(
                task.live
                    .iter()
                    .filter(|(_, live)| to_it(live))
                    .map(|(&request, _)| (blob, request)),
            );
            gone.extend(task.subscriptions.get(&parent).map(|&token| (blob, token)));
        }
        for (blob, request) in lost {
            self.request_failed(child, blob, request, Failure::Unreachable);
        }
        for (blob, token) in gone {
            self.parent_gone(child, parent, blob, token, Gone::Unreachable);
        }
    }
}
