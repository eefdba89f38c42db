//! What must hold at every step, checked from what is said and done, not from what the cores think.
//!
//! The referee keeps its own book of leases out of the messages that pass. That the book and the core
//! agree is what is tested; a mutation makes the core's answers, or a node's care, deliberately wrong,
//! to show that the checks would find it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use pantala_control::core::config::{LEASE_RUN_MAX, PARENTS_MAX};
use pantala_control::core::{CoreConfig, FromNode, ToNode};
use pantala_swarm::Blame;
use pantala_wire::{BlobDigest, NodeId, PieceRun};

use crate::scenario::{Habit, Scenario};

/// A rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {text}")]
pub struct Violation {
    /// Which.
    pub rule: &'static str,
    /// How.
    pub text: String,
}

impl Violation {
    pub(crate) fn new(rule: &'static str, text: impl Into<String>) -> Self {
        Self {
            rule,
            text: text.into(),
        }
    }
}

/// Something made wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mutation {
    /// Nothing.
    #[default]
    None,
    /// Control leases out what another node has a lease on.
    LeaseTwice,
    /// Control forgets that progress renews leases, and ends them early.
    LeaseUnrenewed,
    /// Nodes offer pieces before they hold them, and promise to send them.
    PromiseUnheld,
    /// Nodes accept what does not match its digests.
    SkipVerify,
}

impl Mutation {
    /// All but none, with the rule that must catch each.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::LeaseTwice, "leases"),
        (Self::LeaseUnrenewed, "leases"),
        (Self::PromiseUnheld, "acyclic"),
        (Self::SkipVerify, "verified"),
    ];
}

#[derive(Debug, Clone, Copy)]
struct Held {
    node: u32,
    ends: Duration,
}

/// Looks on.
#[derive(Debug)]
pub struct Referee {
    config: CoreConfig,
    mutation: Mutation,
    /// Leases by blob and piece.
    leases: HashMap<(u32, u32), Held>,
    /// The same by node and blob.
    by_node: BTreeMap<u32, BTreeMap<u32, BTreeSet<u32>>>,
    /// Nodes without a session, and until when control keeps their leases.
    away: BTreeMap<u32, Duration>,
    shut_out: BTreeSet<NodeId>,
    dead: BTreeSet<u32>,
    piece_counts: Vec<u32>,
}

impl Referee {
    pub(crate) fn new(scenario: &Scenario, config: CoreConfig, mutation: Mutation) -> Self {
        let count = |&bytes: &u64| {
            pantala_wire::PieceLayout::new(bytes).map_or(0, |layout| layout.piece_count())
        };
        Self {
            config,
            mutation,
            leases: HashMap::new(),
            by_node: BTreeMap::new(),
            away: BTreeMap::new(),
            shut_out: BTreeSet::new(),
            dead: BTreeSet::new(),
            piece_counts: scenario.blobs.iter().map(count).collect(),
        }
    }

    pub(crate) fn died(&mut self, node: u32) {
        self.dead.insert(node);
    }
    pub(crate) fn is_dead(&self, node: u32) -> bool {
        self.dead.contains(&node)
    }

    /// A new process keeps nothing of its predecessor's.
    pub(crate) fn joined(&mut self, node: u32, resumed: bool) {
        self.away.remove(&node);
        if !resumed {
            self.end_all(node);
        }
    }
    pub(crate) fn left(&mut self, node: u32, grace_ends: Duration) {
        self.away.insert(node, grace_ends);
    }
    /// What it knew is gone; nodes name what they fetch when they come back.
    pub(crate) fn control_restarted(&mut self) {
        self.leases.clear();
        self.by_node.clear();
        self.away.clear();
    }

    fn end(&mut self, node: u32, blob: u32, piece: u32) {
        if self
            .leases
            .get(&(blob, piece))
            .is_some_and(|l| l.node == node)
        {
            self.leases.remove(&(blob, piece));
        }
        if let Some(pieces) = self.by_node.get_mut(&node).and_then(|b| b.get_mut(&blob)) {
            pieces.remove(&piece);
        }
    }
    fn end_task(&mut self, node: u32, blob: u32) {
        let pieces = self.by_node.get_mut(&node).and_then(|b| b.remove(&blob));
        for piece in pieces.into_iter().flatten() {
            self.end(node, blob, piece);
        }
    }
    fn end_all(&mut self, node: u32) {
        let blobs: Vec<u32> = self
            .by_node
            .get(&node)
            .map_or_else(Vec::new, |blobs| blobs.keys().copied().collect());
        for blob in blobs {
            self.end_task(node, blob);
        }
    }

    /// A message comes to control: it may end leases, or lengthen them.
    pub(crate) fn hears(
        &mut self,
        now: Duration,
        node: u32,
        message: &FromNode,
        blobs: &HashMap<BlobDigest, u32>,
    ) {
        let of = |digest: &BlobDigest| blobs.get(digest).copied();
        match message {
            FromNode::Fetched { digest, pieces } => {
                let Some(blob) = of(digest) else { return };
                for piece in pieces.iter().flat_map(PieceRun::range) {
                    self.end(node, blob, piece);
                }
                let rest = self.by_node.get(&node).and_then(|b| b.get(&blob));
                for piece in rest.cloned().into_iter().flatten() {
                    if let Some(lease) = self.leases.get_mut(&(blob, piece))
                        && lease.node == node
                        && lease.ends > now
                    {
                        lease.ends = now + self.config.lease_ttl;
                    }
                }
            }
            FromNode::ReturnLease { digest, pieces } => {
                let Some(blob) = of(digest) else { return };
                for piece in pieces.iter().flat_map(PieceRun::range) {
                    self.end(node, blob, piece);
                }
            }
            FromNode::CloseTask { digest }
            | FromNode::OpenTask {
                digest,
                complete: true,
                ..
            }
            | FromNode::Holding {
                digest,
                complete: true,
                ..
            } => {
                if let Some(blob) = of(digest) {
                    self.end_task(node, blob);
                }
            }
            FromNode::Announce { holdings, last } => {
                if *last {
                    self.end_all(node);
                }
                for blob in holdings.iter().filter_map(|h| of(&h.digest)) {
                    self.end_task(node, blob);
                }
            }
            _ => {}
        }
    }

    /// What control says, as the mutation has it.
    pub(crate) fn bent_answer(
        &mut self,
        now: Duration,
        node: u32,
        message: ToNode,
        blobs: &HashMap<BlobDigest, u32>,
    ) -> ToNode {
        let ToNode::LeaseWait { digest, .. } = message else {
            return message;
        };
        let is_wanted = |lease: &Held| match self.mutation {
            Mutation::LeaseTwice => lease.ends > now,
            // As if the lease had not been renewed since it was given.
            Mutation::LeaseUnrenewed => {
                lease.ends > now && lease.ends < now + self.config.lease_ttl.mul_f64(0.995)
            }
            _ => false,
        };
        let blob = blobs.get(&digest).copied().unwrap_or(u32::MAX);
        let victim = (0..self.piece_counts.get(blob as usize).copied().unwrap_or(0)).find(|&p| {
            let lease = self.leases.get(&(blob, p));
            lease.is_some_and(|lease| lease.node != node && is_wanted(lease))
        });
        match victim {
            Some(first) => ToNode::Lease {
                digest,
                pieces: PieceRun { first, count: 1 },
                expires_in: self.config.lease_ttl,
            },
            None => message,
        }
    }

    /// What a node offers, as the mutation has it.
    pub(crate) fn bent_have(&self, runs: Rc<[PieceRun]>) -> Rc<[PieceRun]> {
        if self.mutation != Mutation::PromiseUnheld {
            return runs;
        }
        let longer = runs.iter().map(|run| PieceRun {
            first: run.first,
            count: run.count + 1,
        });
        longer.collect()
    }

    /// Whether a node believes that it holds a piece, as the mutation has it.
    pub(crate) fn bent_holds(&self, is_held: bool) -> bool {
        is_held || self.mutation == Mutation::PromiseUnheld
    }
    /// Whether a node sees that bytes are wrong, as the mutation has it.
    pub(crate) fn bent_verify(&self) -> bool {
        self.mutation != Mutation::SkipVerify
    }

    /// A node begins to send a piece, or promises to. Who sends only what it holds whole makes no
    /// circle: everybody's copy is older than the copies made of it.
    ///
    /// # Errors
    /// It does not hold the piece.
    pub(crate) fn promised(
        &self,
        parent: u32,
        child: u32,
        piece: u32,
        is_held: bool,
    ) -> Result<(), Violation> {
        if is_held {
            return Ok(());
        }
        let text =
            format!("node {parent} promises piece {piece} to node {child} without having it");
        Err(Violation::new("acyclic", text))
    }

    /// What control says must keep the rules.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(crate) fn checks(
        &mut self,
        now: Duration,
        node: u32,
        message: &ToNode,
        blobs: &HashMap<BlobDigest, u32>,
        ids: &HashMap<NodeId, u32>,
    ) -> Result<(), Violation> {
        match message {
            ToNode::Lease {
                digest,
                pieces,
                expires_in,
            } => {
                let Some(&blob) = blobs.get(digest) else {
                    return Err(Violation::new(
                        "leases",
                        "a lease on a blob that there is not",
                    ));
                };
                let count = self.piece_counts[blob as usize];
                if pieces.count == 0 || pieces.count > LEASE_RUN_MAX || pieces.range().end > count {
                    let text = format!("a lease on {pieces:?} of {count} pieces");
                    return Err(Violation::new("bounds", text));
                }
                for piece in pieces.range() {
                    self.lease_given(now, node, blob, piece, *expires_in)?;
                }
                Ok(())
            }
            ToNode::Parents { peers, .. } => {
                let distinct: BTreeSet<NodeId> = peers.iter().map(|peer| peer.node).collect();
                let wrong = if peers.len() > PARENTS_MAX {
                    "too many parents"
                } else if distinct.len() != peers.len() {
                    "a parent twice"
                } else if distinct.iter().any(|id| ids.get(id) == Some(&node)) {
                    "its own parent"
                } else if !distinct.is_disjoint(&self.shut_out) {
                    "a parent that is shut out"
                } else {
                    return Ok(());
                };
                Err(Violation::new(
                    "bounds",
                    format!("node {node} is told of {wrong}"),
                ))
            }
            ToNode::ShutOut(list) => {
                self.shut_out.extend(list.iter().copied());
                for id in list {
                    if let Some(&out) = ids.get(id) {
                        self.end_all(out);
                    }
                }
                Ok(())
            }
            ToNode::LeaseCut { digest, pieces } => {
                let Some(&blob) = blobs.get(digest) else {
                    return Ok(());
                };
                for piece in pieces.range() {
                    if self
                        .leases
                        .get(&(blob, piece))
                        .is_none_or(|l| l.node != node)
                    {
                        let text = format!(
                            "piece {piece} of blob {blob} is taken from node {node}, which has no lease on it"
                        );
                        return Err(Violation::new("leases", text));
                    }
                    self.end(node, blob, piece);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn lease_given(
        &mut self,
        now: Duration,
        node: u32,
        blob: u32,
        piece: u32,
        expires_in: Duration,
    ) -> Result<(), Violation> {
        if let Some(lease) = self.leases.get(&(blob, piece)) {
            let is_free = self.away.get(&lease.node).is_some_and(|&ends| ends <= now);
            if lease.ends > now && !is_free {
                let (other, left) = (lease.node, lease.ends - now);
                let text = format!(
                    "piece {piece} of blob {blob} is leased to node {node} while node {other} has it for {left:?} more"
                );
                return Err(Violation::new("leases", text));
            }
        }
        let ends = now + expires_in;
        self.leases.insert((blob, piece), Held { node, ends });
        let blobs = self.by_node.entry(node).or_default();
        blobs.entry(blob).or_default().insert(piece);
        Ok(())
    }

    /// Somebody was shut out by a node.
    ///
    /// # Errors
    /// Where that was not deserved.
    pub(crate) fn blamed(&self, habit: Habit, why: Blame) -> Result<(), Violation> {
        let deserved = match why {
            Blame::WrongBytes => matches!(habit, Habit::WrongBytes),
            Blame::FalseClaim(_) => matches!(habit, Habit::Forges),
        };
        if deserved {
            return Ok(());
        }
        let text = format!("a node that is {habit:?} is blamed for {why:?}");
        Err(Violation::new("blame", text))
    }
}
