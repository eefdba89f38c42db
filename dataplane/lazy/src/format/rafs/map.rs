//! From ranges of a device to chunks of its blob.

use std::collections::HashMap;

use pantala_wire::ByteRange;

use super::CHUNKS_MAX;
use super::blob_meta::BlobMeta;
use super::bootstrap::Blob;
use super::chunk::{Chunk, Compressor, Digester, TableEntry, malformed};
use crate::format::FormatError;
use crate::format::erofs::RangeSet;

/// The chunks of one blob, in the order in which they lie on the device. They do not overlap; between
/// them there may be bytes that no file has.
#[derive(Debug)]
pub struct ChunkMap {
    chunks: Vec<Chunk>,
    device_len: u64,
    compressor: Compressor,
    digester: Digester,
}

impl ChunkMap {
    pub(super) fn new(
        blob: &Blob,
        table: Vec<TableEntry>,
        meta: Option<BlobMeta>,
    ) -> Result<Self, FormatError> {
        let mut chunks = match meta {
            None => table
                .into_iter()
                .map(from_table)
                .collect::<Result<Vec<_>, _>>()?,
            Some(meta) => from_meta(table, meta)?,
        };
        if chunks.len() > CHUNKS_MAX as usize {
            return Err(malformed("too many: more than nydus makes"));
        }
        chunks.sort_by_key(|chunk| chunk.unpacked.start());
        // A chunk that two files share may stand in the table twice.
        chunks.dedup();
        for chunk in &chunks {
            chunk.check(blob.packed_len, blob.device_len)?;
        }
        if let Some(pair) = chunks
            .windows(2)
            .find(|pair| pair[0].device_end() > pair[1].unpacked.start())
        {
            return Err(malformed(format!(
                "{:?} of a device overlaps another at {:?}",
                pair[0].unpacked, pair[1].unpacked
            )));
        }
        Ok(Self {
            chunks,
            device_len: blob.device_len,
            compressor: blob.compressor,
            digester: blob.digester,
        })
    }

    /// All chunks.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Length of the device.
    pub fn device_len(&self) -> u64 {
        self.device_len
    }

    /// How the chunks are compressed.
    pub fn compressor(&self) -> Compressor {
        self.compressor
    }

    /// How they are digested.
    pub fn digester(&self) -> Digester {
        self.digester
    }

    /// The numbers of the chunks that `range` of the device touches.
    pub fn chunks_of(&self, range: ByteRange) -> std::ops::Range<usize> {
        let first = self
            .chunks
            .partition_point(|chunk| chunk.unpacked.end() <= range.start());
        let end = self
            .chunks
            .partition_point(|chunk| chunk.unpacked.start() < range.end());
        first..end.max(first)
    }

    /// A name for exactly this map: what was filled with another is worth nothing.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.device_len.to_le_bytes());
        hasher.update(&[self.digester as u8]);
        for chunk in &self.chunks {
            hasher.update(&chunk.unpacked.start().to_le_bytes());
            hasher.update(&chunk.unpacked.end().to_le_bytes());
            hasher.update(&chunk.digest);
        }
        *hasher.finalize().as_bytes()
    }

    /// The bytes of the device that are in chunks, or are the padding behind one.
    pub(super) fn coverage(&self) -> RangeSet {
        let mut covered = RangeSet::default();
        for chunk in &self.chunks {
            covered.insert(chunk.unpacked.start(), chunk.device_end());
        }
        covered
    }
}

fn from_table(entry: TableEntry) -> Result<Chunk, FormatError> {
    let (packed, packing) = entry
        .packed
        .ok_or_else(|| malformed("in a batch of a blob that has none"))?;
    Ok(Chunk {
        packed,
        unpacked: entry.unpacked,
        digest: entry.digest,
        packing,
    })
}

/// Places from the blob's table, digests from the bootstrap's. A chunk without a digest could not be
/// verified, so it is left out, and an image that has a file in it is refused.
fn from_meta(table: Vec<TableEntry>, meta: BlobMeta) -> Result<Vec<Chunk>, FormatError> {
    let digests: HashMap<ByteRange, [u8; 32]> = table
        .into_iter()
        .map(|entry| (entry.unpacked, entry.digest))
        .collect();
    if digests.is_empty() && !meta.places.is_empty() {
        return Err(FormatError::Unsupported {
            what: "a nydus image without chunk digests in its bootstrap".into(),
            hint: "convert it again with nydus 2.2 or later",
        });
    }
    let chunks = meta.places.into_iter().filter_map(|place| {
        Some(Chunk {
            digest: *digests.get(&place.unpacked)?,
            packed: place.packed,
            unpacked: place.unpacked,
            packing: place.packing,
        })
    });
    Ok(chunks.collect())
}
