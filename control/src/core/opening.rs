//! Who may ask the source for the first bytes of a blob whose size nobody has named yet.
//!
//! A node that is asked for a blob it knows nothing of could learn its size by a request that brings no
//! bytes, and only then lease pieces: two round trips to the source before the first byte. With an
//! opening it sends one request, whose answer tells the size and brings the bytes. While it lasts, no
//! other node is leased a piece of that beginning; the task's opening by its holder makes it a lease.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use pantala_wire::{BlobDigest, NodeId, PieceLayout, PieceRun};

use super::config::{OPENING_BYTES, OPENINGS_MAX, OPENINGS_PER_NODE_MAX};
use super::message::ToNode;
use super::nodes::Slot;
use super::task::Task;
use super::{Core, Out};

/// Pieces that an opening covers, once the size is known.
pub(super) fn opening_pieces(layout: &PieceLayout) -> u32 {
    ((OPENING_BYTES / layout.piece_size()) as u32)
        .max(1)
        .min(layout.piece_count())
}

struct Opening {
    holder: Slot,
    ends: Duration,
}

/// The openings that have not ended.
#[derive(Default)]
pub(super) struct Openings {
    by_digest: HashMap<BlobDigest, Opening>,
    ends: BTreeSet<(Duration, BlobDigest)>,
    by_holder: BTreeMap<Slot, BTreeSet<BlobDigest>>,
}

impl Openings {
    pub(super) fn is_open(&self, digest: &BlobDigest) -> bool {
        self.by_digest.contains_key(digest)
    }
    pub(super) fn next_end(&self) -> Option<Duration> {
        self.ends.first().map(|&(at, _)| at)
    }

    fn has_room_for(&self, holder: Slot) -> bool {
        let own_count = self.by_holder.get(&holder).map_or(0, BTreeSet::len);
        self.by_digest.len() < OPENINGS_MAX && own_count < OPENINGS_PER_NODE_MAX
    }

    fn add(&mut self, digest: BlobDigest, holder: Slot, ends: Duration) {
        self.by_digest.insert(digest, Opening { holder, ends });
        self.ends.insert((ends, digest));
        self.by_holder.entry(holder).or_default().insert(digest);
    }

    fn remove(&mut self, digest: &BlobDigest) -> bool {
        let Some(opening) = self.by_digest.remove(digest) else {
            return false;
        };
        self.ends.remove(&(opening.ends, *digest));
        if let Some(own) = self.by_holder.get_mut(&opening.holder) {
            own.remove(digest);
            if own.is_empty() {
                self.by_holder.remove(&opening.holder);
            }
        }
        true
    }

    fn is_held_by(&self, digest: &BlobDigest, slot: Slot) -> bool {
        self.by_digest
            .get(digest)
            .is_some_and(|opening| opening.holder == slot)
    }
}

impl Task {
    /// The pieces that its opening covers.
    pub(super) fn opening_run(&self) -> PieceRun {
        let count = PieceLayout::new(self.size_bytes).map_or(0, |layout| opening_pieces(&layout));
        PieceRun { first: 0, count }
    }

    /// The opening has ended: its pieces can be leased, unless its holder is given them first.
    fn end_reservation(&mut self) {
        self.reserved_count = 0;
    }
}

impl Core {
    pub(super) fn ask_opening(
        &mut self,
        now: Duration,
        slot: Slot,
        node: NodeId,
        digest: BlobDigest,
        out: &mut Out,
    ) {
        // Others may hold what they have not announced yet, as with leases.
        let is_settled = !self.is_successor || now >= self.started + self.config.start_grace;
        let granted = is_settled
            && !self.tasks.contains_key(&digest)
            && !self.openings.is_open(&digest)
            && self.openings.has_room_for(slot);
        if granted {
            let ends = now + self.config.opening_ttl;
            self.openings.add(digest, slot, ends);
        }
        out.push((node, ToNode::Opening { digest, granted }));
    }

    pub(super) fn return_opening(
        &mut self,
        now: Duration,
        slot: Slot,
        digest: BlobDigest,
        out: &mut Out,
    ) {
        if self.take_opening(slot, &digest) {
            self.settle(now, digest, out);
        }
    }

    /// Ends the node's opening of this blob; true if it had one.
    pub(super) fn take_opening(&mut self, slot: Slot, digest: &BlobDigest) -> bool {
        let is_own = self.openings.is_held_by(digest, slot);
        if is_own {
            self.end_opening(digest);
        }
        is_own
    }

    fn end_opening(&mut self, digest: &BlobDigest) {
        if self.openings.remove(digest)
            && let Some(task) = self.tasks.get_mut(digest)
        {
            task.end_reservation();
        }
    }

    pub(super) fn end_overdue_openings(&mut self, now: Duration, out: &mut Out) {
        while let Some(&(ends, digest)) = self.openings.ends.first()
            && ends <= now
        {
            self.end_opening(&digest);
            self.settle(now, digest, out);
        }
    }

    pub(super) fn end_openings_of(&mut self, now: Duration, slot: Slot, out: &mut Out) {
        let own = self.openings.by_holder.get(&slot).cloned();
        for digest in own.into_iter().flatten() {
            self.end_opening(&digest);
            self.settle(now, digest, out);
        }
    }
}
