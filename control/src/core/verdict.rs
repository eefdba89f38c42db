//! Who signed what was not true.
//!
//! A report counts only with the author's own valid signature under the false claim. One report may be
//! a lie about the truth, so two nodes must say the same, unless the author contradicts itself: two
//! signed claims for one piece are proof by themselves.
//!
//! An author that control has never seen cannot be shut out, and a new key costs nothing: then the
//! node that passed the claim on is the suspect.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex};

use super::config::SHUT_OUT_MAX;

/// Suspects remembered at a time; with the oldest goes what was reported about it.
const SUSPECTS_MAX: usize = 1024;
/// False claims remembered, to find contradictions.
const CLAIMS_MAX: usize = 4096;
/// Nodes remembered as having been members, four times the members there can be at once;
/// some 80 bytes each.
const KNOWN_MAX: usize = 512 * 1024;
/// Nodes that must report the same suspect.
const REPORTERS_NEEDED: usize = 2;

/// A set that forgets its oldest entry over its bound.
struct Recent<T> {
    set: BTreeSet<T>,
    order: VecDeque<T>,
    max: usize,
}

impl<T: Copy + Ord> Recent<T> {
    fn new(max: usize) -> Self {
        Self {
            set: BTreeSet::new(),
            order: VecDeque::new(),
            max,
        }
    }
    fn contains(&self, item: &T) -> bool {
        self.set.contains(item)
    }
    /// Adds `item`; what was forgotten for it.
    fn insert(&mut self, item: T) -> Option<T> {
        if !self.set.insert(item) {
            return None;
        }
        self.order.push_back(item);
        if self.order.len() <= self.max {
            return None;
        }
        let oldest = self.order.pop_front();
        if let Some(oldest) = oldest {
            self.set.remove(&oldest);
        }
        oldest
    }
}

type ClaimKey = (NodeId, BlobDigest, u32);

pub(super) struct Verdicts {
    known: Recent<NodeId>,
    shut_out: Recent<NodeId>,
    suspects: Recent<NodeId>,
    reporters: BTreeMap<NodeId, Vec<NodeId>>,
    claims: Recent<ClaimKey>,
    digests: BTreeMap<ClaimKey, [u8; 32]>,
}

impl Verdicts {
    pub(super) fn new() -> Self {
        Self {
            known: Recent::new(KNOWN_MAX),
            shut_out: Recent::new(SHUT_OUT_MAX),
            suspects: Recent::new(SUSPECTS_MAX),
            reporters: BTreeMap::new(),
            claims: Recent::new(CLAIMS_MAX),
            digests: BTreeMap::new(),
        }
    }
    pub(super) fn saw(&mut self, node: NodeId) {
        self.known.insert(node);
    }
    pub(super) fn has_seen(&self, node: &NodeId) -> bool {
        self.known.contains(node)
    }
    pub(super) fn is_shut_out(&self, node: &NodeId) -> bool {
        self.shut_out.contains(node)
    }
    /// All that are shut out, the oldest verdict first.
    pub(super) fn shut_out(&self) -> Vec<NodeId> {
        self.shut_out.order.iter().copied().collect()
    }

    /// Takes a report; the node that is to be shut out because of it.
    pub(super) fn report(
        &mut self,
        reporter: NodeId,
        blob: &BlobDigest,
        piece: PieceIndex,
        claim: &Claim,
        true_digest: &PieceDigest,
        relayer: NodeId,
    ) -> Option<NodeId> {
        if claim.piece_digest == *true_digest || claim.verify(blob, piece).is_err() {
            return None;
        }
        let is_known = self.known.contains(&claim.author);
        let contradicts = is_known && self.contradicts(blob, piece, claim);
        let suspect = if is_known { claim.author } else { relayer };
        if suspect == reporter || self.is_shut_out(&suspect) || !self.known.contains(&suspect) {
            return None;
        }
        if let Some(forgotten) = self.suspects.insert(suspect) {
            self.reporters.remove(&forgotten);
        }
        let reporters = self.reporters.entry(suspect).or_default();
        if !reporters.contains(&reporter) {
            reporters.push(reporter);
        }
        if !contradicts && reporters.len() < REPORTERS_NEEDED {
            return None;
        }
        self.reporters.remove(&suspect);
        self.shut_out.insert(suspect);
        Some(suspect)
    }

    /// Whether the author has signed something else for the same piece before.
    fn contradicts(&mut self, blob: &BlobDigest, piece: PieceIndex, claim: &Claim) -> bool {
        let key = (claim.author, *blob, piece.0);
        if let Some(before) = self.digests.get(&key) {
            return *before != claim.piece_digest.0;
        }
        if let Some(forgotten) = self.claims.insert(key) {
            self.digests.remove(&forgotten);
        }
        self.digests.insert(key, claim.piece_digest.0);
        false
    }
}
