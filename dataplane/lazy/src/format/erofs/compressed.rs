//! The index of a compressed file: how far it reaches.

use super::inode::{Inode, Layout, malformed};
use super::superblock::Superblock;
use crate::format::FormatError;
use crate::format::field::Fields;

/// Length of the map header that stands before the index.
pub(super) const MAP_HEADER_LEN: u64 = 8;
/// The whole file is a fragment: there is no index.
const CLUSTER_BITS_FRAGMENT: u8 = 0x80;
const CLUSTER_BITS: u8 = 0x0f;
const ADVISE_EXTENTS: u16 = 0x1;
const ADVISE_INLINE: u16 = 0x8;
/// An index of 8 bytes for each cluster stands behind 8 bytes kept from the first version.
const FULL_INDEX_LEN: u64 = 8;
/// A packed index takes at most 4 bytes for each cluster, in groups that start at multiples of 32.
const PACKED_INDEX_LEN_MAX: u64 = 4;
const PACKED_GROUP_LEN: u64 = 32;

/// Where the map header of `inode` starts.
pub(super) fn map_header_start(inode: &Inode) -> u64 {
    inode.end().next_multiple_of(MAP_HEADER_LEN)
}

/// One past the last byte of the index, and of the data packed behind it, at the latest.
pub(super) fn index_end(
    inode: &Inode,
    superblock: &Superblock,
    header: Fields<'_>,
) -> Result<u64, FormatError> {
    let after_header = map_header_start(inode) + MAP_HEADER_LEN;
    let cluster_bits = header.u8(7);
    if cluster_bits & CLUSTER_BITS_FRAGMENT != 0 {
        return Ok(after_header);
    }
    let advise = header.u16(4);
    let packed = inode.layout == Layout::Compressed { packed: true };
    if !packed && advise & ADVISE_EXTENTS != 0 {
        return Err(FormatError::Unsupported {
            what: "a compressed file with an extent index".into(),
            hint: "make the image without 48-bit addresses",
        });
    }
    let cluster_log2 =
        u32::from(superblock.block_size_log2) + u32::from(cluster_bits & CLUSTER_BITS);
    let clusters = inode.size.div_ceil(1 << cluster_log2);
    let index_len = match packed {
        true => clusters
            .checked_mul(PACKED_INDEX_LEN_MAX)
            .map(|len| len + 2 * PACKED_GROUP_LEN),
        false => clusters
            .checked_mul(FULL_INDEX_LEN)
            .map(|len| len + FULL_INDEX_LEN),
    };
    let inline_len = match advise & ADVISE_INLINE {
        0 => 0,
        _ => u64::from(header.u16(2)),
    };
    index_len
        .and_then(|len| after_header.checked_add(len))
        .and_then(|end| end.checked_add(inline_len))
        .ok_or_else(|| malformed(inode.start, "has an impossible size"))
}
