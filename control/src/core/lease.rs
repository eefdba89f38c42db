//! Who may fetch which piece from the source.

use std::time::Duration;

use pantala_wire::{PieceIndex, PieceRun};

use super::config::{
    LEASE_RUN_MAX, LEASED_PIECES_TARGET, LEASES_PER_MEMBER_MAX, LEASES_PER_TASK_MAX, TURN_LAG,
    TURN_LAG_MAX,
};
use super::hosts::HostId;
use super::member::{Member, MemberId};
use super::nodes::Slot;
use super::task::{Task, ascending};

impl Task {
    /// Whether a lease on `piece` may go to `member`: nobody has one nor an opening, the member lacks the
    /// piece, and nobody holds it that the member could get it from.
    fn is_leasable(&self, member: &Member, piece: u32, now: Duration) -> bool {
        if self.is_leased(piece) || member.holds(piece) || piece < self.reserved_count {
            return false;
        }
        let holder_count = self.holder_count(piece);
        if holder_count == 0 {
            return true;
        }
        let failed_count = member
            .excluded
            .iter()
            .filter(|&&(id, slot, until)| {
                let failed = self.members.get(id).filter(|m| m.slot == slot);
                now < until && failed.is_some_and(|m| m.holds(piece))
            })
            .count();
        failed_count == holder_count
    }

    /// How many pieces a lease is given on: half of a fair share, so that the last leases end
    /// together and nobody waits long for a slow one, and few where many fetch at once.
    fn run_length(&self) -> u32 {
        let sourcing_count = self.sourcing_count.max(1);
        let share = self.free_count() as usize / (2 * sourcing_count);
        let at_once = LEASED_PIECES_TARGET / sourcing_count.min(LEASES_PER_TASK_MAX) as u32;
        at_once.min(share as u32).clamp(1, LEASE_RUN_MAX)
    }

    /// When it is the turn of a member with such an uplink that asks at `now`. What it fetches, all
    /// others wait for: those that pass it on faster go before, for a while.
    pub(super) fn turn_of(&mut self, id: MemberId, uplink: f64, now: Duration) -> Duration {
        self.fastest_uplink = self.fastest_uplink.max(uplink);
        let halvings = (self.fastest_uplink / uplink.max(1.0)).log2().max(0.0);
        let lag = TURN_LAG.mul_f64(halvings).min(TURN_LAG_MAX);
        let waiting = self.members.get(id).and_then(|member| member.waiting);
        waiting.map_or(now + lag, |(due, _)| due)
    }

    /// Few fetch from the source, and nobody waits.
    pub(super) fn is_calm(&self) -> bool {
        self.waiting.is_empty() && self.leases.len() < LEASES_PER_TASK_MAX / 2
    }

    /// Leases pieces out of `wanted` to `slot`, from `urgent` on where that can be.
    pub(super) fn grant(
        &mut self,
        id: MemberId,
        wanted: &[PieceRun],
        urgent: Option<PieceIndex>,
        now: Duration,
        ttl: Duration,
    ) -> Option<PieceRun> {
        let member = self.members.get(id)?;
        let may_have_more = member.wanted
            && member.has_source
            && member.leases.len() < LEASES_PER_MEMBER_MAX
            && self.leases.len() < LEASES_PER_TASK_MAX
            && (self.free_count() > 0 || !member.excluded.is_empty());
        if !may_have_more {
            return None;
        }
        let urgent = urgent.map_or(0, |piece| piece.0);
        let run = self
            .first_leasable(member, wanted, urgent..u32::MAX, now)
            .or_else(|| self.first_leasable(member, wanted, 0..urgent, now))?;
        self.add_lease(id, run, now + ttl);
        self.stop_waiting(id);
        Some(run)
    }

    /// The first run of leasable pieces of `wanted` that starts within `bounds`.
    fn first_leasable(
        &self,
        member: &Member,
        wanted: &[PieceRun],
        bounds: std::ops::Range<u32>,
        now: Duration,
    ) -> Option<PieceRun> {
        let length = self.run_length();
        for range in ascending(wanted, self.piece_count()) {
            let end = range.end;
            let mut inside = range.start.max(bounds.start)..end.min(bounds.end);
            if let Some(first) = inside.find(|&piece| self.is_leasable(member, piece, now)) {
                let count = (first..end.min(first.saturating_add(length)))
                    .take_while(|&piece| self.is_leasable(member, piece, now))
                    .count() as u32;
                return Some(PieceRun { first, count });
            }
        }
        None
    }

    /// Gives a node the leases back that it worked on when control lost its memory, as far as nobody
    /// else has or holds the pieces.
    pub(super) fn regrant(
        &mut self,
        id: MemberId,
        fetching: &[PieceRun],
        now: Duration,
        ttl: Duration,
    ) -> Vec<PieceRun> {
        let mut given = Vec::new();
        let mut at = 0;
        loop {
            let Some(member) = self.members.get(id) else {
                return given;
            };
            if member.leases.len() >= LEASES_PER_MEMBER_MAX {
                return given;
            }
            let next = ascending(fetching, self.piece_count()).find_map(|range| {
                let end = range.end;
                let first = (range.start.max(at)..end)
                    .find(|&piece| self.is_leasable(member, piece, now))?;
                let count = (first..end.min(first + LEASE_RUN_MAX))
                    .take_while(|&piece| self.is_leasable(member, piece, now))
                    .count() as u32;
                Some(PieceRun { first, count })
            });
            let Some(run) = next else { return given };
            at = run.first + run.count;
            self.add_lease(id, run, now + ttl);
            given.push(run);
        }
    }

    /// Ends the leases that are over at `now`.
    pub(super) fn expire(&mut self, now: Duration) -> usize {
        let mut count = 0;
        while let Some(&(expires, id)) = self.expiries.first()
            && expires <= now
        {
            self.end_lease(id);
            count += 1;
        }
        count
    }

    /// The waiting members to tell that something has come free, at most `max` of them.
    pub(super) fn wake(&mut self, max: usize) -> Vec<MemberId> {
        if !std::mem::take(&mut self.has_freed) {
            return Vec::new();
        }
        self.wake_some(max.min(self.free_count() as usize))
    }

    /// The same, whether or not something is free.
    pub(super) fn wake_some(&mut self, count: usize) -> Vec<MemberId> {
        let woken: Vec<MemberId> = self.waiting.values().copied().take(count).collect();
        for &id in &woken {
            self.stop_waiting(id);
        }
        woken
    }

    /// Who has waited longest for a lease, if one can be given now; its node and its source.
    pub(super) fn next_waiting(&self) -> Option<(MemberId, Slot, Option<HostId>)> {
        if self.free_count() == 0 || self.leases.len() >= LEASES_PER_TASK_MAX {
            return None;
        }
        let id = *self.waiting.values().next()?;
        let member = self.members.get(id)?;
        Some((id, member.slot, member.host))
    }

    /// Leases a waiting member what it waits for; it waits no longer, whether or not there is some.
    pub(super) fn grant_waiting(
        &mut self,
        id: MemberId,
        now: Duration,
        ttl: Duration,
    ) -> Option<PieceRun> {
        self.stop_waiting(id);
        let wanted = self.members.get(id)?.waits_for?;
        self.grant(id, &[wanted], None, now, ttl)
    }
}
