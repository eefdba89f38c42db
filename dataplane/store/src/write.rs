//! Writing to a blob: groups, commits, discards.

use bytes::Bytes;
use pantala_wire::tree::group_digests;
use pantala_wire::{ByteRange, Claim, GROUP_SIZE, GroupDigest, PieceIndex};

use crate::blob::{Blob, Inner};
use crate::error::StoreError;
use crate::meta::PieceProof;
use crate::state::{Busy, State, Turn};

impl Blob {
    /// Writes whole groups at `offset`, or groups and the blob's tail, and makes them readable.
    /// Returns their digests. For a source's bytes, which nobody has vouched for yet; groups that a
    /// claim covers go through [`Self::write_verified_groups`].
    ///
    /// A group written twice keeps the last bytes; one that is the same is not written again.
    ///
    /// # Errors
    /// [`StoreError::Unaligned`], [`StoreError::AlreadyHeld`], [`StoreError::BeingRead`],
    /// [`StoreError::DiskFull`], [`StoreError::Io`]. What was not written is not readable; groups of earlier pieces of the
    /// same call may be.
    pub fn write_groups(&self, offset: u64, data: &[u8]) -> Result<Vec<GroupDigest>, StoreError> {
        self.check_bounds(offset, data.len())?;
        let digests = group_digests(offset, data);
        self.write_hashed(offset, data, &digests)?;
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
        self.check_bounds(offset, data.len())?;
        let digests = group_digests(offset, data);
        if digests != expected {
            let right = digests.iter().zip(expected).take_while(|(a, b)| a == b);
            return Err(StoreError::WrongGroup {
                offset: offset + right.count() as u64 * GROUP_SIZE,
            });
        }
        self.write_hashed(offset, data, &digests)
    }

    /// As [`Self::write_verified_groups`], of bytes in many slices, which lie one behind the other:
    /// those of a stream, as they were decrypted. Takes as much memory again as they are long, for as
    /// long as it runs: pass a few groups at a time, so that they stay in the processor's cache.
    ///
    /// # Errors
    /// As [`Self::write_verified_groups`].
    pub fn write_verified_slices(
        &self,
        offset: u64,
        slices: &[Bytes],
        expected: &[GroupDigest],
    ) -> Result<(), StoreError> {
        if let [one] = slices {
            return self.write_verified_groups(offset, one, expected);
        }
        // Over a packet's worth at a time BLAKE3 costs five times what it costs over a group. Joined for
        // that, they are also cheaper to write than by a vectored write of hundreds of parts.
        self.write_verified_groups(offset, &slices.concat(), expected)
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
        data: &[u8],
        digests: &[GroupDigest],
    ) -> Result<(), StoreError> {
        let layout = self.layout();
        let mut at = offset;
        let mut rest = (data, digests);
        while let Some(piece) = layout.piece_at(at).filter(|_| !rest.0.is_empty()) {
            let range = layout
                .piece_range(piece)
                .ok_or(StoreError::NoSuchPiece(piece))?;
            let len = (range.end() - at).min(rest.0.len() as u64);
            let (data, data_rest) = rest.0.split_at(len as usize);
            let (digests, digests_rest) = rest.1.split_at(len.div_ceil(GROUP_SIZE) as usize);
            let first = ((at - range.start()) / GROUP_SIZE) as usize;
            self.write_in_piece(piece, first, range.start(), data, digests)?;
            at += len;
            rest = (data_rest, digests_rest);
        }
        Ok(())
    }

    /// Writes groups of `piece` from `first` on. Everything that is ever written to a data file is
    /// written here: the lender's rule depends on it.
    fn write_in_piece(
        &self,
        piece: PieceIndex,
        first: usize,
        piece_start: u64,
        data: &[u8],
        digests: &[GroupDigest],
    ) -> Result<(), StoreError> {
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
            let start = (groups.start - first) * GROUP_SIZE as usize;
            let end = ((groups.end - first) * GROUP_SIZE as usize).min(data.len());
            let offset = piece_start + groups.start as u64 * GROUP_SIZE;
            let run = &data[start..end];
            self.free_of_readers(piece, offset, run.len() as u64)?;
            self.0
                .files
                .data
                .write_all_at(run, offset)
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
