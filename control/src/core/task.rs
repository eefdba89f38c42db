//! One task: its members, and for every piece who holds it and who may fetch it.
//!
//! A piece is *covered* while somebody holds it or a lease names it. Only an uncovered piece is ever
//! leased, so the source is asked once for each; the exception, made for one node, is a piece whose
//! holders have all failed that node.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pantala_wire::{BlobDigest, PieceIndex, PieceRun, PieceSet};

use super::hosts::HostId;
use super::member::{Member, MemberId, Members};
use super::nodes::{Nodes, Place, Slot};
use super::progress::Progress;

/// Stands for "no lease" in the table of pieces.
const NO_LEASE: u32 = 0;
/// Stands for "nobody" in the table of pieces.
const NOBODY: MemberId = MemberId::MAX;

/// A lease that has been given and has not ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    pub(super) run: PieceRun,
    /// Pieces of the run that are still under this lease.
    pub(super) remaining: u32,
    pub(super) holder: MemberId,
    pub(super) expires: Duration,
    /// The host that it is fetched from.
    host: Option<HostId>,
}

/// When a member may have a lease before others, and a number that tells turns apart.
pub(super) type Turn = (Duration, u64);

#[derive(Clone, Copy)]
struct Piece {
    /// Incomplete members that hold it.
    holders: u32,
    lease: u32,
    /// Who fetched it last: most likely a holder.
    fetcher: MemberId,
}

pub(super) struct Task {
    pub(super) digest: BlobDigest,
    pub(super) size_bytes: u64,
    /// Makes choices between equals differ from those of other tasks.
    pub(super) salt: u64,
    pieces: Vec<Piece>,
    pub(super) members: Members,
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
    /// Something has come free since the waiting were last told.
    pub(super) has_freed: bool,
    /// Members that became children of those that were given them as parents, and are to be told.
    pub(super) linked: Vec<MemberId>,
    /// Who waits for a lease, in the order of their turns.
    pub(super) waiting: BTreeMap<Turn, MemberId>,
    /// The fastest uplink of a member that has asked for a lease.
    pub(super) fastest_uplink: f64,
    pub(super) short: BTreeMap<u64, MemberId>,
    pub(super) next_ticket: u64,
    pub(super) progress: Progress,
    /// Leases that have ended since the core last looked: on which host, and whether all was fetched.
    pub(super) ended: Vec<(HostId, bool)>,
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
    pub(super) fn new(digest: BlobDigest, size_bytes: u64, piece_count: u32, salt: u64) -> Self {
        let piece = Piece {
            holders: 0,
            lease: NO_LEASE,
            fetcher: NOBODY,
        };
        Self {
            digest,
            size_bytes,
            salt,
            pieces: vec![piece; piece_count as usize],
            members: Members::default(),
            wanted_count: 0,
            sourcing_count: 0,
            announced_count: 0,
            leases: BTreeMap::new(),
            expiries: BTreeSet::new(),
            next_lease: NO_LEASE,
            uncovered_count: piece_count,
            reserved_count: 0,
            has_freed: false,
            linked: Vec::new(),
            waiting: BTreeMap::new(),
            fastest_uplink: 0.0,
            short: BTreeMap::new(),
            next_ticket: 0,
            progress: Progress::default(),
            ended: Vec::new(),
            alarm: None,
            idle_since: None,
        }
    }
    pub(super) fn piece_count(&self) -> u32 {
        self.pieces.len() as u32
    }
    /// Pieces that a lease can be given on, to anybody.
    pub(super) fn free_count(&self) -> u32 {
        if self.members.complete().is_empty() {
            self.uncovered_count
        } else {
            0
        }
    }
    pub(super) fn is_leased(&self, piece: u32) -> bool {
        self.pieces[piece as usize].lease != NO_LEASE
    }
    pub(super) fn is_leased_by(&self, piece: u32, lease: u32) -> bool {
        self.pieces[piece as usize].lease == lease
    }
    /// Members that hold `piece`.
    pub(super) fn holder_count(&self, piece: u32) -> usize {
        self.pieces[piece as usize].holders as usize + self.members.complete().len()
    }
    /// Who fetched `piece` last, if anybody did.
    pub(super) fn fetcher(&self, piece: u32) -> Option<MemberId> {
        Some(self.pieces[piece as usize].fetcher).filter(|&id| id != NOBODY)
    }
    pub(super) fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// A new member, with nothing.
    pub(super) fn enter(&mut self, slot: Slot, place: Place) -> MemberId {
        self.members.add(slot, place)
    }

    /// Says whether the member downloads, and whether it has a source.
    pub(super) fn set_role(
        &mut self,
        nodes: &mut Nodes,
        id: MemberId,
        wanted: bool,
        has_source: bool,
    ) {
        let Some(member) = self.members.get_mut(id) else {
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
            self.drop_parents(nodes, id);
            self.stop_waiting(id);
        }
    }

    pub(super) fn mark_announced(&mut self, id: MemberId) {
        if let Some(member) = self.members.get_mut(id)
            && !std::mem::replace(&mut member.announced, true)
        {
            self.announced_count += 1;
        }
    }

    /// The member holds the pieces of `runs`; `fetched`: it read them from the source itself. How many
    /// it did not hold before.
    pub(super) fn add_held(&mut self, id: MemberId, runs: &[PieceRun], fetched: bool) -> u32 {
        let mut gained = 0;
        let count = self.piece_count();
        let Some(member) = self.members.get_mut(id) else {
            return gained;
        };
        if member.complete {
            return gained;
        }
        let held = member.held.get_or_insert_with(|| PieceSet::empty(count));
        for piece in ascending(runs, count).flatten() {
            let state = &mut self.pieces[piece as usize];
            let is_leased_to_it = self
                .leases
                .get(&state.lease)
                .is_some_and(|lease| lease.holder == id);
            if fetched && (is_leased_to_it || state.fetcher == NOBODY) {
                state.fetcher = id;
            }
            if held.insert(PieceIndex(piece)) {
                if state.holders == 0 && state.lease == NO_LEASE {
                    self.uncovered_count -= 1;
                }
                state.holders += 1;
                gained += 1;
            }
        }
        gained
    }

    /// The member holds the whole blob.
    pub(super) fn set_complete(&mut self, id: MemberId) {
        if self.members.set_complete(id, true) {
            self.clear_bits(id);
        }
    }

    /// The member holds nothing.
    pub(super) fn clear_held(&mut self, id: MemberId) {
        self.clear_bits(id);
        if self.members.set_complete(id, false) {
            self.has_freed = true;
        }
    }

    fn clear_bits(&mut self, id: MemberId) {
        let Some(held) = self.members.get_mut(id).and_then(|m| m.held.take()) else {
            return;
        };
        for piece in held.iter() {
            let state = &mut self.pieces[piece.0 as usize];
            state.holders -= 1;
            if state.holders == 0 && state.lease == NO_LEASE {
                self.uncovered_count += 1;
                self.has_freed = true;
            }
        }
    }

    /// Gives `run` to `holder`. The caller has found every piece of it free of leases.
    pub(super) fn add_lease(&mut self, holder: MemberId, run: PieceRun, expires: Duration) {
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
        let host = self.members.get(holder).and_then(|member| member.host);
        self.leases.insert(
            id,
            Lease {
                run,
                remaining: run.count,
                holder,
                expires,
                host,
            },
        );
        self.expiries.insert((expires, id));
        if let Some(member) = self.members.get_mut(holder) {
            member.leases.push(id);
        }
    }

    /// How many pieces of `runs` are leased to `holder`.
    pub(super) fn leased_count(&self, holder: MemberId, runs: &[PieceRun]) -> u32 {
        let leased = ascending(runs, self.piece_count())
            .flatten()
            .filter(|&piece| {
                let lease = self.leases.get(&self.pieces[piece as usize].lease);
                lease.is_some_and(|lease| lease.holder == holder)
            });
        leased.count() as u32
    }

    /// Takes the pieces of `runs` out of the leases of `holder`; how many were.
    pub(super) fn release(&mut self, holder: MemberId, runs: &[PieceRun]) -> u32 {
        let mut count = 0;
        for piece in ascending(runs, self.piece_count()).flatten() {
            let id = self.pieces[piece as usize].lease;
            let Some(lease) = self.leases.get_mut(&id) else {
                continue;
            };
            if lease.holder != holder {
                continue;
            }
            lease.remaining -= 1;
            count += 1;
            let is_over = lease.remaining == 0;
            self.unlease(piece);
            if is_over {
                self.end_lease(id);
            }
        }
        count
    }

    /// Ends a lease; what it still named is free again.
    pub(super) fn end_lease(&mut self, id: u32) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        self.expiries.remove(&(lease.expires, id));
        if let Some(host) = lease.host {
            self.ended.push((host, lease.remaining == 0));
        }
        for piece in lease.run.range() {
            if self.pieces[piece as usize].lease == id {
                self.unlease(piece);
            }
        }
        if let Some(member) = self.members.get_mut(lease.holder) {
            member.leases.retain(|&other| other != id);
        }
    }

    fn unlease(&mut self, piece: u32) {
        let state = &mut self.pieces[piece as usize];
        state.lease = NO_LEASE;
        if state.holders == 0 {
            self.uncovered_count += 1;
            self.has_freed = true;
        }
    }

    /// When one of the leases of `holder` was given or renewed last.
    pub(super) fn renewed_at(&self, holder: MemberId, ttl: Duration) -> Option<Duration> {
        let member = self.members.get(holder)?;
        let expires = member.leases.iter().filter_map(|id| self.leases.get(id));
        let last = expires.map(|lease| lease.expires).max()?;
        Some(last.saturating_sub(ttl))
    }

    /// Progress: all leases of `holder` last until `expires`.
    pub(super) fn renew(&mut self, holder: MemberId, expires: Duration) {
        let Some(member) = self.members.get(holder) else {
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

    pub(super) fn end_leases_of(&mut self, id: MemberId) {
        let ids = self
            .members
            .get(id)
            .map_or_else(Vec::new, |member| member.leases.clone());
        for id in ids {
            self.end_lease(id);
        }
    }

    pub(super) fn wait(&mut self, id: MemberId, wanted: &[PieceRun], due: Duration) {
        let turn = (due, self.ticket());
        let first = wanted.iter().map(|run| run.first).min();
        let end = wanted.iter().map(|run| run.range().end).max();
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        member.waits_for = first.zip(end).map(|(first, end)| PieceRun {
            first,
            count: end - first,
        });
        if member.waiting.is_none() {
            member.waiting = Some(turn);
            self.waiting.insert(turn, id);
        }
    }
    pub(super) fn stop_waiting(&mut self, id: MemberId) {
        if let Some(turn) = self.members.get_mut(id).and_then(|m| m.waiting.take()) {
            self.waiting.remove(&turn);
        }
    }

    /// Takes the member out; its children, who have lost a parent.
    pub(super) fn remove(&mut self, nodes: &mut Nodes, id: MemberId) -> Vec<MemberId> {
        self.end_leases_of(id);
        self.clear_held(id);
        self.set_role(nodes, id, false, false);
        let children = self.drop_children(nodes, id);
        if let Some(member) = self.members.remove(id) {
            self.announced_count -= usize::from(member.announced);
        }
        children
    }
}
