//! The bootstrap: superblocks, blob table, chunk table, prefetch table.

use pantala_wire::{BlobDigest, ByteRange};

use super::blob_meta::BlobMeta;
use super::chunk::{Compressor, Digester, TABLE_ENTRY_LEN, TableEntry, encrypted, malformed};
use super::map::ChunkMap;
use super::{BLOCK_LEN, CHUNK_LEN_MAX, CHUNKS_MAX};
use crate::format::FormatError;
use crate::format::erofs::{Extent, Progress, RangeSet, SUPERBLOCK_END, Superblock, Walk};
use crate::format::field::{Fields, slice};

const EXTENDED_LEN: u64 = 256;
const BLOB_ENTRY_LEN: u64 = 256;
const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// "RAFS", as version 5 begins.
const V5_MAGIC: u32 = 0x5241_4653;
/// nydus' limits for the lengths of a blob.
const PACKED_LEN_MAX: u64 = 1 << 40;
const UNPACKED_LEN_MAX: u64 = 1 << 44;
/// Files that one image may name to be fetched first: more is not "first".
const PREFETCH_NODES_MAX: u64 = 1 << 20;

const FEATURE_ALIGNED: u32 = 0x1;
const FEATURE_CHUNK_V2: u32 = 0x4;
const FEATURE_ZRAN: u32 = 0x8;
const FEATURE_SEPARATE: u32 = 0x10;
const FEATURE_BATCH: u32 = 0x40;
const FEATURE_ENCRYPTED: u32 = 0x80;
/// The low half tells what a reader must know; metadata and digests in the blob do not concern us.
const FEATURE_MUST_KNOW: u32 = 0xffff;
const FEATURE_KNOWN: u32 = FEATURE_ALIGNED | 0x2 | FEATURE_CHUNK_V2 | 0x20 | FEATURE_BATCH | 0x200;

/// One blob of an image, which is one device of its mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name: the digest of the layer that it is.
    pub id: BlobDigest,
    /// Bytes of the blob that hold chunks.
    pub packed_len: u64,
    /// Length of the device.
    pub device_len: u64,
    /// How its chunks are compressed.
    pub compressor: Compressor,
    /// How they are digested.
    pub digester: Digester,
    /// How many chunks it has; an image of several layers may use fewer.
    pub chunk_count: u32,
    pub(super) has_v2_table: bool,
    pub(super) has_batches: bool,
    pub(super) meta_start: u64,
    pub(super) meta_len: u64,
    pub(super) meta_unpacked_len: u64,
    pub(super) meta_compressor: Compressor,
    needs_meta: bool,
}

impl Blob {
    /// The bytes of the blob that [`Bootstrap::chunk_maps`] needs, or nothing where the bootstrap says
    /// it all.
    pub fn meta_range(&self) -> Option<ByteRange> {
        let end = self
            .meta_start
            .checked_add(self.meta_len)?
            .checked_add(BLOCK_LEN)?;
        self.needs_meta
            .then(|| ByteRange::new(self.meta_start, end))?
    }
}

#[cfg(test)]
impl Blob {
    /// A blob with batches, whose own table is the `len` bytes from 1000.
    pub(super) fn for_test(chunk_count: u32, len: u64) -> Self {
        Self {
            id: BlobDigest::new([7; 32]),
            packed_len: 1 << 20,
            device_len: 1 << 20,
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            chunk_count,
            has_v2_table: true,
            has_batches: true,
            meta_start: 1000,
            meta_len: len,
            meta_unpacked_len: len,
            meta_compressor: Compressor::None,
            needs_meta: true,
        }
    }
}

/// A bootstrap whose tables make sense.
pub struct Bootstrap {
    superblock: Superblock,
    image_len: u64,
    blobs: Vec<Blob>,
    chunk_table: ByteRangeOrEmpty,
    prefetch_nodes: Vec<u64>,
}

type ByteRangeOrEmpty = (u64, u64);

impl Bootstrap {
    /// Reads the tables of a whole bootstrap.
    ///
    /// # Errors
    /// Where it is no RAFS v6, or makes no sense.
    pub fn parse(image: &[u8]) -> Result<Self, FormatError> {
        if Fields::of(image, "the nydus superblock", 0, 4)?.u32(0) == V5_MAGIC {
            return Err(FormatError::Unsupported {
                what: "a nydus image of version 5".into(),
                hint: "the kernel cannot mount it; convert it with `nydusify convert --fs-version 6`",
            });
        }
        const WHAT: &str = "the nydus superblock";
        let superblock = Superblock::parse(image)?;
        if superblock.feature_compat & COMPAT_RAFS_V6 == 0 {
            return Err(FormatError::malformed(WHAT, "is that of plain EROFS"));
        }
        if superblock.block_size() != BLOCK_LEN {
            return Err(FormatError::malformed(
                WHAT,
                "has another block size than 4096",
            ));
        }
        let extended = Fields::of(image, WHAT, SUPERBLOCK_END, EXTENDED_LEN)?;
        let blob_table = table(
            image,
            "the blob table",
            extended.u64(8),
            extended.u32(16).into(),
            BLOB_ENTRY_LEN,
        )?;
        let chunk_len = u64::from(extended.u32(20));
        if !chunk_len.is_power_of_two() || !(BLOCK_LEN..=CHUNK_LEN_MAX).contains(&chunk_len) {
            return Err(FormatError::malformed(
                WHAT,
                format!("has chunks of {chunk_len} bytes"),
            ));
        }
        let chunk_table = table(
            image,
            "the chunk table",
            extended.u64(24),
            extended.u64(32),
            TABLE_ENTRY_LEN,
        )?;
        let blobs = blobs(image, &superblock, blob_table, chunk_table)?;
        // An image without files may have a length here and no place.
        let prefetch_len = match extended.u64(40) {
            0 => 0,
            _ => u64::from(extended.u32(48)),
        };
        let prefetch = table(
            image,
            "the prefetch table",
            extended.u64(40),
            prefetch_len,
            4,
        )?;
        if (prefetch.1 - prefetch.0) / 4 > PREFETCH_NODES_MAX {
            return Err(FormatError::malformed(
                "the prefetch table",
                "is longer than any image's",
            ));
        }
        let nodes = slice(
            image,
            "the prefetch table",
            prefetch.0,
            prefetch.1 - prefetch.0,
        )?;
        Ok(Self {
            superblock,
            image_len: image.len() as u64,
            blobs,
            chunk_table,
            prefetch_nodes: nodes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|node| u64::from(u32::from_le_bytes(*node)))
                .collect(),
        })
    }

    /// The blobs, in the order of the mount's devices.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// The chunks of each blob, and the proof that every byte of every file is in one of them. `image` is
    /// what was parsed; `metas` has for each blob the bytes of its [`Blob::meta_range`], if it has one.
    ///
    /// # Errors
    /// Where chunks lie outside their blob or device, overlap, or leave out bytes of a file.
    pub fn chunk_maps(
        &self,
        image: &[u8],
        metas: &[Option<&[u8]>],
    ) -> Result<Vec<ChunkMap>, FormatError> {
        let mut tables: Vec<Vec<TableEntry>> = self.blobs.iter().map(|_| Vec::new()).collect();
        let bytes = slice(
            image,
            "the chunk table",
            self.chunk_table.0,
            self.chunk_table.1 - self.chunk_table.0,
        )?;
        for entry in bytes.chunks_exact(TABLE_ENTRY_LEN as usize) {
            let entry = TableEntry::parse(Fields::new(entry))?;
            let of_blob = tables
                .get_mut(entry.blob as usize)
                .ok_or_else(|| malformed(format!("of blob {}, which is not there", entry.blob)))?;
            of_blob.push(entry);
        }
        let mut maps = Vec::with_capacity(self.blobs.len());
        for (index, (blob, table)) in self.blobs.iter().zip(tables).enumerate() {
            let meta = match (blob.meta_range(), metas.get(index).copied().flatten()) {
                (None, _) => None,
                (Some(_), Some(bytes)) => Some(BlobMeta::parse(blob, bytes)?),
                (Some(range), None) => {
                    return Err(FormatError::Truncated {
                        what: "the chunk table of a blob",
                        start: range.start(),
                        len: range.len(),
                        end: 0,
                    });
                }
            };
            maps.push(ChunkMap::new(blob, table, meta)?);
        }
        self.check_files(image, &maps)?;
        Ok(maps)
    }

    /// Every byte of every file must lie in a chunk, or a reader would get zeros in its place.
    fn check_files(&self, image: &[u8], maps: &[ChunkMap]) -> Result<(), FormatError> {
        let covered: Vec<RangeSet> = maps.iter().map(ChunkMap::coverage).collect();
        let mut walk = Walk::new(&self.superblock, self.image_len)?;
        let progress = walk.resume(image, &mut |extent| {
            let is_covered = match usize::from(extent.device).checked_sub(1) {
                // Plain data in the bootstrap itself: there, or the bootstrap is cut.
                None => extent
                    .start
                    .checked_add(extent.len)
                    .is_some_and(|end| end <= self.image_len),
                Some(index) => covered.get(index).is_some_and(|set| {
                    extent
                        .start
                        .checked_add(extent.len)
                        .is_some_and(|end| set.covers(extent.start, end))
                }),
            };
            match is_covered {
                true => Ok(()),
                false => Err(FormatError::malformed(
                    "a file",
                    format!(
                        "has {} bytes at {} of device {}, where no chunk is",
                        extent.len, extent.start, extent.device
                    ),
                )),
            }
        })?;
        match progress {
            Progress::Done => Ok(()),
            // Another image than the one that was parsed, and a shorter one.
            Progress::Need(_) => Err(FormatError::malformed("the bootstrap", "is not whole")),
        }
    }

    /// What the image's maker wants fetched first: ranges of devices, each with the number of its
    /// blob from 0, in the order of the prefetch table.
    ///
    /// # Errors
    /// Where the table names what is no file.
    pub fn prefetch(&self, image: &[u8]) -> Result<Vec<(usize, ByteRange)>, FormatError> {
        let mut ranges: Vec<(usize, ByteRange)> = Vec::new();
        let mut seen = vec![RangeSet::default(); self.blobs.len()];
        let mut add = |extent: Extent| {
            let index = usize::from(extent.device).checked_sub(1);
            let end = extent.start.saturating_add(extent.len);
            if let Some(index) = index
                && let Some(range) = ByteRange::new(extent.start, end)
                && let Some(seen) = seen.get_mut(index)
                && !seen.covers(extent.start, end)
            {
                seen.insert(extent.start, end);
                match ranges.last_mut() {
                    Some((last, before)) if *last == index && before.end() == extent.start => {
                        *before = ByteRange::new(before.start(), end).unwrap_or(range);
                    }
                    _ => ranges.push((index, range)),
                }
            }
            Ok(())
        };
        for node in &self.prefetch_nodes {
            Walk::below(&self.superblock, self.image_len, *node).resume(image, &mut add)?;
        }
        Ok(ranges)
    }
}

/// Where a table lies, as start and end.
fn table(
    image: &[u8],
    what: &'static str,
    start: u64,
    len: u64,
    entry_len: u64,
) -> Result<ByteRangeOrEmpty, FormatError> {
    if len == 0 {
        return Ok((0, 0));
    }
    slice(image, what, start, len)?;
    match len % entry_len {
        0 => Ok((start, start + len)),
        _ => Err(FormatError::malformed(
            what,
            format!("has {len} bytes, no multiple of {entry_len}"),
        )),
    }
}

fn blobs(
    image: &[u8],
    superblock: &Superblock,
    table: ByteRangeOrEmpty,
    chunk_table: ByteRangeOrEmpty,
) -> Result<Vec<Blob>, FormatError> {
    const WHAT: &str = "the blob table";
    let devices = superblock.devices(image)?;
    let count = (table.1 - table.0) / BLOB_ENTRY_LEN;
    if count != devices.len() as u64 {
        return Err(FormatError::malformed(
            WHAT,
            format!("has {count} blobs, the device table {}", devices.len()),
        ));
    }
    (0..count)
        .zip(&devices)
        .map(|(index, device)| {
            let start = table.0 + index * BLOB_ENTRY_LEN;
            let fields = Fields::of(image, WHAT, start, BLOB_ENTRY_LEN)?;
            let blob = blob(fields, chunk_table)?;
            let device_len = u64::from(device.blocks) * BLOCK_LEN;
            if u64::from(fields.u32(64)) != index
                || device.tag != fields.bytes::<64>(0)
                || device.mapped_block != 0
            {
                return Err(FormatError::malformed(
                    WHAT,
                    format!("and the device table name different blobs at {index}"),
                ));
            }
            if blob.device_len != device_len {
                return Err(FormatError::malformed(
                    WHAT,
                    format!(
                        "gives blob {index} {} bytes, the device table {device_len}",
                        blob.device_len
                    ),
                ));
            }
            Ok(blob)
        })
        .collect()
}

fn blob(fields: Fields<'_>, chunk_table: ByteRangeOrEmpty) -> Result<Blob, FormatError> {
    const WHAT: &str = "the blob table";
    let wrong = |why: &str| FormatError::malformed(WHAT, why);
    let id = fields.bytes::<64>(0);
    let id = std::str::from_utf8(&id)
        .ok()
        .and_then(|hex| format!("sha256:{hex}").parse().ok())
        .ok_or_else(|| wrong("names a blob that is no digest"))?;
    let features = fields.u32(84);
    check_features(features)?;
    let (packed_len, unpacked_len) = (fields.u64(88), fields.u64(96));
    let chunk_count = fields.u32(72);
    if packed_len > PACKED_LEN_MAX || unpacked_len > UNPACKED_LEN_MAX || chunk_count > CHUNKS_MAX {
        return Err(wrong("has a blob larger than nydus makes"));
    }
    let has_batches = features & FEATURE_BATCH != 0;
    Ok(Blob {
        id,
        packed_len,
        device_len: unpacked_len.next_multiple_of(BLOCK_LEN),
        compressor: Compressor::from_disk(fields.u32(76))?,
        digester: Digester::from_disk(fields.u32(80))?,
        chunk_count,
        has_v2_table: features & FEATURE_CHUNK_V2 != 0,
        has_batches,
        meta_start: fields.u64(112),
        meta_len: fields.u64(120),
        meta_unpacked_len: fields.u64(128),
        meta_compressor: Compressor::from_disk(fields.u32(108))?,
        needs_meta: has_batches || (chunk_table.0 == chunk_table.1 && chunk_count > 0),
    })
}

fn check_features(features: u32) -> Result<(), FormatError> {
    if features & FEATURE_ENCRYPTED != 0 {
        return Err(encrypted());
    }
    if features & (FEATURE_ZRAN | FEATURE_SEPARATE) != 0 {
        return Err(FormatError::Unsupported {
            what: "a nydus image that refers to OCI layers".into(),
            hint: "convert it in full: `nydusify convert` without --oci-ref",
        });
    }
    if features & FEATURE_MUST_KNOW & !FEATURE_KNOWN != 0 {
        return Err(FormatError::Unsupported {
            what: format!("a nydus blob with features {features:#x}"),
            hint: "make it with nydus 2.x",
        });
    }
    match features & FEATURE_ALIGNED {
        0 => Err(FormatError::malformed(
            "the blob table",
            "has a blob whose chunks are not aligned",
        )),
        _ => Ok(()),
    }
}
