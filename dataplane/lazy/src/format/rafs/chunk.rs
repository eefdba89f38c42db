//! One chunk: where it lies in the blob, where on the device, and how it is packed.

use pantala_wire::ByteRange;

use super::{BLOCK_LEN, CHUNK_LEN_MAX};
use crate::format::FormatError;
use crate::format::field::Fields;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// Not at all.
    None,
    /// A bare LZ4 block.
    Lz4,
    /// A gzip stream.
    Gzip,
    /// A zstd frame.
    Zstd,
}

impl Compressor {
    pub(super) fn from_disk(number: u32) -> Result<Self, FormatError> {
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Gzip),
            3 => Ok(Self::Zstd),
            other => Err(FormatError::Unsupported {
                what: format!("the compressor {other} of a nydus image"),
                hint: "make it with none, lz4_block or zstd",
            }),
        }
    }
}

/// How chunks are digested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digester {
    /// BLAKE3.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl Digester {
    pub(super) fn from_disk(number: u32) -> Result<Self, FormatError> {
        match number {
            0 => Ok(Self::Blake3),
            1 => Ok(Self::Sha256),
            other => Err(FormatError::Unsupported {
                what: format!("the digester {other} of a nydus image"),
                hint: "make it with blake3 or sha256",
            }),
        }
    }
}

/// What the bytes of a chunk in the blob are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// The chunk itself.
    Plain,
    /// The chunk, compressed.
    Compressed,
    /// Several chunks in one, compressed unless that would not have made it smaller.
    Batch {
        /// Where in the unpacked batch the chunk starts.
        start: u32,
        /// Length of the unpacked batch.
        len: u32,
    },
}

/// One chunk of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its bytes in the blob; those of the batch, where it is in one.
    pub packed: ByteRange,
    /// Its bytes on the device.
    pub unpacked: ByteRange,
    /// What its bytes on the device hash to.
    pub digest: [u8; 32],
    /// How it is packed.
    pub packing: Packing,
}

impl Chunk {
    /// Bytes on the device that belong to the chunk: its own and the padding up to the next.
    pub fn device_end(&self) -> u64 {
        self.unpacked.end().next_multiple_of(BLOCK_LEN)
    }

    /// Checks the chunk against the lengths of its blob.
    pub(super) fn check(&self, packed_len: u64, device_len: u64) -> Result<(), FormatError> {
        let fits = self.unpacked.start().is_multiple_of(BLOCK_LEN)
            && self.unpacked.len() <= CHUNK_LEN_MAX
            && self.unpacked.end() <= device_len
            && self.packed.len() <= 2 * CHUNK_LEN_MAX
            && self.packed.end() <= packed_len;
        let packing_fits = match self.packing {
            Packing::Plain => self.packed.len() == self.unpacked.len(),
            Packing::Compressed => true,
            Packing::Batch { start, len } => {
                u64::from(len) <= CHUNK_LEN_MAX
                    && u64::from(start) + self.unpacked.len() <= u64::from(len)
            }
        };
        match fits && packing_fits {
            true => Ok(()),
            false => Err(malformed(format!(
                "{:?} of the blob and {:?} of the device do not fit them",
                self.packed, self.unpacked
            ))),
        }
    }
}

/// An entry of the bootstrap's chunk table: the blob's number and the chunk, or in its place only what is
/// known of a chunk in a batch.
pub(super) struct TableEntry {
    pub(super) blob: u32,
    pub(super) unpacked: ByteRange,
    pub(super) digest: [u8; 32],
    /// Nothing where the blob's own table has to say it.
    pub(super) packed: Option<(ByteRange, Packing)>,
}

/// Length of an entry of the chunk table.
pub(super) const TABLE_ENTRY_LEN: u64 = 80;
const FLAG_COMPRESSED: u32 = 0x1;
const FLAG_ENCRYPTED: u32 = 0x4;
const FLAG_BATCH: u32 = 0x8;
/// A checksum stands in a reserved field; the digest says more.
const FLAG_HAS_CRC: u32 = 0x10;

impl TableEntry {
    pub(super) fn parse(fields: Fields<'_>) -> Result<Self, FormatError> {
        let flags = fields.u32(36);
        if flags & FLAG_ENCRYPTED != 0 {
            return Err(encrypted());
        }
        if flags & !(FLAG_COMPRESSED | FLAG_BATCH | FLAG_HAS_CRC) != 0 {
            return Err(malformed(format!("with unknown flags {flags:#x}")));
        }
        let packed = match flags & FLAG_BATCH {
            0 => {
                let packing = match flags & FLAG_COMPRESSED {
                    0 => Packing::Plain,
                    _ => Packing::Compressed,
                };
                Some((range(fields.u64(48), fields.u32(40))?, packing))
            }
            _ => None,
        };
        Ok(Self {
            blob: fields.u32(32),
            unpacked: range(fields.u64(56), fields.u32(44))?,
            digest: fields.bytes(0),
            packed,
        })
    }
}

pub(super) fn range(start: u64, len: u32) -> Result<ByteRange, FormatError> {
    start
        .checked_add(u64::from(len))
        .and_then(|end| ByteRange::new(start, end))
        .ok_or_else(|| malformed(format!("of {len} bytes from {start}")))
}

pub(super) fn malformed(why: impl Into<String>) -> FormatError {
    FormatError::malformed("a chunk", why)
}

pub(super) fn encrypted() -> FormatError {
    FormatError::Unsupported {
        what: "an encrypted nydus image".into(),
        hint: "make it without encryption",
    }
}
