//! The superblock and the device table.

use crate::format::FormatError;
use crate::format::field::{Fields, slice};

/// Where the superblock starts.
const SUPERBLOCK_START: u64 = 1024;
const SUPERBLOCK_LEN: u64 = 128;
/// One past the superblock: how many bytes of an image [`Superblock::parse`] needs at least.
pub const SUPERBLOCK_END: u64 = SUPERBLOCK_START + SUPERBLOCK_LEN;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Block sizes that kernels mount: 512 bytes up to a page of the largest.
const BLOCK_SIZE_LOG2: std::ops::RangeInclusive<u8> = 9..=16;
const DEVICE_SLOT_LEN: u64 = 128;
/// Length of an inode slot: node numbers count in it.
pub(super) const NODE_LEN: u64 = 32;
/// More devices than any image has layers; the kernel's own limit is the 16-bit field.
const DEVICES_MAX: u16 = 1024;

const COMPAT_CHECKSUM: u32 = 0x1;

/// Feature bits that change how the image is read. Those that share a bit always come together.
pub(super) const INCOMPAT_CHUNKED: u32 = 0x4;
pub(super) const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
pub(super) const INCOMPAT_FRAGMENTS: u32 = 0x20;
pub(super) const INCOMPAT_XATTR_PREFIXES: u32 = 0x40;
/// Zero padding, compression configurations (big clusters), chunked files, device table (second
/// head), tail packing, fragments (deduplication), xattr prefixes. Images with 48-bit addresses or
/// compressed metadata are not walked.
const INCOMPAT_KNOWN: u32 = 0x1
    | 0x2
    | INCOMPAT_CHUNKED
    | INCOMPAT_DEVICE_TABLE
    | 0x10
    | INCOMPAT_FRAGMENTS
    | INCOMPAT_XATTR_PREFIXES;

/// One extra device of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Whatever the maker wrote there: nydus writes the blob's identifier, mkfs.erofs nothing.
    pub tag: [u8; 64],
    /// Length in blocks.
    pub blocks: u32,
    /// Where the device lies in the unified address space, in blocks; 0 where it lies nowhere.
    pub mapped_block: u32,
}

/// What the superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Bytes in a block, as a power of two.
    pub block_size_log2: u8,
    /// Blocks of the primary device.
    pub blocks: u32,
    /// Number of inodes.
    pub inodes: u64,
    /// Number of extra devices.
    pub device_count: u16,
    pub(crate) feature_compat: u32,
    pub(super) feature_incompat: u32,
    pub(super) root_node: u64,
    pub(super) meta_start: u64,
    pub(super) xattr_start: u64,
    pub(super) packed_node: u64,
    pub(super) xattr_prefix_count: u8,
    pub(super) xattr_prefix_start: u64,
    device_table_start: u64,
}

impl Superblock {
    /// Reads the superblock of an image that begins with `head`: at least [`SUPERBLOCK_END`] bytes.
    ///
    /// # Errors
    /// Where the kernel would not mount it, or the image uses what is not supported.
    pub fn parse(head: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "the EROFS superblock";
        let fields = Fields::of(head, WHAT, SUPERBLOCK_START, SUPERBLOCK_LEN)?;
        if fields.u32(0) != MAGIC {
            return Err(FormatError::malformed(WHAT, "has another magic number"));
        }
        let block_size_log2 = fields.u8(12);
        if !BLOCK_SIZE_LOG2.contains(&block_size_log2) || fields.u8(90) != 0 {
            return Err(FormatError::malformed(WHAT, "has an impossible block size"));
        }
        let feature_incompat = fields.u32(80);
        if feature_incompat & !INCOMPAT_KNOWN != 0 {
            return Err(FormatError::Unsupported {
                what: format!("an EROFS image with features {feature_incompat:#x}"),
                hint: "make it without 48-bit addresses and compressed metadata",
            });
        }
        let device_count = fields.u16(86);
        let has_devices = feature_incompat & INCOMPAT_DEVICE_TABLE != 0;
        let device_count = if has_devices { device_count } else { 0 };
        if device_count > DEVICES_MAX {
            return Err(FormatError::malformed(
                WHAT,
                format!("names {device_count} devices, more than {DEVICES_MAX}"),
            ));
        }
        let block = |at| u64::from(fields.u32(at)) << block_size_log2;
        let superblock = Self {
            block_size_log2,
            blocks: fields.u32(36),
            inodes: fields.u64(16),
            device_count,
            feature_compat: fields.u32(8),
            feature_incompat,
            root_node: u64::from(fields.u16(14)),
            meta_start: block(40),
            xattr_start: block(44),
            packed_node: fields.u64(96),
            xattr_prefix_count: fields.u8(91),
            xattr_prefix_start: u64::from(fields.u32(92)) * 4,
            device_table_start: u64::from(fields.u16(88)) * DEVICE_SLOT_LEN,
        };
        superblock.check_checksum(head, fields.u32(4))?;
        Ok(superblock)
    }

    /// The kernel's checksum covers the first block from the superblock on, with itself as zeros.
    fn check_checksum(&self, head: &[u8], expected: u32) -> Result<(), FormatError> {
        if self.feature_compat & COMPAT_CHECKSUM == 0 {
            return Ok(());
        }
        const WHAT: &str = "the EROFS superblock";
        let block = self.block_size();
        let end = if block > SUPERBLOCK_START {
            block
        } else {
            SUPERBLOCK_START + block
        };
        let covered = slice(head, WHAT, SUPERBLOCK_START, end - SUPERBLOCK_START)?;
        let sum = crc32c(
            crc32c(crc32c(u32::MAX, &covered[..4]), &[0; 4]),
            &covered[8..],
        );
        if sum != expected {
            return Err(FormatError::malformed(
                WHAT,
                format!("has the checksum {sum:#010x} and says {expected:#010x}"),
            ));
        }
        Ok(())
    }

    /// Bytes in a block.
    pub const fn block_size(&self) -> u64 {
        1 << self.block_size_log2
    }

    /// How many bytes of the image hold the superblock, its checksum's block and the device table.
    pub fn head_len(&self) -> u64 {
        let table = match self.device_count {
            0 => 0,
            count => self.device_table_start + u64::from(count) * DEVICE_SLOT_LEN,
        };
        table.max(SUPERBLOCK_START + self.block_size())
    }

    /// The extra devices, in the order in which a mount names them. `head` are the first
    /// [`Self::head_len`] bytes of the image.
    ///
    /// # Errors
    /// Where the table does not lie within `head`.
    pub fn devices(&self, head: &[u8]) -> Result<Vec<DeviceSlot>, FormatError> {
        (0..u64::from(self.device_count))
            .map(|index| {
                let start = self.device_table_start + index * DEVICE_SLOT_LEN;
                let fields = Fields::of(head, "the device table", start, DEVICE_SLOT_LEN)?;
                Ok(DeviceSlot {
                    tag: fields.bytes(0),
                    blocks: fields.u32(64),
                    mapped_block: fields.u32(68),
                })
            })
            .collect()
    }
}

/// CRC-32C without the final inversion, as the kernel's `crc32c()`.
fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        CRC32C_TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
    })
}

const CRC32C_TABLE: [u32; 256] = {
    /// Castagnoli's polynomial, bits reversed.
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_castagnoli_one() {
        // RFC 3720, B.4, without the final inversion.
        assert_eq!(!crc32c(u32::MAX, b"123456789"), 0xE306_9283);
    }
}
