//! How a blob is cut: pieces, the unit of exchange, and groups, the unit of verification.

use crate::id::{ByteRange, PieceIndex};

/// Bytes in a group: the smallest unit that can be verified on its own.
pub const GROUP_SIZE: u64 = 64 * 1024;
/// Bytes in a piece of all but huge blobs.
pub const PIECE_SIZE_MIN: u64 = 1024 * 1024;
/// Bytes in a piece of the largest blobs.
pub const PIECE_SIZE_MAX: u64 = 64 * 1024 * 1024;
/// Pieces that a blob is cut into before its pieces grow: bounds bitmaps, metadata and messages.
pub const PIECE_COUNT_TARGET: u64 = 16 * 1024;
/// Largest blob handled, 1 TiB: `PIECE_COUNT_TARGET` pieces of `PIECE_SIZE_MAX`.
pub const BLOB_SIZE_MAX: u64 = PIECE_COUNT_TARGET * PIECE_SIZE_MAX;

/// A blob that cannot be laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Larger than [`BLOB_SIZE_MAX`].
    #[error("a blob of {0} bytes is larger than the {BLOB_SIZE_MAX} bytes handled")]
    TooLarge(u64),
}

/// The cut of one blob, a function of its size alone, so that all nodes agree on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceLayout {
    blob_size: u64,
    piece_size_log2: u32,
}

impl PieceLayout {
    /// The layout of a blob of `blob_size` bytes.
    ///
    /// # Errors
    /// [`LayoutError::TooLarge`] above [`BLOB_SIZE_MAX`].
    pub fn new(blob_size: u64) -> Result<Self, LayoutError> {
        if blob_size > BLOB_SIZE_MAX {
            return Err(LayoutError::TooLarge(blob_size));
        }
        let piece_size = blob_size
            .div_ceil(PIECE_COUNT_TARGET)
            .next_power_of_two()
            .max(PIECE_SIZE_MIN);
        Ok(Self {
            blob_size,
            piece_size_log2: piece_size.trailing_zeros(),
        })
    }

    /// Bytes of the blob.
    pub const fn blob_size(&self) -> u64 {
        self.blob_size
    }
    /// Bytes of every piece but the last.
    pub const fn piece_size(&self) -> u64 {
        1 << self.piece_size_log2
    }
    /// Log2 of [`Self::piece_size`].
    pub const fn piece_size_log2(&self) -> u32 {
        self.piece_size_log2
    }
    /// Number of pieces; 0 for an empty blob.
    pub const fn piece_count(&self) -> u32 {
        self.blob_size.div_ceil(self.piece_size()) as u32
    }
    /// Groups in every piece but the last.
    pub const fn groups_per_piece(&self) -> u32 {
        (self.piece_size() / GROUP_SIZE) as u32
    }
    /// Number of groups in the whole blob.
    pub const fn group_count(&self) -> u64 {
        self.blob_size.div_ceil(GROUP_SIZE)
    }
    /// The bytes of `piece`, or `None` where the blob has no such piece.
    pub fn piece_range(&self, piece: PieceIndex) -> Option<ByteRange> {
        let start = u64::from(piece.0) << self.piece_size_log2;
        ByteRange::new(start, (start + self.piece_size()).min(self.blob_size))
    }
    /// Number of groups in `piece`; 0 where the blob has no such piece.
    pub fn groups_in(&self, piece: PieceIndex) -> u32 {
        self.piece_range(piece)
            .map_or(0, |range| range.len().div_ceil(GROUP_SIZE) as u32)
    }
    /// The piece that holds the byte at `offset`, or `None` past the end.
    pub fn piece_at(&self, offset: u64) -> Option<PieceIndex> {
        (offset < self.blob_size).then(|| PieceIndex((offset >> self.piece_size_log2) as u32))
    }
    /// The pieces that `range` touches, as first and one past the last; clipped to the blob.
    pub fn pieces_of(&self, range: ByteRange) -> std::ops::Range<u32> {
        let end = range.end().min(self.blob_size);
        let first = (range.start() >> self.piece_size_log2).min(u64::from(self.piece_count()));
        let last = end.div_ceil(self.piece_size());
        first as u32..(last as u32).max(first as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_blob_exactly_at_every_size_near_a_boundary() {
        for base in [0, GROUP_SIZE, PIECE_SIZE_MIN, 3 * PIECE_SIZE_MIN, 17 << 30] {
            for size in base.saturating_sub(1)..=base + 1 {
                let layout = PieceLayout::new(size).unwrap();
                let mut at = 0;
                for piece in 0..layout.piece_count() {
                    let range = layout.piece_range(PieceIndex(piece)).unwrap();
                    assert_eq!(range.start(), at);
                    at = range.end();
                }
                assert_eq!(at, size);
                assert!(
                    layout
                        .piece_range(PieceIndex(layout.piece_count()))
                        .is_none()
                );
                assert!(u64::from(layout.piece_count()) <= PIECE_COUNT_TARGET);
            }
        }
        assert!(PieceLayout::new(BLOB_SIZE_MAX + 1).is_err());
    }

    #[test]
    fn a_range_touches_the_pieces_of_its_first_and_last_byte() {
        let layout = PieceLayout::new(10 * PIECE_SIZE_MIN + 5).unwrap();
        let touch = |a, b| layout.pieces_of(ByteRange::new(a, b).unwrap());
        assert_eq!(touch(0, 1), 0..1);
        assert_eq!(touch(PIECE_SIZE_MIN - 1, PIECE_SIZE_MIN + 1), 0..2);
        assert_eq!(touch(10 * PIECE_SIZE_MIN, u64::MAX), 10..11);
        assert_eq!(touch(u64::MAX - 1, u64::MAX), 11..11);
    }
}
