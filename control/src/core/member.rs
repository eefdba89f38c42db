//! The members of one task, and the rolls that a choice among them is drawn from.
//!
//! A member has a number that stays the same while it is one, so that parents and children name each
//! other by it and every look-up is an index. Rolls are lists without holes: a random stretch of one is
//! a sample, whatever the task's size.

use std::collections::HashMap;
use std::time::Duration;

use pantala_wire::{PieceIndex, PieceRun, PieceSet};

use super::hosts::HostId;
use super::nodes::{Place, Slot};
use super::task::Turn;

/// A member's place in its task's table.
pub(super) type MemberId = u32;

/// A node's part in a task.
#[derive(Default)]
pub(super) struct Member {
    pub(super) slot: Slot,
    pub(super) place: Place,
    /// The host that it would fetch from.
    pub(super) host: Option<HostId>,
    pub(super) wanted: bool,
    pub(super) has_source: bool,
    pub(super) complete: bool,
    /// It announced, after control's start, that it was at work on the task.
    pub(super) announced: bool,
    /// What it holds; empty once it is complete.
    pub(super) held: Option<PieceSet>,
    pub(super) parents: Vec<MemberId>,
    pub(super) children: Vec<MemberId>,
    /// Parents that failed it, and until when they are not offered again. With the node's slot, as a
    /// member's number may be given to another.
    pub(super) excluded: Vec<(MemberId, Slot, Duration)>,
    pub(super) leases: Vec<u32>,
    /// Its number in the queue of those who wait for a lease.
    pub(super) waiting: Option<Turn>,
    /// What it waits for: from its first wanted piece to its last.
    pub(super) waits_for: Option<PieceRun>,
    /// Its number in the queue of those who have too few parents.
    pub(super) short: Option<u64>,
    /// Where it stands in each roll.
    at: [u32; ROLL_COUNT],
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
            .any(|&(_, other, until)| other == slot && now < until)
    }
}

/// The lists of members that candidates are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Roll {
    /// Everybody.
    All,
    /// Those that hold the whole blob.
    Complete,
    /// Nodes whose part it is to serve.
    Seeds,
    /// Those of one rack.
    Rack,
    /// Those of one zone.
    Zone,
}

const ROLL_COUNT: usize = 5;

#[derive(Default)]
pub(super) struct Members {
    slab: Vec<Option<Box<Member>>>,
    free: Vec<MemberId>,
    all: Vec<MemberId>,
    complete: Vec<MemberId>,
    seeds: Vec<MemberId>,
    racks: HashMap<u64, Vec<MemberId>>,
    zones: HashMap<u64, Vec<MemberId>>,
}

impl Members {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
    pub(super) fn get(&self, id: MemberId) -> Option<&Member> {
        self.slab.get(id as usize)?.as_deref()
    }
    pub(super) fn get_mut(&mut self, id: MemberId) -> Option<&mut Member> {
        self.slab.get_mut(id as usize)?.as_deref_mut()
    }

    /// The roll as the node at `place` sees it: its own rack, its own zone.
    pub(super) fn roll(&self, roll: Roll, place: &Place) -> &[MemberId] {
        match roll {
            Roll::All => &self.all,
            Roll::Complete => &self.complete,
            Roll::Seeds => &self.seeds,
            Roll::Rack => self.racks.get(&place.rack).map_or(&[], Vec::as_slice),
            Roll::Zone => self.zones.get(&place.zone).map_or(&[], Vec::as_slice),
        }
    }
    pub(super) fn all(&self) -> &[MemberId] {
        &self.all
    }
    pub(super) fn complete(&self) -> &[MemberId] {
        &self.complete
    }

    pub(super) fn add(&mut self, slot: Slot, place: Place) -> MemberId {
        let member = Box::new(Member {
            slot,
            place,
            ..Member::default()
        });
        let id = self.free.pop().unwrap_or(self.slab.len() as MemberId);
        if id as usize == self.slab.len() {
            self.slab.push(Some(member));
        } else {
            self.slab[id as usize] = Some(member);
        }
        self.enrol(Roll::All, id);
        if place.is_seed {
            self.enrol(Roll::Seeds, id);
        }
        if place.rack != Place::UNKNOWN {
            self.enrol(Roll::Rack, id);
        }
        if place.zone != Place::UNKNOWN {
            self.enrol(Roll::Zone, id);
        }
        id
    }

    /// Takes a member out of the table and every roll.
    pub(super) fn remove(&mut self, id: MemberId) -> Option<Box<Member>> {
        let place = self.get(id)?.place;
        self.strike(Roll::All, id);
        if place.is_seed {
            self.strike(Roll::Seeds, id);
        }
        if place.rack != Place::UNKNOWN {
            self.strike(Roll::Rack, id);
        }
        if place.zone != Place::UNKNOWN {
            self.strike(Roll::Zone, id);
        }
        let member = self.slab.get_mut(id as usize)?.take();
        self.free.push(id);
        member
    }

    pub(super) fn set_complete(&mut self, id: MemberId, complete: bool) -> bool {
        let Some(member) = self.get_mut(id) else {
            return false;
        };
        if std::mem::replace(&mut member.complete, complete) == complete {
            return false;
        }
        match complete {
            true => self.enrol(Roll::Complete, id),
            false => self.strike(Roll::Complete, id),
        }
        true
    }

    fn list_mut(&mut self, roll: Roll, place: &Place) -> &mut Vec<MemberId> {
        match roll {
            Roll::All => &mut self.all,
            Roll::Complete => &mut self.complete,
            Roll::Seeds => &mut self.seeds,
            Roll::Rack => self.racks.entry(place.rack).or_default(),
            Roll::Zone => self.zones.entry(place.zone).or_default(),
        }
    }

    fn enrol(&mut self, roll: Roll, id: MemberId) {
        let Some(place) = self.get(id).map(|member| member.place) else {
            return;
        };
        let list = self.list_mut(roll, &place);
        list.push(id);
        let at = list.len() as u32 - 1;
        if let Some(member) = self.get_mut(id) {
            member.at[roll as usize] = at;
        }
    }

    fn strike(&mut self, roll: Roll, id: MemberId) {
        let Some((place, at)) = self
            .get(id)
            .map(|member| (member.place, member.at[roll as usize]))
        else {
            return;
        };
        let list = self.list_mut(roll, &place);
        list.swap_remove(at as usize);
        let is_over = list.is_empty();
        if let Some(moved) = list.get(at as usize).copied()
            && let Some(moved) = self.get_mut(moved)
        {
            moved.at[roll as usize] = at;
        }
        match roll {
            Roll::Rack if is_over => drop(self.racks.remove(&place.rack)),
            Roll::Zone if is_over => drop(self.zones.remove(&place.zone)),
            _ => {}
        }
    }
}
