//! Reading a blob without a copy: its bytes, lent where they lie in the page cache.

use std::sync::Arc;

use bytes::Bytes;
use pantala_wire::{ByteRange, PieceIndex};

use crate::blob::Blob;
use crate::error::StoreError;
use crate::map::lend::{Lender, Loan};

impl Blob {
    /// The bytes of `range`, mapped and not copied where that can be done; `None` where a part of it is
    /// not readable. Verifies pieces as [`Self::read_at`] does, and returns with the pages in memory.
    ///
    /// The bytes never change while the `Bytes` or a clone of it lives, whatever happens to the blob
    /// meanwhile: a piece that is dropped and fetched again is written elsewhere than under them, a blob
    /// may be closed or evicted (its disk space is free once they are dropped). They are memory of the
    /// page cache that the kernel may take back and read again, so that the disk can be waited for, and a
    /// sector that goes bad in between ends the process: do not keep them for long. Do not hand them to
    /// operations that keep pages beyond the call (`vmsplice`, zero-copy sends). A range that crosses a
    /// multiple of 64 MiB is copied: none within a piece does.
    ///
    /// Dropping the last of them never touches the disk, but for a blob that was evicted or closed
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn slice(&self, range: ByteRange) -> Result<Option<Bytes>, StoreError> {
        if range.end() > self.layout().blob_size() {
            return Ok(None);
        }
        let lender = self.lender(range);
        let loan = loop {
            let state = self.0.state.lock();
            if state.readable_to(range.start(), range.end()) < range.end() {
                return Ok(None);
            }
            let mut pieces = self.layout().pieces_of(range).map(PieceIndex);
            if let Some(piece) = pieces.find(|piece| state.unverified.contains(*piece)) {
                drop(state);
                self.verify_piece(piece)?;
                continue;
            }
            break lender.and_then(|lender| lender.lend(&state, range));
        };
        if let Some(bytes) = loan.and_then(|loan| self.mapped(loan)) {
            return Ok(Some(bytes));
        }
        let mut bytes = vec![0; range.len() as usize];
        let read = self.read_at(range.start(), &mut bytes)?;
        Ok((read == bytes.len()).then(|| bytes.into()))
    }

    /// The bytes of a held piece, verified or not, where they can be mapped.
    pub(crate) fn map_piece(&self, piece: PieceIndex) -> Option<Bytes> {
        let range = self.layout().piece_range(piece)?;
        let lender = self.lender(range)?;
        let loan = lender.lend(&self.0.state.lock(), range)?;
        self.mapped(loan)
    }

    fn mapped(&self, loan: Loan) -> Option<Bytes> {
        // A kernel that cannot populate, or a disk that cannot read: reading will tell which.
        loan.into_bytes()
            .inspect_err(|error| {
                tracing::debug!(blob = %self.digest(), %error, "bytes are copied, not mapped");
            })
            .ok()
    }

    fn lender(&self, range: ByteRange) -> Option<Arc<Lender>> {
        let data = &self.0.files.data;
        self.0
            .lending
            .lender(range, |window| data.map_data(window))
            .unwrap_or_else(|error| {
                tracing::debug!(blob = %self.digest(), %error, "a part of the blob is not mapped");
                None
            })
    }
}
