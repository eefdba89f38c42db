//! One task: its members, and for every piece who holds it and who may fetch it.
//!
//! A piece is *covered* while somebody holds it or a lease names it. Only an uncovered piece is ever
//! leased, so the source is asked once for each; the exception, made for one node, is a piece whose
//! holders have all failed that node.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pantala_wire::{BlobDigest, PieceIndex, PieceRun, PieceSet};

use super::nodes::Slot;

/// Stands for "no lease" in the table of pieces.
const NO_LEASE: u32 = 0;
/// Stands for "nobody" in the table of pieces.
const NOBODY: Slot = Slot::MAX;

/// A lease that has been given and has not ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    pub(super) run: PieceRun,
    /// Pieces of the run that are still under this lease.
    pub(super) remaining: u32,
    pub(super) holder: Slot,
    pub(super) expires: Duration,
}

/// A node's part in a task.
#[derive(Default)]
pub(super) struct Member {
    pub(super) wanted: bool,
    pub(super) has_source: bool,
    pub(super) complete: bool,
    /// It announced, after control's start, that it was at work on the task.
    pub(super) announced: bool,
    /// What it holds; empty once it is complete.
    pub(super) held: Option<PieceSet>,
    pub(super) parents: Vec<Slot>,
    pub(super) children: Vec<Slot>,
    /// Parents that failed it, and until when they are not offered again.
    pub(super) excluded: Vec<(Slot, Duration)>,
    pub(super) leases: Vec<u32>,
    /// Its number in the queue of those who wait for a lease.
    pub(super) waiting: Option<u64>,
    /// What it waits for: from its first wanted piece to its last.
    pub(super) waits_for: Option<PieceRun>,
    /// Its number in the queue of those who have too few parents.
    pub(super) short: Option<u64>,
    order_at: usize,
    complete_at: usize,
}

impl Member {
    pub(super) fn holds(&self, piece: u32) -> bool {
        self.complete
            || self
                .held
                .as_ref()
                .is_some_and(|held| held.contains(PieceIndex(piece)))
    }
    pub(super) fn held_count(&self) -> u32 {
        if self.complete {
            u32::MAX
        } else {
            self.held.as_ref().map_or(0, PieceSet::len)
        }
    }
    pub(super) fn excludes(&self, slot: Slot, now: Duration) -> bool {
        self.excluded
            .iter()
            .any(|&(other, until)| other == slot && now < until)
    }
}

#[derive(Clone, Copy)]
struct Piece {
    /// Incomplete members that hold it.
    holders: u32,
    lease: u32,
    /// Who fetched it last: most likely a holder.
    fetcher: Slot,
}

pub(super) struct Task {
    pub(super) digest: BlobDigest,
    pub(super) size_bytes: u64,
    pieces: Vec<Piece>,
    pub(super) members: BTreeMap<Slot, Member>,
    /// All members, and the complete ones, so that a choice among thousands need not walk a tree.
    pub(super) order: Vec<Slot>,
    pub(super) complete: Vec<Slot>,
    pub(super) wanted_count: usize,
    /// Members that download and have a source.
    pub(super) sourcing_count: usize,
    pub(super) announced_count: usize,
    pub(super) leases: BTreeMap<u32, Lease>,
    pub(super) expiries: BTreeSet<(Duration, u32)>,
    next_lease: u32,
    uncovered_count: u32,
    /// Pieces at the start that a node which has not named the size yet may be fetching.
    pub(super) reserved_count: u32,
    /// Members that became children of those that were given them as parents, and are to be told.
    pub(super) linked: Vec<Slot>,
    pub(super) waiting: BTreeMap<u64, Slot>,
    pub(super) short: BTreeMap<u64, Slot>,
    next_ticket: u64,
    /// When the core is to look at the task again; kept by the core.
    pub(super) alarm: Option<Duration>,
    /// Since when nobody downloads it; kept by the core.
    pub(super) idle_since: Option<Duration>,
}

/// The pieces named by `runs`, each at most once: a run that goes back is taken from where the last
/// one ended, so that a hostile list costs no more than an honest one.
pub(super) fn ascending(
    runs: &[PieceRun],
    piece_count: u32,
) -> impl Iterator<Item = std::ops::Range<u32>> + '_ {
    let mut at = 0;
    runs.iter().filter_map(move |run| {
        let range = run.range();
        let range = range.start.max(at)..range.end.min(piece_count);
        if range.is_empty() {
            return None;
        }
        at = range.end;
        Some(range)
    })
}

impl Task {
    pub(super) fn new(digest: BlobDigest, size_bytes: u64, piece_count: u32) -> Self {
        let piece = Piece {
            holders: 0,
            lease: NO_LEASE,
            fetcher: NOBODY,
        };
        Self {
            digest,
            size_bytes,
            pieces: vec![piece; piece_count as usize],
            members: BTreeMap::new(),
            order: Vec::new(),
            complete: Vec::new(),
            wanted_count: 0,
            sourcing_count: 0,
            announced_count: 0,
            leases: BTreeMap::new(),
            expiries: BTreeSet::new(),
            next_lease: NO_LEASE,
            uncovered_count: piece_count,
            reserved_count: 0,
            linked: Vec::new(),
            waiting: BTreeMap::new(),
            short: BTreeMap::new(),
            next_ticket: 0,
            alarm: None,
            idle_since: None,
        }
    }
    pub(super) fn piece_count(&self) -> u32 {
        self.pieces.len() as u32
    }
    /// Pieces that a lease can be given on, to anybody.
    pub(super) fn free_count(&self) -> u32 {
        if self.complete.is_empty() {
            self.uncovered_count
        } else {
            0
        }
    }
    pub(super) fn is_leased(&self, piece: u32) -> bool {
        self.pieces[piece as usize].lease != NO_LEASE
    }
    /// Members that hold `piece`.
    pub(super) fn holder_count(&self, piece: u32) -> usize {
        self.pieces[piece as usize].holders as usize + self.complete.len()
    }
    /// Who fetched `piece` last, if anybody did.
    pub(super) fn fetcher(&self, piece: u32) -> Option<Slot> {
        Some(self.pieces[piece as usize].fetcher).filter(|&slot| slot != NOBODY)
    }
    pub(super) fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// `slot` as a member; added with nothing where it is none.
    pub(super) fn enter(&mut self, slot: Slot) -> &mut Member {
        let Self { members, order, .. } = self;
        members.entry(slot).or_insert_with(|| {
            order.push(slot);
            Member {
                order_at: order.len() - 1,
                ..Member::default()
            }
        })
    }

    /// Says whether the member downloads, and whether it has a source.
    pub(super) fn set_role(&mut self, slot: Slot, wanted: bool, has_source: bool) {
        let Some(member) = self.members.get_mut(&slot) else {
            return;
        };
        let sources = |member: &Member| usize::from(member.wanted && member.has_source);
        self.wanted_count -= usize::from(member.wanted);
        self.sourcing_count -= sources(member);
        member.wanted = wanted;
        member.has_source = has_source;
        self.wanted_count += usize::from(member.wanted);
        self.sourcing_count += sources(member);
        if !wanted {
            self.drop_parents(slot);
            self.stop_waiting(slot);
        }
    }

    pub(super) fn mark_announced(&mut self, slot: Slot) {
        if let Some(member) = self.members.get_mut(&slot)
            && !std::mem::replace(&mut member.announced, true)
        {
            self.announced_count += 1;
        }
    }

    /// The member holds the pieces of `runs`; `fetched`: it read them from the source itself.
    pub(super) fn add_held(&mut self, slot: Slot, runs: &[PieceRun], fetched: bool) {
        let count = self.piece_count();
        let Some(member) = self.members.get_mut(&slot) else {
            return;
        };
        if member.complete {
            return;
        }
        let held = member.held.get_or_insert_with(|| PieceSet::empty(count));
        for piece in ascending(runs, count).flatten() {
            let state = &mut self.pieces[piece as usize];
            if fetched {
                state.fetcher = slot;
            }
            if held.insert(PieceIndex(piece)) {
                if state.holders == 0 && state.lease == NO_LEASE {
                    self.uncovered_count -= 1;
                }
                state.holders += 1;
            }
        }
    }

    /// The member holds the whole blob.
    pub(super) fn set_complete(&mut self, slot: Slot) {
        let Some(member) = self.members.get_mut(&slot) else {
            return;
        };
        if std::mem::replace(&mut member.complete, true) {
            return;
        }
        member.complete_at = self.complete.len();
        self.complete.push(slot);
        self.clear_bits(slot);
    }

    /// The member holds nothing.
    pub(super) fn clear_held(&mut self, slot: Slot) {
        self.clear_bits(slot);
        let Some(member) = self.members.get_mut(&slot) else {
            return;
        };
        if std::mem::replace(&mut member.complete, false) {
            let at = member.complete_at;
            self.complete.swap_remove(at);
            if let Some(moved) = self.complete.get(at)
                && let Some(moved) = self.members.get_mut(moved)
            {
                moved.complete_at = at;
            }
        }
    }

    fn clear_bits(&mut self, slot: Slot) {
        let Some(held) = self.members.get_mut(&slot).and_then(|m| m.held.take()) else {
            return;
        };
        for piece in held.iter() {
            let state = &mut self.pieces[piece.0 as usize];
            state.holders -= 1;
            if state.holders == 0 && state.lease == NO_LEASE {
                self.uncovered_count += 1;
            }
        }
    }

    /// Gives `run` to `holder`. The caller has found every piece of it free of leases.
    pub(super) fn add_lease(&mut self, holder: Slot, run: PieceRun, expires: Duration) {
        loop {
            self.next_lease = self.next_lease.wrapping_add(1);
            if self.next_lease != NO_LEASE && !self.leases.contains_key(&self.next_lease) {
                break;
            }
        }
        let id = self.next_lease;
        for piece in run.range() {
            let state = &mut self.pieces[piece as usize];
            if state.holders == 0 {
                self.uncovered_count -= 1;
            }
            state.lease = id;
        }
        self.leases.insert(
            id,
            Lease {
                run,
                remaining: run.count,
                holder,
                expires,
            },
        );
        self.expiries.insert((expires, id));
        if let Some(member) = self.members.get_mut(&holder) {
            member.leases.push(id);
        }
    }

    /// Takes the pieces of `runs` out of the leases of `holder`.
    pub(super) fn release(&mut self, holder: Slot, runs: &[PieceRun]) {
        for piece in ascending(runs, self.piece_count()).flatten() {
            let id = self.pieces[piece as usize].lease;
            let Some(lease) = self.leases.get_mut(&id) else {
                continue;
            };
            if lease.holder != holder {
                continue;
            }
            lease.remaining -= 1;
            let is_over = lease.remaining == 0;
            self.unlease(piece);
            if is_over {
                self.end_lease(id);
            }
        }
    }

    /// Ends a lease; what it still named is free again.
    pub(super) fn end_lease(&mut self, id: u32) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        self.expiries.remove(&(lease.expires, id));
        for piece in lease.run.range() {
            if self.pieces[piece as usize].lease == id {
                self.unlease(piece);
            }
        }
        if let Some(member) = self.members.get_mut(&lease.holder) {
            member.leases.retain(|&other| other != id);
        }
    }

    fn unlease(&mut self, piece: u32) {
        let state = &mut self.pieces[piece as usize];
        state.lease = NO_LEASE;
        if state.holders == 0 {
            self.uncovered_count += 1;
        }
    }

    /// Progress: all leases of `holder` last until `expires`.
    pub(super) fn renew(&mut self, holder: Slot, expires: Duration) {
        let Some(member) = self.members.get(&holder) else {
            return;
        };
        for &id in &member.leases {
            if let Some(lease) = self.leases.get_mut(&id) {
                self.expiries.remove(&(lease.expires, id));
                lease.expires = expires;
                self.expiries.insert((expires, id));
            }
        }
    }

    pub(super) fn end_leases_of(&mut self, slot: Slot) {
        let ids = self
            .members
            .get(&slot)
            .map_or_else(Vec::new, |member| member.leases.clone());
        for id in ids {
            self.end_lease(id);
        }
    }

    pub(super) fn wait(&mut self, slot: Slot, wanted: &[PieceRun]) {
        let ticket = self.ticket();
        let first = wanted.iter().map(|run| run.first).min();
        let end = wanted.iter().map(|run| run.range().end).max();
        let Some(member) = self.members.get_mut(&slot) else {
            return;
        };
        member.waits_for = first.zip(end).map(|(first, end)| PieceRun {
            first,
            count: end - first,
        });
        if member.waiting.is_none() {
            member.waiting = Some(ticket);
            self.waiting.insert(ticket, slot);
        }
    }
    pub(super) fn stop_waiting(&mut self, slot: Slot) {
        if let Some(ticket) = self.members.get_mut(&slot).and_then(|m| m.waiting.take()) {
            self.waiting.remove(&ticket);
        }
    }

    /// Takes the member out; its children, who have lost a parent.
    pub(super) fn remove(&mut self, slot: Slot) -> Vec<Slot> {
        self.end_leases_of(slot);
        self.clear_held(slot);
        self.set_role(slot, false, false);
        let children = self.drop_children(slot);
        let Some(member) = self.members.remove(&slot) else {
            return children;
        };
        self.announced_count -= usize::from(member.announced);
        self.order.swap_remove(member.order_at);
        if let Some(moved) = self.order.get(member.order_at)
            && let Some(moved) = self.members.get_mut(moved)
        {
            moved.order_at = member.order_at;
        }
        children
    }
}
