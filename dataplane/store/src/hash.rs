//! The sha256 of a blob, computed while its pieces arrive.

use pantala_wire::ByteRange;
use pantala_wire::layout::PIECE_SIZE_MIN;
use sha2::{Digest, Sha256};

use crate::blob::Blob;
use crate::error::StoreError;

/// Bytes hashed at once: large enough for the disk. No piece is smaller but the last.
const HASH_RUN_BYTES: u64 = PIECE_SIZE_MIN;

/// How far a blob has been hashed. Belongs to the blob it was first used with.
#[derive(Clone, Default)]
pub struct Sha256Progress {
    hasher: Sha256,
    hashed_bytes: u64,
    /// Of which files, and after how many discards of pieces.
    of: Option<(u64, u64)>,
}

impl std::fmt::Debug for Sha256Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sha256Progress")
            .field("hashed_bytes", &self.hashed_bytes)
            .finish_non_exhaustive()
    }
}

impl Sha256Progress {
    /// Nothing hashed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes hashed, from the start of the blob.
    pub fn hashed_bytes(&self) -> u64 {
        self.hashed_bytes
    }
}

/// Proof that the bytes of a blob have its sha256; only hashing them makes one.
#[derive(Debug)]
pub struct Sha256Proof {
    pub(crate) incarnation: u64,
    pub(crate) discards: u64,
}

/// What hashing has found so far.
#[derive(Debug)]
#[must_use]
pub enum Sha256Verdict {
    /// Bytes are missing; call again when more are there.
    Unfinished,
    /// The blob is what its name says.
    Match(Sha256Proof),
    /// The blob is not what its name says: some author has lied.
    Mismatch,
}

impl Blob {
    /// Hashes on over the pieces held without a gap. Starts over by itself where a piece that had
    /// been hashed was dropped.
    ///
    /// # Errors
    /// As [`Blob::read_at`].
    pub fn verify_sha256(
        &self,
        progress: &mut Sha256Progress,
    ) -> Result<Sha256Verdict, StoreError> {
        let size = self.layout().blob_size();
        loop {
            let (end, discards) = self.prepare(progress);
            let start = progress.hashed_bytes;
            let Some(run) = ByteRange::new(start, end.min(start + HASH_RUN_BYTES)) else {
                break;
            };
            // Discarded before or while it was read: the next turn sees it, and starts over where needed.
            if let Some(bytes) = self.slice(run)?
                && self.0.state.lock().discards == discards
            {
                progress.hasher.update(&bytes);
                progress.hashed_bytes = run.end();
            }
        }
        if progress.hashed_bytes < size {
            return Ok(Sha256Verdict::Unfinished);
        }
        let sum: [u8; 32] = progress.hasher.clone().finalize().into();
        let Some((incarnation, discards)) = progress.of else {
            return Ok(Sha256Verdict::Unfinished);
        };
        if sum == *self.digest().as_bytes() {
            Ok(Sha256Verdict::Match(Sha256Proof {
                incarnation,
                discards,
            }))
        } else {
            Ok(Sha256Verdict::Mismatch)
        }
    }

    /// Starts `progress` over where it no longer holds. Returns the end of the pieces held without
    /// a gap and the count of discards, both of the same moment.
    fn prepare(&self, progress: &mut Sha256Progress) -> (u64, u64) {
        let state = self.0.state.lock();
        let holds = progress.of.is_some_and(|(incarnation, discards)| {
            incarnation == self.0.incarnation
                && !state.discarded_below(progress.hashed_bytes, discards)
        });
        if !holds {
            *progress = Sha256Progress::new();
        }
        progress.of = Some((self.0.incarnation, state.discards));
        let layout = self.layout();
        let mut end = progress.hashed_bytes;
        while let Some(piece) = layout.piece_at(end).filter(|p| state.held.contains(*p)) {
            end = layout.piece_range(piece).map_or(end, |range| range.end());
        }
        (end, state.discards)
    }
}
