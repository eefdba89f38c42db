//! Who may fetch which piece from the source.

use std::time::Duration;

use pantala_wire::{PieceIndex, PieceRun};

use super::config::{
    LEASE_RUN_MAX, LEASED_PIECES_TARGET, LEASES_PER_MEMBER_MAX, LEASES_PER_TASK_MAX,
};
use super::nodes::Slot;
use super::task::{Member, Task, ascending};

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
            .filter(|&&(slot, until)| {
                now < until && self.members.get(&slot).is_some_and(|m| m.holds(piece))
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
        at_once.min(share.max(2) as u32).clamp(1, LEASE_RUN_MAX)
    }

    /// Leases pieces out of `wanted` to `slot`, from `urgent` on where that can be.
    pub(super) fn grant(
        &mut self,
        slot: Slot,
        wanted: &[PieceRun],
        urgent: Option<PieceIndex>,
        now: Duration,
        ttl: Duration,
    ) -> Option<PieceRun> {
        let member = self.members.get(&slot)?;
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
        self.add_lease(slot, run, now + ttl);
        self.stop_waiting(slot);
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
        slot: Slot,
        fetching: &[PieceRun],
        now: Duration,
        ttl: Duration,
    ) -> Vec<PieceRun> {
        let mut given = Vec::new();
        let mut at = 0;
        loop {
            let Some(member) = self.members.get(&slot) else {
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
            self.add_lease(slot, run, now + ttl);
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

    /// Leases to waiting members what can be leased now, to at most `max` of them. They are not told to
    /// ask again: the source would be idle for a round trip after each lease.
    pub(super) fn serve_waiting(
        &mut self,
        max: usize,
        now: Duration,
        ttl: Duration,
    ) -> Vec<(Slot, PieceRun)> {
        let mut served = Vec::new();
        for _ in 0..max {
            if self.free_count() == 0 || self.leases.len() >= LEASES_PER_TASK_MAX {
                break;
            }
            let Some(slot) = self.waiting.values().next().copied() else {
                break;
            };
            self.stop_waiting(slot);
            let wanted = self.members.get(&slot).and_then(|m| m.waits_for);
            if let Some(wanted) = wanted
                && let Some(run) = self.grant(slot, &[wanted], None, now, ttl)
            {
                served.push((slot, run));
            }
        }
        served
    }
}
