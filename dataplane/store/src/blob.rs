//! An open blob: what is there, and reading it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use pantala_wire::{
    BlobDigest, ByteRange, GROUP_SIZE, PieceDigest, PieceIndex, PieceLayout, PieceSet,
    tree::{group_digest, group_digests},
};

use crate::error::StoreError;
use crate::file::Files;
use crate::map::lend::Lending;
use crate::meta::PieceProof;
use crate::state::State;
use crate::store::{StoreInner, is_damage};

/// How often a read starts over because a group was rewritten under it. Rewrites with other bytes
/// happen when a peer has lied; the last try holds the lock and cannot fail.
const READ_RETRIES_MAX: u32 = 4;

/// An open blob. Clones share it, and while one lives, the blob is not evicted.
///
/// Writers call [`Self::write_groups`] or [`Self::write_verified_groups`] until a piece is there,
/// then [`Self::commit_piece`]; [`Self::flush`] now and then; and in the end
/// [`Self::verify_sha256`] and [`Self::mark_complete`]. Readers read what is readable at any time.
#[derive(Clone)]
pub struct Blob(pub(crate) Arc<Inner>);

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Blob").field(self.digest()).finish()
    }
}

/// Locks are taken in this order: `flushing`, `durable`, `state`. `state` is never held while the
/// disk works, but in the last try of a read.
pub(crate) struct Inner {
    store: Arc<StoreInner>,
    pub(crate) files: Files,
    pub(crate) incarnation: u64,
    /// The same for all who open these files, now and later.
    pub(crate) lending: Arc<Lending>,
    pub(crate) state: Mutex<State>,
    /// A turn was given back, or a verification has ended.
    pub(crate) changed: Condvar,
    /// The pieces whose durable bit is set on file. Whoever changes bits or seal holds it meanwhile.
    pub(crate) durable: Mutex<PieceSet>,
    /// Held by the one flush at work; true once the blob's name is durable.
    pub(crate) flushing: Mutex<bool>,
}

impl Inner {
    pub(crate) fn new(
        store: Arc<StoreInner>,
        files: Files,
        incarnation: u64,
        lending: Arc<Lending>,
        state: State,
        durable: PieceSet,
    ) -> Arc<Self> {
        lending.set_open(true);
        Arc::new(Self {
            store,
            files,
            incarnation,
            lending,
            state: Mutex::new(state),
            changed: Condvar::new(),
            durable: Mutex::new(durable),
            flushing: Mutex::new(false),
        })
    }

    pub(crate) fn sync_name(&self) -> Result<(), StoreError> {
        let place = &self.files.place;
        place
            .sync(self.store.fs.as_ref())
            .map_err(|e| StoreError::io("sync the directory", &place.dir, e))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.lending.set_open(false);
        let access = self.store.next_access();
        // Which blob was used last is worth a write, but no error.
        if let Err(error) = self.files.write_last_access(access) {
            tracing::debug!(%error, "the time of the last access is not kept");
        }
        let state = self.state.get_mut().park();
        self.store
            .close(self.files.header.digest(), self.incarnation, state);
    }
}

/// The result of looking at a piece before reading it.
enum Look {
    Verified,
    NotHeld,
    /// This caller is to verify it.
    Verify,
}

impl Blob {
    /// The blob's digest.
    pub fn digest(&self) -> &BlobDigest {
        self.0.files.header.digest()
    }

    /// How the blob is cut.
    pub fn layout(&self) -> PieceLayout {
        *self.0.files.header.layout()
    }

    /// The pieces held: committed in this process, or found and not yet seen to be damaged.
    pub fn held(&self) -> PieceSet {
        self.0.state.lock().held.clone()
    }

    /// Whether all pieces are held and the sha256 of the blob has been verified.
    pub fn is_complete(&self) -> bool {
        self.0.state.lock().complete
    }

    /// Bytes of committed pieces that a crash would lose; [`Self::flush`] brings it to zero.
    pub fn unflushed_bytes(&self) -> u64 {
        self.0.state.lock().unflushed_bytes()
    }

    /// The end of the bytes that can be read from `offset` on without a gap; `offset` where none.
    pub fn readable_from(&self, offset: u64) -> u64 {
        self.0.state.lock().readable_to(offset, u64::MAX)
    }

    /// Whether every byte of `range` can be read now, without a look at the disk to verify it.
    pub fn is_ready(&self, range: ByteRange) -> bool {
        let state = self.0.state.lock();
        let mut pieces = self.layout().pieces_of(range).map(PieceIndex);
        state.readable_to(range.start(), range.end()) >= range.end()
            && !pieces.any(|piece| state.unverified.contains(piece))
    }

    /// Whether both are the same files: not after the blob was removed and created anew.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Where the blob's bytes lie, each at its own offset.
    pub fn data_path(&self) -> &Path {
        &self.0.files.place.data
    }

    /// Another descriptor of the data file, of the same opening as the blob's own. For the kernel to
    /// be told which file to watch: whoever writes or shortens it breaks the store.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn data_descriptor(&self) -> Result<File, StoreError> {
        let descriptor = self.0.files.data.descriptor();
        descriptor.map_err(|e| StoreError::io("copy the descriptor of", self.data_path(), e))
    }

    /// The digest of what has been written of `piece`, where that is all of it and it is not yet
    /// committed: what its author signs.
    pub fn written_digest(&self, piece: PieceIndex) -> Option<PieceDigest> {
        self.0.state.lock().written_digest(piece)
    }

    /// Reads what is readable from `offset` on, up to the length of `out`; the number of bytes
    /// read, 0 where the byte at `offset` is not readable. The first read of a piece since the
    /// store was opened verifies it.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] where a piece of the range is not what was committed; it is dropped
    /// before this returns, and has to be fetched again. [`StoreError::Io`].
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize, StoreError> {
        let mut tries = 0;
        loop {
            let state = self.0.state.lock();
            let wanted_end = offset.saturating_add(out.len() as u64);
            let end = state.readable_to(offset, wanted_end);
            let Some(range) = ByteRange::new(offset, end) else {
                return Ok(0);
            };
            let mut pieces = self.layout().pieces_of(range).map(PieceIndex);
            if let Some(piece) = pieces.find(|piece| state.unverified.contains(*piece)) {
                drop(state);
                self.verify_piece(piece)?;
                continue;
            }
            let generation = state.generation;
            let part = &mut out[..range.len() as usize];
            tries += 1;
            let last_try = tries > READ_RETRIES_MAX;
            let kept = last_try.then_some(state);
            let result = self.0.files.data.read_exact_at(part, offset);
            let unchanged = kept.is_some() || self.0.state.lock().generation == generation;
            drop(kept);
            match result {
                Err(error) => return Err(self.read_failed(range, error)),
                Ok(()) if unchanged => return Ok(part.len()),
                Ok(()) => {}
            }
        }
    }

    /// Verifies the pieces of `range` that have not been since the store was opened. False where
    /// some are not held.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn verify_range(&self, range: ByteRange) -> Result<bool, StoreError> {
        for piece in self.layout().pieces_of(range) {
            if !self.verify_piece(PieceIndex(piece))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What proves `piece` to a peer; `None` where it is not held. Verifies it where that has not
    /// been done yet.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn piece_proof(&self, piece: PieceIndex) -> Result<Option<PieceProof>, StoreError> {
        if !self.verify_piece(piece)? {
            return Ok(None);
        }
        let generation = self.0.state.lock().generation;
        let proof = self.0.files.record(piece);
        let state = self.0.state.lock();
        if proof.is_some() || state.generation != generation || !state.held.contains(piece) {
            return Ok(proof.filter(|_| state.held.contains(piece)));
        }
        drop(state);
        self.drop_damaged(piece, |state| state.held.contains(piece));
        Err(self.corrupt(piece))
    }

    /// True where `piece` is held and verified; false where it is not held.
    pub(crate) fn verify_piece(&self, piece: PieceIndex) -> Result<bool, StoreError> {
        loop {
            match self.look(piece) {
                Look::Verified => return Ok(true),
                Look::NotHeld => return Ok(false),
                Look::Verify => {}
            }
            let _turn = VerifyTurn(&self.0, piece);
            match self.matches_record(piece) {
                Ok(true) => {
                    self.0.state.lock().unverified.remove(piece);
                    return Ok(true);
                }
                Err(error) if !is_damage(&error) => {
                    return Err(StoreError::io("read", &self.0.files.place.data, error));
                }
                Ok(false) | Err(_) => {}
            }
            // Discarded while it was read, it may be anew and fine: look again.
            if self.drop_damaged(piece, |state| state.unverified.contains(piece)) {
                return Err(self.corrupt(piece));
            }
        }
    }

    fn look(&self, piece: PieceIndex) -> Look {
        let mut state = self.0.state.lock();
        loop {
            if !state.held.contains(piece) {
                return Look::NotHeld;
            }
            if !state.unverified.contains(piece) {
                return Look::Verified;
            }
            if state.verifying.insert(piece) {
                return Look::Verify;
            }
            self.0.changed.wait(&mut state);
        }
    }

    fn matches_record(&self, piece: PieceIndex) -> std::io::Result<bool> {
        let range = self.layout().piece_range(piece);
        let (Some(proof), Some(range)) = (self.0.files.record(piece), range) else {
            return Ok(false);
        };
        if let Some(bytes) = self.map_piece(piece) {
            return Ok(group_digests(range.start(), &bytes) == proof.group_digests);
        }
        let mut expected = proof.group_digests.iter();
        let mut buffer = vec![0; range.len().min(GROUP_SIZE) as usize];
        let mut at = range.start();
        while at < range.end() {
            let len = (range.end() - at).min(GROUP_SIZE) as usize;
            let group = &mut buffer[..len];
            self.0.files.data.read_exact_at(group, at)?;
            if expected.next() != Some(&group_digest(at, group)) {
                return Ok(false);
            }
            at += len as u64;
        }
        Ok(true)
    }

    /// A read has failed: where the disk has lost the bytes, the pieces that held them are dropped.
    fn read_failed(&self, range: ByteRange, error: std::io::Error) -> StoreError {
        if !is_damage(&error) {
            return StoreError::io("read", &self.0.files.place.data, error);
        }
        // Which of them it was shows when each is read again.
        let mut first = None;
        for piece in self.layout().pieces_of(range).map(PieceIndex) {
            let mut state = self.0.state.lock();
            if state.held.contains(piece) {
                state.unverified.insert(piece);
                drop(state);
                if let Err(error @ StoreError::Corrupt { .. }) = self.verify_piece(piece) {
                    first.get_or_insert(error);
                }
            }
        }
        first.unwrap_or_else(|| StoreError::io("read", &self.0.files.place.data, error))
    }

    fn drop_damaged(&self, piece: PieceIndex, still: impl Fn(&State) -> bool) -> bool {
        let dropped = self.forget(piece, still);
        if let Err(error) = &dropped {
            tracing::warn!(blob = %self.digest(), %piece, %error, "a damaged piece stays marked on disk; it will be verified again");
        }
        let dropped = dropped.unwrap_or(true);
        if dropped {
            tracing::warn!(blob = %self.digest(), %piece, "a piece is damaged on disk; it is dropped and fetched again");
        }
        dropped
    }

    pub(crate) fn corrupt(&self, piece: PieceIndex) -> StoreError {
        StoreError::Corrupt {
            digest: *self.digest(),
            piece,
        }
    }

    pub(crate) fn wait<'a>(&self, state: &mut MutexGuard<'a, State>) {
        self.0.changed.wait(state);
    }
}

/// The turn to verify a piece, given back however it ends.
struct VerifyTurn<'a>(&'a Inner, PieceIndex);

impl Drop for VerifyTurn<'_> {
    fn drop(&mut self) {
        self.0.state.lock().verifying.remove(&self.1);
        self.0.changed.notify_all();
    }
}
