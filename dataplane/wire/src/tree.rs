//! Digests of groups and pieces, as parts of the blob's BLAKE3 tree.
//!
//! A group's digest is the chaining value of its 64 KiB subtree, a piece's that of its own, larger
//! subtree, so the digests of the groups of a piece merge into the piece's, and those of the pieces
//! into the BLAKE3 hash of the blob (BLAKE3 specification, sections 2.1 and 2.6).
//!
//! A blob of a single piece, or group, is treated like any other: its piece digest is the chaining
//! value that its tree would have as part of a larger one. That keeps one rule for all pieces.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root};

use crate::layout::{GROUP_SIZE, PieceLayout};
use crate::{PieceIndex, id::IdError};

/// The chaining value of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupDigest(pub ChainingValue);

/// The chaining value of a piece.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PieceDigest(pub ChainingValue);

impl std::fmt::Debug for PieceDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl TryFrom<&[u8]> for PieceDigest {
    type Error = IdError;
    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| IdError::Length(bytes.len()))
    }
}

/// The digest of the group that starts at byte `offset` of the blob and consists of `data`.
///
/// # Panics
/// If `offset` is no multiple of [`GROUP_SIZE`] or `data` is empty or longer than a group: the
/// caller cuts groups, and a wrong cut would make a digest that means nothing.
pub fn group_digest(offset: u64, data: &[u8]) -> GroupDigest {
    assert!(offset.is_multiple_of(GROUP_SIZE), "group at {offset}");
    assert!(!data.is_empty() && data.len() as u64 <= GROUP_SIZE);
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(data);
    GroupDigest(hasher.finalize_non_root())
}

/// The digests of the groups of `data`, which starts at byte `offset` of the blob.
///
/// # Panics
/// As [`group_digest`], but for the length of `data`, which may be any but zero.
pub fn group_digests(offset: u64, data: &[u8]) -> Vec<GroupDigest> {
    data.chunks(GROUP_SIZE as usize)
        .enumerate()
        .map(|(index, group)| group_digest(offset + index as u64 * GROUP_SIZE, group))
        .collect()
}

/// The digest of the piece whose groups have these digests; `None` for no group.
pub fn piece_digest(groups: &[GroupDigest]) -> Option<PieceDigest> {
    match groups {
        [] => None,
        [one] => Some(PieceDigest(one.0)),
        _ => {
            // The left subtree is the largest power of two of groups that leaves some on the right.
            let left_count = groups.len().next_power_of_two() / 2;
            let (left, right) = groups.split_at(left_count);
            let left = piece_digest(left)?;
            let right = piece_digest(right)?;
            Some(PieceDigest(merge_subtrees_non_root(
                &left.0,
                &right.0,
                Mode::Hash,
            )))
        }
    }
}

/// Group digests received with a piece do not fit it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The wrong number of bytes of digests.
    #[error("piece {piece}: {got} bytes of group digests where {expected} belong")]
    Length {
        /// The piece.
        piece: PieceIndex,
        /// Bytes received.
        got: usize,
        /// Bytes that its groups need.
        expected: usize,
    },
    /// They do not merge into the piece's digest.
    #[error("piece {0}: its group digests do not merge into its digest")]
    Mismatch(PieceIndex),
}

/// Reads the concatenated group digests of `piece` and checks that they merge into `expected`.
///
/// # Errors
/// [`TreeError`] where their number or their merge is wrong.
pub fn check_group_digests(
    layout: &PieceLayout,
    piece: PieceIndex,
    bytes: &[u8],
    expected: &PieceDigest,
) -> Result<Vec<GroupDigest>, TreeError> {
    let length = layout.groups_in(piece) as usize * 32;
    if bytes.len() != length || length == 0 {
        return Err(TreeError::Length {
            piece,
            got: bytes.len(),
            expected: length,
        });
    }
    let groups: Vec<GroupDigest> = bytes
        .as_chunks::<32>()
        .0
        .iter()
        .map(|chunk| GroupDigest(*chunk))
        .collect();
    if piece_digest(&groups).as_ref() == Some(expected) {
        Ok(groups)
    } else {
        Err(TreeError::Mismatch(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blake3::hazmat::merge_subtrees_root;

    fn data(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    #[test]
    fn pieces_merge_into_the_blake3_hash_of_the_blob() {
        let layout = PieceLayout::new((3 << 20) + 12345).unwrap();
        let blob = data(layout.blob_size() as usize);
        let pieces: Vec<PieceDigest> = (0..layout.piece_count())
            .map(|index| {
                let range = layout.piece_range(PieceIndex(index)).unwrap();
                let bytes = &blob[range.start() as usize..range.end() as usize];
                piece_digest(&group_digests(range.start(), bytes)).unwrap()
            })
            .collect();
        let merge =
            |a: &PieceDigest, b: &PieceDigest| merge_subtrees_non_root(&a.0, &b.0, Mode::Hash);
        let left = merge(&pieces[0], &pieces[1]);
        let right = merge(&pieces[2], &pieces[3]);
        assert_eq!(
            merge_subtrees_root(&left, &right, Mode::Hash),
            blake3::hash(&blob)
        );
    }

    #[test]
    fn one_flipped_bit_and_one_missing_digest_are_found() {
        let layout = PieceLayout::new(5 * GROUP_SIZE + 7).unwrap();
        let blob = data(layout.blob_size() as usize);
        let groups = group_digests(0, &blob);
        let digest = piece_digest(&groups).unwrap();
        let mut bytes: Vec<u8> = groups.iter().flat_map(|g| g.0).collect();
        let piece = PieceIndex(0);
        assert!(check_group_digests(&layout, piece, &bytes, &digest).is_ok());
        assert!(check_group_digests(&layout, piece, &bytes[32..], &digest).is_err());
        assert!(check_group_digests(&layout, PieceIndex(1), &[], &digest).is_err());
        bytes[33] ^= 1;
        assert_eq!(
            check_group_digests(&layout, piece, &bytes, &digest),
            Err(TreeError::Mismatch(piece))
        );
        assert_ne!(
            group_digest(0, &blob[..7]),
            group_digest(GROUP_SIZE, &blob[..7])
        );
    }
}
