//! Which blobs a store has, what they take, and which of them has to go. No I/O.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use pantala_wire::BlobDigest;

use crate::blob::Inner;
use crate::map::lend::Lending;
use crate::state::State;

/// Access counts above this were not counted, they are damage: no store lives long enough.
const ACCESS_MAX: u64 = 1 << 62;

/// What is happening to a blob.
pub(crate) enum Slot {
    /// Nobody has it open. What this process knew of it when it was closed, if it ever opened it.
    Idle(Option<Box<State>>),
    /// Somebody is opening or creating it.
    Opening,
    /// Somebody is unlinking it, and somebody may still have it open.
    Removing { open: bool },
    /// It is open, or being closed where the pointer is dead.
    Open(Weak<Inner>),
}

pub(crate) struct Entry {
    pub(crate) size: u64,
    pub(crate) allocated_bytes: u64,
    pub(crate) complete: bool,
    pub(crate) held_count: u32,
    pub(crate) last_access: u64,
    pub(crate) slot: Slot,
    /// Tells these files from earlier and later ones of the same blob.
    pub(crate) incarnation: u64,
    /// Slices outlive the blob they were lent by: whoever opens the files next must know of them.
    pub(crate) lending: Arc<Lending>,
}

/// What to do so that a number of bytes fits.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Nothing: they have been reserved.
    Reserved,
    /// Evict these, then ask again.
    Evict(Vec<BlobDigest>),
    /// Somebody is unlinking enough: ask again after that.
    Wait,
    /// They cannot fit; so many bytes are in use.
    Full { pinned_bytes: u64 },
}

#[derive(Default)]
pub(crate) struct Registry {
    pub(crate) entries: HashMap<BlobDigest, Entry>,
    /// Removed while open: still on the disk until closed. Incarnation to bytes.
    detached: HashMap<u64, u64>,
    used_bytes: u64,
    accesses: u64,
    incarnations: u64,
}

impl Registry {
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(crate) fn next_access(&mut self) -> u64 {
        self.accesses += 1;
        self.accesses
    }

    pub(crate) fn next_incarnation(&mut self) -> u64 {
        self.incarnations += 1;
        self.incarnations
    }

    /// Adds a blob found at the start.
    pub(crate) fn add_found(&mut self, digest: BlobDigest, mut entry: Entry) {
        if entry.last_access > ACCESS_MAX {
            entry.last_access = 0;
        }
        self.accesses = self.accesses.max(entry.last_access);
        self.used_bytes += entry.allocated_bytes;
        entry.incarnation = self.next_incarnation();
        self.entries.insert(digest, entry);
    }

    /// Takes a blob out whose files are gone.
    pub(crate) fn take_out(&mut self, digest: &BlobDigest) {
        if let Some(entry) = self.entries.remove(digest) {
            self.used_bytes -= entry.allocated_bytes;
        }
    }

    /// Takes a blob out whose names are gone but which somebody still reads.
    pub(crate) fn detach(&mut self, digest: &BlobDigest) {
        if let Some(entry) = self.entries.remove(digest) {
            self.detached
                .insert(entry.incarnation, entry.allocated_bytes);
        }
    }

    /// Gives back the bytes of a detached blob that is now closed.
    fn close_detached(&mut self, incarnation: u64) {
        self.used_bytes -= self.detached.remove(&incarnation).unwrap_or(0);
    }

    /// A blob's last user is gone; `state` is what is known of it.
    pub(crate) fn close(&mut self, digest: &BlobDigest, incarnation: u64, state: State) {
        let access = self.next_access();
        let entry = self.entries.get_mut(digest);
        let Some(entry) = entry.filter(|entry| entry.incarnation == incarnation) else {
            return self.close_detached(incarnation);
        };
        if let Slot::Removing { open } = &mut entry.slot {
            *open = false;
            return;
        }
        entry.complete = state.complete;
        entry.held_count = state.held.len();
        entry.last_access = access;
        entry.slot = Slot::Idle(Some(Box::new(state)));
    }

    /// Reserves `needed_bytes`, or says what has to happen first.
    pub(crate) fn reserve(&mut self, needed_bytes: u64, limit_bytes: u64, low_bytes: u64) -> Room {
        let used = self.used_bytes.saturating_add(needed_bytes);
        if used <= limit_bytes {
            self.used_bytes = used;
            return Room::Reserved;
        }
        let sum = |wanted: fn(&Slot) -> bool| -> u64 {
            let entries = self.entries.values();
            entries
                .filter(|entry| wanted(&entry.slot))
                .map(|entry| entry.allocated_bytes)
                .sum()
        };
        let removing = sum(|slot| matches!(slot, Slot::Removing { open: false }));
        let idle = sum(|slot| matches!(slot, Slot::Idle(_)));
        if used - removing - idle > limit_bytes {
            return Room::Full {
                pinned_bytes: self.used_bytes - removing - idle,
            };
        }
        let used = used - removing;
        if used <= limit_bytes {
            return Room::Wait;
        }
        // Where the low watermark is out of reach, emptying the store would gain nothing.
        let target = if used - idle <= low_bytes {
            low_bytes
        } else {
            limit_bytes
        };
        Room::Evict(self.victims(used, target))
    }

    /// The least recently used blobs that nobody has open, until `used` falls to `target`.
    pub(crate) fn victims(&self, mut used: u64, target: u64) -> Vec<BlobDigest> {
        let mut idle: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.slot, Slot::Idle(_)))
            .map(|(digest, entry)| (entry.last_access, *digest, entry.allocated_bytes))
            .collect();
        idle.sort_unstable();
        let mut victims = Vec::new();
        for (_, digest, bytes) in idle {
            if used <= target {
                break;
            }
            used -= bytes;
            victims.push(digest);
        }
        victims
    }
}
