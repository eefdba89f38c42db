//! How a blob is opened, found or new, with others doing the same.

use std::sync::Arc;

use parking_lot::MutexGuard;

use pantala_wire::{BlobDigest, PieceSet};

use crate::blob::{Blob, Inner};
use crate::error::StoreError;
use crate::file::{Files, Found, Unusable, allocated_bytes};
use crate::map::lend::Lending;
use crate::meta::Header;
use crate::place::Place;
use crate::registry::{Entry, Room, Slot};
use crate::state::State;
use crate::store::{Reg, Store, StoreInner, dropped_because};

/// How often a full disk is answered by evicting and trying again. Each time frees at least what is
/// needed; more often than this, others fill the disk faster than the store empties it.
const DISK_FULL_RETRIES_MAX: u32 = 3;

impl Store {
    pub(crate) fn open_found(
        &self,
        digest: &BlobDigest,
        size: Option<u64>,
    ) -> Result<Option<Blob>, StoreError> {
        let mut reg = self.0.registry.lock();
        loop {
            let access = reg.next_access();
            let Some(entry) = reg.entries.get_mut(digest) else {
                return Ok(None);
            };
            let right_size = size.is_none_or(|size| size == entry.size);
            let wrong_size = StoreError::WrongSize {
                digest: *digest,
                stored_bytes: entry.size,
                asked_bytes: size.unwrap_or(entry.size),
            };
            match &mut entry.slot {
                Slot::Open(weak) => {
                    if let Some(inner) = weak.upgrade() {
                        entry.last_access = access;
                        drop(reg);
                        return right_size.then(|| Some(Blob(inner))).ok_or(wrong_size);
                    }
                    // Its last user is on the way to say so.
                    self.0.changed.wait(&mut reg);
                }
                Slot::Opening | Slot::Removing { .. } => self.0.changed.wait(&mut reg),
                Slot::Idle(_) if !right_size && entry.complete => return Err(wrong_size),
                Slot::Idle(parked) if right_size => {
                    let parked = parked.take();
                    entry.slot = Slot::Opening;
                    entry.last_access = access;
                    let incarnation = entry.incarnation;
                    let lending = Arc::clone(&entry.lending);
                    let opened = MutexGuard::unlocked(&mut reg, || {
                        let guard = OpeningGuard(&self.0, digest);
                        let opened = self.load(digest, parked, incarnation, lending);
                        std::mem::forget(guard);
                        opened
                    });
                    let unusable = match opened {
                        Ok(inner) => return Ok(Some(self.opened(&mut reg, digest, inner))),
                        Err(unusable) => unusable,
                    };
                    match dropped_because(unusable) {
                        Ok(why) => {
                            tracing::warn!(blob = %digest, why, "a stored blob is damaged; it is dropped and fetched again");
                            self.0.evict(&mut reg, &[*digest])?;
                        }
                        Err(error) => {
                            self.0.give_up(&mut reg, digest);
                            return Err(error);
                        }
                    }
                }
                // Nobody has verified what is there, nor uses it: the newer word counts.
                Slot::Idle(_) => {
                    tracing::warn!(%wrong_size, "an incomplete blob is dropped");
                    self.0.evict(&mut reg, &[*digest])?;
                }
            }
        }
    }

    fn opened(&self, reg: &mut Reg<'_>, digest: &BlobDigest, inner: Arc<Inner>) -> Blob {
        if let Some(entry) = reg.entries.get_mut(digest) {
            entry.slot = Slot::Open(Arc::downgrade(&inner));
        }
        self.0.changed.notify_all();
        Blob(inner)
    }

    fn load(
        &self,
        digest: &BlobDigest,
        parked: Option<Box<State>>,
        incarnation: u64,
        lending: Arc<Lending>,
    ) -> Result<Arc<Inner>, Unusable> {
        let place = Place::of(&self.0.config.dir, digest);
        let (files, Found { head, mut durable }) = Files::open(self.0.fs.as_ref(), place)?;
        let state = match parked {
            Some(parked) => {
                for piece in durable.clone().iter() {
                    if !parked.held.contains(piece) {
                        durable.remove(piece);
                    }
                }
                *parked
            }
            None => {
                files.check_records(&mut durable);
                let complete = head.sealed && durable.is_full();
                State::new(*head.header.layout(), durable.clone(), complete)
            }
        };
        if head.sealed && !state.complete {
            // It must not count for the pieces that will be fetched now.
            files.write_seal(false)?;
        }
        Ok(Inner::new(
            self.0.clone(),
            files,
            incarnation,
            lending,
            state,
            durable,
        ))
    }

    /// Creates a blob that the store does not have; `None` where the caller has to look again.
    pub(crate) fn create_absent(&self, header: Header) -> Result<Option<Blob>, StoreError> {
        let needed_bytes = allocated_bytes(&header);
        let limit_bytes = self.0.config.limit_bytes;
        let mut reg = self.0.registry.lock();
        if reg.entries.contains_key(header.digest()) {
            return Ok(None);
        }
        match reg.reserve(needed_bytes, limit_bytes, self.0.config.low_bytes()) {
            Room::Reserved => {}
            Room::Evict(victims) => {
                self.0.evict(&mut reg, &victims)?;
                return Ok(None);
            }
            Room::Wait => {
                self.0.changed.wait(&mut reg);
                return Ok(None);
            }
            Room::Full { pinned_bytes } => {
                return Err(StoreError::Full {
                    needed_bytes,
                    limit_bytes,
                    pinned_bytes,
                });
            }
        }
        let incarnation = reg.next_incarnation();
        let lending = Lending::new(header.layout().blob_size());
        let entry = Entry {
            size: header.layout().blob_size(),
            allocated_bytes: needed_bytes,
            complete: false,
            held_count: 0,
            last_access: reg.next_access(),
            slot: Slot::Opening,
            incarnation,
            lending: Arc::clone(&lending),
        };
        reg.entries.insert(*header.digest(), entry);
        drop(reg);
        let guard = OpeningGuard(&self.0, header.digest());
        let created = self.create_files(header, needed_bytes);
        std::mem::forget(guard);
        match created {
            Ok(files) => {
                let count = header.layout().piece_count();
                let none = PieceSet::empty(count);
                let state = State::new(*header.layout(), none.clone(), false);
                let inner = Inner::new(self.0.clone(), files, incarnation, lending, state, none);
                let mut reg = self.0.registry.lock();
                Ok(Some(self.opened(&mut reg, header.digest(), inner)))
            }
            Err(error) => {
                let mut reg = self.0.registry.lock();
                if let Err(error) = self.0.evict(&mut reg, &[*header.digest()]) {
                    tracing::warn!(blob = %header.digest(), %error, "a half-made blob stays until it is opened or evicted");
                }
                Err(error)
            }
        }
    }

    fn create_files(&self, header: Header, needed_bytes: u64) -> Result<Files, StoreError> {
        let fs = self.0.fs.as_ref();
        let place = Place::of(&self.0.config.dir, header.digest());
        let mut retries = 0;
        loop {
            // A removal that failed half-way may have left something.
            place
                .remove(fs)
                .map_err(|e| StoreError::io("remove", &place.dir, e))?;
            match Files::create(fs, place.clone(), header) {
                Err(StoreError::DiskFull { path }) if retries < DISK_FULL_RETRIES_MAX => {
                    retries += 1;
                    let mut reg = self.0.registry.lock();
                    let used = reg.used_bytes();
                    let victims = reg.victims(used, used.saturating_sub(needed_bytes));
                    if victims.is_empty() {
                        return Err(StoreError::DiskFull { path });
                    }
                    tracing::warn!(count = victims.len(), path = %path.display(), "the disk is full below the store's limit; blobs are evicted");
                    self.0.evict(&mut reg, &victims)?;
                }
                other => return other,
            }
        }
    }
}

/// Gives up the right to open or create a blob if that panics: others wait for it.
struct OpeningGuard<'a>(&'a StoreInner, &'a BlobDigest);

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        self.0.give_up(&mut self.0.registry.lock(), self.1);
    }
}
