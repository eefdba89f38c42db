//! Writing to a blob: groups, commits, discards.

use std::ops::Range;

use bytes::Bytes;
use pantala_wire::{ByteRange, Claim, GROUP_SIZE, GroupDigest, PieceIndex};

use crate::blob::{Blob, Inner};
use crate::error::StoreError;
use crate::meta::PieceProof;
use crate::parts::Parts;
use crate::state::{Busy, State, Turn};

impl Blob {
    /// Writes whole groups at `offset`, or groups and the blob's tail, and makes them readable.
    /// Returns their digests. For a source's bytes, which nobody has vouched for yet; groups that a
    /// claim covers go through [`Self::write_verified_groups`].
    ///
    /// A group written twice keeps the last bytes; one that is the same is not written again.
    ///
    /// # Errors
    /// [`StoreError::Unaligned`], [`StoreError::AlreadyHeld`], [`StoreError::DiskFull`],
    /// [`StoreError::Io`]. What was not written is not readable; groups of earlier pieces of the
    /// same call may be.
    pub fn write_groups(&self, offset: u64, data: &[u8]) -> Result<Vec<GroupDigest>, StoreError> {
        let parts = Parts::new([data]);
        self.check_bounds(offset, parts.len())?;
        let digests = parts.group_digests(offset);
        self.write_hashed(offset, &parts, &digests)?;
        Ok(digests)
    }

    /// As [`Self::write_groups`], but writes nothing unless the groups have the `expected` digests:
    /// no reader ever sees a group that is not the one announced.
    ///
    /// # Errors
    /// [`StoreError::WrongGroup`] names the first that is wrong; else as [`Self::write_groups`].
    pub fn write_verified_groups(
        &self,
        offset: u64,
        data: &[u8],
        expected: &[GroupDigest],
    ) -> Result<(), StoreError> {
        self.write_verified(offset, &Parts::new([data]), expected)
    }

    /// As [`Self::write_verified_groups`], of bytes in many slices, which lie one behind the other:
    /// those of a stream, as they were decrypted.
    ///
    /// # Errors
    /// As [`Self::write_verified_groups`].
    pub fn write_verified_slices(
        &self,
        offset: u64,
        slices: &[Bytes],
        expected: &[GroupDigest],
    ) -> Result<(), StoreError> {
        let parts = Parts::new(slices.iter().map(|slice| &slice[..]));
        self.write_verified(offset, &parts, expected)
    }

    fn write_verified(
        &self,
        offset: u64,
        parts: &Parts<'_>,
        expected: &[GroupDigest],
    ) -> Result<(), StoreError> {
        self.check_bounds(offset, parts.len())?;
        let digests = parts.group_digests(offset);
        if digests != expected {
            let right = digests.iter().zip(expected).take_while(|(a, b)| a == b);
            return Err(StoreError::WrongGroup {
                offset: offset + right.count() as u64 * GROUP_SIZE,
            });
        }
        self.write_hashed(offset, parts, &digests)
    }

    /// Makes `piece` held: its groups are all written and merge into the digest of `claim`. The
    /// caller has verified the claim's signature. A piece that is held already stays as it is.
    ///
    /// # Errors
    /// [`StoreError::WrongDigest`], [`StoreError::Unwritten`], [`StoreError::NoSuchPiece`],
    /// [`StoreError::Dropped`], [`StoreError::DiskFull`], [`StoreError::Io`].
    pub fn commit_piece(&self, piece: PieceIndex, claim: Claim) -> Result<(), StoreError> {
        if self.layout().groups_in(piece) == 0 {
            return Err(StoreError::NoSuchPiece(piece));
        }
        let mut state = self.0.state.lock();
        let (turn, group_digests) = loop {
            if state.held.contains(piece) {
                drop(state);
                return self.check_held(piece, &claim);
            }
            match state.begin_commit(piece, &claim.piece_digest)? {
                Ok(begun) => break begun,
                Err(Busy) => self.wait(&mut state),
            }
        };
        drop(state);
        let mut turn = OpenTurn::new(&self.0, turn, true);
        let proof = PieceProof {
            claim,
            group_digests,
        };
        self.0.files.write_record(piece, &proof)?;
        turn.succeed(None)
    }

    /// Forgets `piece`: its bytes are no longer readable, now and after a restart.
    ///
    /// # Errors
    /// [`StoreError::Io`] where that could not be made durable; in this process it is forgotten
    /// all the same.
    pub fn discard_piece(&self, piece: PieceIndex) -> Result<(), StoreError> {
        self.forget(piece, |_| true).map(drop)
    }

    /// Forgets `piece` if `still` holds when everybody else is done with it; whether it did.
    pub(crate) fn forget(
        &self,
        piece: PieceIndex,
        still: impl Fn(&State) -> bool,
    ) -> Result<bool, StoreError> {
        let mut durable = self.0.durable.lock();
        let mut state = self.0.state.lock();
        while state.is_busy(piece) {
            self.wait(&mut state);
        }
        if !still(&state) {
            return Ok(false);
        }
        state.discard(piece);
        drop(state);
        self.0.changed.notify_all();
        if durable.remove(piece) {
            self.0.files.write_seal(false)?;
            self.0.files.write_bitmap(&durable)?;
            self.sync_meta_or_drop(&mut durable)?;
        }
        Ok(true)
    }

    fn check_bounds(&self, offset: u64, len: usize) -> Result<(), StoreError> {
        let size = self.layout().blob_size();
        let len = len as u64;
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let whole = |at: u64| at.is_multiple_of(GROUP_SIZE);
        match end {
            Some(end) if len > 0 && whole(offset) && (whole(end) || end == size) => Ok(()),
            _ => Err(StoreError::Unaligned { offset, len, size }),
        }
    }

    fn write_hashed(
        &self,
        offset: u64,
        parts: &Parts<'_>,
        digests: &[GroupDigest],
    ) -> Result<(), StoreError> {
        let layout = self.layout();
        let end = offset + parts.len() as u64;
        let mut at = offset;
        let mut digests_rest = digests;
        while let Some(piece) = layout.piece_at(at).filter(|_| at < end) {
            let range = layout
                .piece_range(piece)
                .ok_or(StoreError::NoSuchPiece(piece))?;
            let len = range.end().min(end) - at;
            let digests;
            (digests, digests_rest) = digests_rest.split_at(len.div_ceil(GROUP_SIZE) as usize);
            let first = ((at - range.start()) / GROUP_SIZE) as usize;
            let start = (at - offset) as usize;
            let of_piece = start..start + len as usize;
            self.write_in_piece(piece, first, parts, of_piece, digests)?;
            at += len;
        }
        Ok(())
    }

    /// Writes `of_piece`, a range of `parts`, to the groups of `piece` from `first` on. Everything that
    /// is ever written to a data file is written here: the lender's rule depends on it.
    fn write_in_piece(
        &self,
        piece: PieceIndex,
        first: usize,
        parts: &Parts<'_>,
        of_piece: Range<usize>,
        digests: &[GroupDigest],
    ) -> Result<(), StoreError> {
        let first_of_piece = u64::from(piece.0) * u64::from(self.layout().groups_per_piece());
        let mut state = self.0.state.lock();
        let turns = loop {
            match state.begin_write(piece, first, digests)? {
                Ok(turns) => break turns,
                Err(Busy) => self.wait(&mut state),
            }
        };
        drop(state);
        // All are guarded before the first is written: an error gives the rest back, too.
        let turns: Vec<OpenTurn<'_>> = turns
            .into_iter()
            .map(|turn| OpenTurn::new(&self.0, turn, false))
            .collect();
        for mut turn in turns {
            let groups = turn.turn.groups();
            let offset = (first_of_piece + groups.start as u64) * GROUP_SIZE;
            let start = of_piece.start + (groups.start - first) * GROUP_SIZE as usize;
            let end = of_piece.start + (groups.end - first) * GROUP_SIZE as usize;
            let end = end.min(of_piece.end);
            self.free_of_readers(piece, offset, (end - start) as u64)?;
            let mut slices = parts.slices(start..end);
            self.0
                .files
                .data
                .write_vectored_at(&mut slices, offset)
                .map_err(|e| StoreError::io("write", &self.0.files.place.data, e))?;
            turn.succeed(Some(&digests[groups.start - first..groups.end - first]))?;
        }
        Ok(())
    }

    /// Makes sure that nobody sees a write to these bytes, groups that this caller has the turn to.
    fn free_of_readers(&self, piece: PieceIndex, offset: u64, len: u64) -> Result<(), StoreError> {
        let Some(range) = ByteRange::new(offset, offset + len) else {
            return Ok(());
        };
        let data = &self.0.files.data;
        self.0
            .lending
            .detach(range, |out, offset| data.read_exact_at(out, offset))
            .map_err(|error| {
                tracing::warn!(blob = %self.digest(), %piece, %error, "a piece that is being read cannot be replaced now");
                StoreError::BeingRead(piece)
            })
    }

    fn check_held(&self, piece: PieceIndex, claim: &Claim) -> Result<(), StoreError> {
        match self.piece_proof(piece)? {
            Some(proof) if proof.claim.piece_digest != claim.piece_digest => {
                Err(StoreError::WrongDigest {
                    piece,
                    written: proof.claim.piece_digest,
                    claimed: claim.piece_digest,
                })
            }
            Some(_) => Ok(()),
            None => Err(StoreError::Dropped(piece)),
        }
    }
}

/// A turn that is given back however the write or commit ends.
struct OpenTurn<'a> {
    inner: &'a Inner,
    turn: Turn,
    commit: bool,
    open: bool,
}

impl<'a> OpenTurn<'a> {
    fn new(inner: &'a Inner, turn: Turn, commit: bool) -> Self {
        Self {
            inner,
            turn,
            commit,
            open: true,
        }
    }

    fn succeed(&mut self, digests: Option<&[GroupDigest]>) -> Result<(), StoreError> {
        if self.end(true, digests) {
            Ok(())
        } else {
            Err(StoreError::Dropped(self.turn.piece))
        }
    }

    fn end(&mut self, done: bool, digests: Option<&[GroupDigest]>) -> bool {
        self.open = false;
        let mut state = self.inner.state.lock();
        let valid = if self.commit {
            state.end_commit(&self.turn, done)
        } else {
            state.end_write(&self.turn, digests)
        };
        drop(state);
        self.inner.changed.notify_all();
        valid
    }
}

impl Drop for OpenTurn<'_> {
    fn drop(&mut self) {
        if self.open {
            self.end(false, None);
        }
    }
}
