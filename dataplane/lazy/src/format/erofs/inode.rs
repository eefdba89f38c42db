//! One inode: what follows it, and where its data lies.

use super::superblock::Superblock;
use crate::format::FormatError;
use crate::format::field::Fields;

const COMPACT_LEN: u64 = 32;
const EXTENDED_LEN: u64 = 64;
/// Version and data layout; the bits above are links and dots, which change no position.
const FORMAT_KNOWN: u16 = 0x3f;
const XATTR_HEADER_LEN: u64 = 12;
const XATTR_WORD_LEN: u64 = 4;

const MODE_TYPE: u16 = 0o170_000;
const MODE_DIRECTORY: u16 = 0o040_000;
const MODE_REGULAR: u16 = 0o100_000;
const MODE_SYMLINK: u16 = 0o120_000;

/// How an inode keeps its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Whole blocks at an address; the tail, if `inline`, right after the inode.
    Flat { inline: bool },
    /// Clusters with an index after the inode, 8 bytes each or packed.
    Compressed { packed: bool },
    /// Chunks with an index after the inode.
    Chunked,
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Regular,
    Symlink,
    /// A device, pipe or socket: it has no data.
    Special,
}

/// The fixed part of an inode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    /// Where it starts in the image.
    pub(super) start: u64,
    /// Length of the fixed part.
    pub(super) len: u64,
    pub(super) kind: Kind,
    pub(super) layout: Layout,
    /// Length of its data.
    pub(super) size: u64,
    /// Block address or chunk format.
    pub(super) union: u32,
    xattr_count: u16,
}

/// Bytes of the fixed part that tell its length; both forms have as many.
pub(super) const INODE_LEN_MIN: u64 = COMPACT_LEN;

/// Length of the fixed part that begins with `head`.
pub(super) fn inode_len(head: Fields<'_>) -> u64 {
    match head.u16(0) & 1 {
        0 => COMPACT_LEN,
        _ => EXTENDED_LEN,
    }
}

impl Inode {
    /// Reads the fixed part at `start`.
    pub(super) fn parse(fields: Fields<'_>, start: u64) -> Result<Self, FormatError> {
        let format = fields.u16(0);
        if format & !FORMAT_KNOWN != 0 {
            return Err(malformed(
                start,
                format!("has the unknown format {format:#x}"),
            ));
        }
        let layout = match (format >> 1) & 7 {
            0 => Layout::Flat { inline: false },
            1 => Layout::Compressed { packed: false },
            2 => Layout::Flat { inline: true },
            3 => Layout::Compressed { packed: true },
            4 => Layout::Chunked,
            other => {
                return Err(malformed(
                    start,
                    format!("has the unknown data layout {other}"),
                ));
            }
        };
        let len = inode_len(fields);
        let kind = match fields.u16(4) & MODE_TYPE {
            MODE_DIRECTORY => Kind::Directory,
            MODE_REGULAR => Kind::Regular,
            MODE_SYMLINK => Kind::Symlink,
            _ => Kind::Special,
        };
        let size = match len {
            COMPACT_LEN => u64::from(fields.u32(8)),
            _ => fields.u64(8),
        };
        if size > i64::MAX as u64 {
            return Err(malformed(start, "has an impossible size"));
        }
        Ok(Self {
            start,
            len,
            kind,
            layout,
            size: if kind == Kind::Special { 0 } else { size },
            union: fields.u32(16),
            xattr_count: fields.u16(2),
        })
    }

    /// Length of the extended attributes right after the fixed part.
    pub(super) fn xattr_len(&self) -> u64 {
        match self.xattr_count {
            0 => 0,
            count => XATTR_HEADER_LEN + (u64::from(count) - 1) * XATTR_WORD_LEN,
        }
    }

    /// Where the extended attributes end and what the layout needs begins.
    pub(super) fn end(&self) -> u64 {
        self.start + self.len + self.xattr_len()
    }

    /// Bytes of flat data that lie in whole blocks at [`Self::flat_start`], and those in the tail
    /// behind the inode.
    pub(super) fn flat_parts(&self, superblock: &Superblock) -> (u64, u64) {
        match self.layout {
            Layout::Flat { inline: true } => {
                let tail = self.size % superblock.block_size();
                (self.size - tail, tail)
            }
            _ => (self.size, 0),
        }
    }

    pub(super) fn flat_start(&self, superblock: &Superblock) -> u64 {
        u64::from(self.union) << superblock.block_size_log2
    }
}

/// The shared attributes that an inode names: places in the shared area. `area` is the inode's own
/// attribute area.
pub(super) fn shared_xattrs(area: Fields<'_>, len: u64) -> impl Iterator<Item = u64> + '_ {
    let count = u64::from(area.u8(4)).min(len.saturating_sub(XATTR_HEADER_LEN) / XATTR_WORD_LEN);
    (0..count).map(move |index| {
        let at = XATTR_HEADER_LEN + index * XATTR_WORD_LEN;
        u64::from(area.u32(at as usize)) * XATTR_WORD_LEN
    })
}

/// Length of the head of a shared attribute.
pub(super) const XATTR_ENTRY_LEN: u64 = 4;

/// Length of the shared attribute with this head.
pub(super) fn xattr_entry_len(head: Fields<'_>) -> u64 {
    XATTR_ENTRY_LEN + u64::from(head.u8(0)) + u64::from(head.u16(2))
}

pub(super) fn malformed(start: u64, why: impl std::fmt::Display) -> FormatError {
    FormatError::malformed("an inode", format!("at byte {start} {why}"))
}
