//! Decides who fetches what from whom, and what from the source.
//!
//! [`Core`] is a state machine: whoever drives it passes in the time and what happened, and sends out
//! what it answers. It does no I/O, reads no clock and draws no random numbers, so one sequence of
//! calls always gives the same answers. The driver calls [`Core::joined`] before a node's messages and
//! [`Core::left`] after them, and [`Core::tick`] no later than [`Core::next_timeout`].
//!
//! All that it knows is soft: after a restart it is empty, and the nodes' announcements fill it again.
//! Every table is bounded by [`CoreConfig`]; what is over a bound is refused, and the node goes on
//! alone.

mod book;
pub mod config;
mod events;
mod hosts;
mod lease;
mod member;
pub mod message;
mod nodes;
mod opening;
mod parents;
mod paths;
mod progress;
mod source;
mod standing;
mod task;
mod tasks;
mod verdict;

use std::collections::BTreeSet;
use std::time::Duration;

use pantala_wire::NodeId;

pub use config::CoreConfig;
pub use hosts::HostStatus;
pub use message::{FromNode, NodeInfo, PathReport, RefusedReason, TaskReport, ToNode};
pub use progress::TaskEstimate;

use config::{ACCUSATIONS_PER_MINUTE_MAX, ANNOUNCEMENTS_PER_MINUTE_MAX};
use hosts::Hosts;
use nodes::Nodes;
use opening::Openings;
use tasks::{TaskId, Tasks};
use verdict::Verdicts;

/// What the core knows, in numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CoreStatus {
    /// Nodes with a session, or within the grace for coming back.
    pub nodes: usize,
    /// Tasks.
    pub tasks: usize,
    /// Memberships of nodes in tasks.
    pub memberships: usize,
    /// Leases that have not ended.
    pub leases: usize,
    /// Leases given since the start.
    pub leases_granted: u64,
    /// Leases that ended because their time was over.
    pub leases_expired: u64,
    /// Leases that were cut since the start because others would have been faster.
    pub leases_cut: u64,
    /// How often a parent was found unfit since the start: too slow, or failing.
    pub demotions: u64,
    /// Reports of paths since the start that could not be true.
    pub absurd_reports: u64,
    /// Pieces that nodes said to have fetched under a lease that they did not have, since the start.
    pub forged_fetches: u64,
    /// Messages since the start that named pieces which their blob does not have.
    pub impossible_runs: u64,
    /// Announcements and accusations since the start that were too many.
    pub refused_floods: u64,
    /// What each registry host is allowed.
    pub hosts: Vec<HostStatus>,
    /// How the tasks come along that most nodes wait for.
    pub estimates: Vec<TaskEstimate>,
    /// Nodes that are shut out.
    pub shut_out: Vec<NodeId>,
}

/// The answers of one call, with the nodes that they go to.
type Out = Vec<(NodeId, ToNode)>;

/// Cluster state and the decisions on it.
pub struct Core {
    config: CoreConfig,
    started: Duration,
    /// When the core was last told the time.
    now: Duration,
    /// A node has come that had a session before this core existed: others may yet come too.
    is_successor: bool,
    nodes: Nodes,
    tasks: Tasks,
    openings: Openings,
    alarms: BTreeSet<(Duration, TaskId)>,
    idle: BTreeSet<(Duration, TaskId)>,
    memberships: usize,
    pieces: u64,
    /// Bits of holdings, counted as if every incomplete member had its bitmap.
    holding_bits: u64,
    leases_granted: u64,
    leases_expired: u64,
    leases_cut: u64,
    demotions: u64,
    absurd_reports: u64,
    forged_fetches: u64,
    impossible_runs: u64,
    refused_floods: u64,
    hosts: Hosts,
    verdicts: Verdicts,
}

impl Core {
    /// A core that starts at `now` and knows nothing.
    pub fn new(config: CoreConfig, now: Duration) -> Self {
        Self {
            config,
            started: now,
            now,
            is_successor: false,
            nodes: Nodes::default(),
            tasks: Tasks::default(),
            openings: Openings::default(),
            alarms: BTreeSet::new(),
            idle: BTreeSet::new(),
            memberships: 0,
            pieces: 0,
            holding_bits: 0,
            leases_granted: 0,
            leases_expired: 0,
            leases_cut: 0,
            demotions: 0,
            absurd_reports: 0,
            forged_fetches: 0,
            impossible_runs: 0,
            refused_floods: 0,
            hosts: Hosts::default(),
            verdicts: Verdicts::new(),
        }
    }

    /// `node` has a session now; false where there is no room for it, or it is shut out.
    ///
    /// A new process keeps nothing of what its predecessor of the same name had. One that comes back
    /// keeps it until its announcement, which replaces it, is over.
    pub fn joined(&mut self, now: Duration, node: NodeId, info: NodeInfo, out: &mut Out) -> bool {
        self.now = now;
        if self.verdicts.is_shut_out(&node) {
            out.push((node, ToNode::ShutOut(self.verdicts.shut_out())));
            return false;
        }
        // A node that this core has seen before comes back to it, not from before it.
        self.is_successor |= info.resumed && !self.verdicts.has_seen(&node);
        let before = self.nodes.slot(node);
        if let Some(slot) = before.filter(|_| !info.resumed) {
            self.depart(now, slot, out);
        }
        let slot = match self.nodes.slot(node) {
            Some(slot) => slot,
            None if self.nodes.len() >= self.config.nodes_max => return false,
            None => self.nodes.add(node, &info),
        };
        self.nodes.renew(slot, &info);
        self.verdicts.saw(node);
        let shut_out = self.verdicts.shut_out();
        if !shut_out.is_empty() {
            out.push((node, ToNode::ShutOut(shut_out)));
        }
        true
    }

    /// `node` has no session any more. What it has is freed once the grace for coming back is over.
    pub fn left(&mut self, now: Duration, node: NodeId) {
        if let Some(slot) = self.nodes.slot(node) {
            let until = now + self.config.reconnect_grace;
            self.nodes.set_away(slot, Some(until));
        }
    }

    /// Takes a message of `node`, which must have joined; else it is ignored.
    pub fn handle(&mut self, now: Duration, node: NodeId, message: FromNode, out: &mut Out) {
        self.now = now;
        let Some(slot) = self.nodes.slot(node) else {
            self.turn_away(node, &message, out);
            return;
        };
        match message {
            FromNode::OpenTask {
                digest,
                size_bytes,
                has_source,
                held,
                complete,
            } => {
                let report = TaskReport {
                    digest,
                    size_bytes,
                    has_source,
                    wanted: !complete,
                    complete,
                    held,
                    fetching: Vec::new(),
                };
                self.report(now, slot, node, &report, false, out);
            }
            FromNode::AskOpening { digest } => self.ask_opening(now, slot, node, digest, out),
            FromNode::ReturnOpening { digest } => self.return_opening(now, slot, digest, out),
            FromNode::CloseTask { digest } => self.close(now, slot, digest, out),
            FromNode::AskLease {
                digest,
                wanted,
                urgent,
            } => self.ask(now, slot, node, digest, &wanted, urgent, out),
            FromNode::ReturnLease { digest, pieces } => {
                let Some((id, member)) = self.part(slot, &digest) else {
                    return;
                };
                if let Some(task) = self.tasks.get_mut(id) {
                    task.release(member, &pieces);
                }
                self.settle(now, id, out);
            }
            FromNode::Fetched { digest, pieces } => {
                self.fetched(now, slot, digest, &pieces, out);
            }
            FromNode::Holding {
                digest,
                runs,
                complete,
            } => self.holding(now, slot, digest, &runs, complete, out),
            FromNode::SourceHost { digest, host } => self.source_host(now, slot, digest, &host),
            FromNode::SourceLimited { host, retry_after } => {
                self.source_limited(now, slot, &host, retry_after);
            }
            FromNode::Dropped { digest } => self.dropped(now, slot, digest, out),
            FromNode::ParentFailed {
                digest,
                node: failed,
            } => {
                self.parent_failed(now, slot, digest, failed, out);
            }
            FromNode::FalseClaim {
                digest,
                piece,
                claim,
                true_digest,
                relayer,
            } => {
                let may_accuse = self
                    .nodes
                    .get_mut(slot)
                    .is_some_and(|node| node.accusations.take(now, ACCUSATIONS_PER_MINUTE_MAX));
                if !may_accuse {
                    self.refused_floods += 1;
                    return;
                }
                let guilty =
                    self.verdicts
                        .report(node, &digest, piece, &claim, &true_digest, relayer);
                if let Some(guilty) = guilty {
                    self.shut_out(now, guilty, out);
                }
            }
            FromNode::Paths { reports } => self.measured(now, slot, &reports, out),
            FromNode::Announce { holdings, last } => {
                for report in &holdings {
                    let may_announce = self.nodes.get_mut(slot).is_some_and(|node| {
                        node.announcements.take(now, ANNOUNCEMENTS_PER_MINUTE_MAX)
                    });
                    if !may_announce {
                        self.refused_floods += 1;
                        let (digest, reason) = (report.digest, RefusedReason::Full);
                        out.push((node, ToNode::Refused { digest, reason }));
                        continue;
                    }
                    self.report(now, slot, node, report, true, out);
                }
                if last {
                    self.forget_unconfirmed(now, slot, out);
                }
            }
        }
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, now: Duration, out: &mut Out) {
        self.now = now;
        while let Some((until, slot)) = self.nodes.next_departure()
            && until <= now
        {
            self.depart(now, slot, out);
        }
        self.end_overdue_openings(now, out);
        while let Some(&(at, id)) = self.alarms.first()
            && at <= now
        {
            if let Some(task) = self.tasks.get_mut(id) {
                self.leases_expired += task.expire(now) as u64;
            }
            self.settle(now, id, out);
        }
    }

    /// When [`Core::tick`] is to be called next, if nothing happens before.
    pub fn next_timeout(&self) -> Option<Duration> {
        let departure = self.nodes.next_departure().map(|(until, _)| until);
        let alarm = self.alarms.first().map(|&(at, _)| at);
        let opening = self.openings.next_end();
        departure.into_iter().chain(alarm).chain(opening).min()
    }

    /// What the core knows, in numbers.
    pub fn status(&self) -> CoreStatus {
        let now = self.now;
        CoreStatus {
            nodes: self.nodes.len(),
            tasks: self.tasks.len(),
            memberships: self.memberships,
            leases: self.tasks.all().map(|task| task.leases.len()).sum(),
            leases_granted: self.leases_granted,
            leases_expired: self.leases_expired,
            leases_cut: self.leases_cut,
            demotions: self.demotions,
            absurd_reports: self.absurd_reports,
            forged_fetches: self.forged_fetches,
            impossible_runs: self.impossible_runs,
            refused_floods: self.refused_floods,
            hosts: self.hosts.status(now),
            estimates: self.estimates(now),
            shut_out: self.verdicts.shut_out(),
        }
    }
}
