//! The chunk table at a blob's end, "blob.meta": for batches, and where the bootstrap has none.

use pantala_wire::ByteRange;

use super::bootstrap::Blob;
use super::chunk::{Compressor, Packing, encrypted, malformed, range};
use super::decode::unpack;
use super::{BLOCK_LEN, CHUNKS_MAX};
use crate::format::FormatError;
use crate::format::field::{Fields, slice};

const WHAT: &str = "the chunk table of a blob";
const MAGIC: u32 = 0xb10b_b10b;
const V1_LEN: u64 = 16;
const V2_LEN: u64 = 24;
const BATCH_LEN: u64 = 40;
/// The longest table: that of the most chunks, each in a batch of its own.
const TABLE_LEN_MAX: u64 = CHUNKS_MAX as u64 * (V2_LEN + BATCH_LEN);

const V2_COMPRESSED: u64 = 0x1;
const V2_BATCH: u64 = 0x4;
const V2_ENCRYPTED: u64 = 0x8;
const V2_HAS_CRC: u64 = 0x10;

/// Where a chunk lies; its digest stands in the bootstrap.
pub(super) struct Place {
    pub(super) unpacked: ByteRange,
    pub(super) packed: ByteRange,
    pub(super) packing: Packing,
}

/// The chunks of a blob as its own table has them.
pub(super) struct BlobMeta {
    pub(super) places: Vec<Place>,
}

impl BlobMeta {
    /// Reads the bytes of the blob's `meta_range`: the table, and a header behind it.
    pub(super) fn parse(blob: &Blob, bytes: &[u8]) -> Result<Self, FormatError> {
        let header = Fields::of(bytes, WHAT, blob.meta_len, BLOCK_LEN)?;
        let said = |at| header.u64(at);
        let fits = header.u32(0) == MAGIC
            && header.u32(BLOCK_LEN as usize - 4) == MAGIC
            && header.u32(12) == blob.chunk_count
            && said(16) == blob.meta_start
            && said(24) == blob.meta_len
            && said(32) == blob.meta_unpacked_len
            && Compressor::from_disk(header.u32(8))? == blob.meta_compressor;
        if !fits {
            return Err(FormatError::malformed(
                WHAT,
                "has a header that does not fit the bootstrap",
            ));
        }
        if blob.meta_unpacked_len > TABLE_LEN_MAX {
            return Err(FormatError::malformed(WHAT, "is longer than any blob's"));
        }
        let packed = slice(bytes, WHAT, 0, blob.meta_len)?;
        let table = unpack(
            packed,
            blob.meta_compressor,
            blob.meta_unpacked_len as usize,
        )
        .map_err(|error| FormatError::malformed(WHAT, error.to_string()))?;
        let entry_len = if blob.has_v2_table { V2_LEN } else { V1_LEN };
        let batches = match blob.has_batches {
            true => {
                let len = u64::from(header.u32(56)) * BATCH_LEN;
                let start = u64::from(blob.chunk_count) * entry_len;
                slice(&table, WHAT, start, len)?
            }
            false => &[],
        };
        let entries = slice(&table, WHAT, 0, u64::from(blob.chunk_count) * entry_len)?;
        let places = entries
            .chunks_exact(entry_len as usize)
            .map(|entry| match blob.has_v2_table {
                true => v2(Fields::new(entry), batches),
                false => v1(Fields::new(entry)),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { places })
    }
}

/// Two words: a length less one in 20 high and 4 middle bits each, and the offsets between them.
fn v1(entry: Fields<'_>) -> Result<Place, FormatError> {
    let (unpacked, packed) = (entry.u64(0), entry.u64(8));
    let unpacked_len = ((unpacked & 0xf00) << 12 | unpacked >> 44) as u32 + 1;
    let packed_len = ((packed & 0xf00_0000_0000) >> 20 | packed >> 44) as u32 + 1;
    Ok(Place {
        unpacked: range(unpacked & 0xfff_ffff_f000, unpacked_len)?,
        packed: range(packed & 0xff_ffff_ffff, packed_len)?,
        packing: match packed_len == unpacked_len {
            true => Packing::Plain,
            false => Packing::Compressed,
        },
    })
}

/// Flags, a length less one and a block; a length and an offset; for batches, which one and where in it.
fn v2(entry: Fields<'_>, batches: &[u8]) -> Result<Place, FormatError> {
    let (unpacked, packed, data) = (entry.u64(0), entry.u64(8), entry.u64(16));
    let flags = unpacked >> 56;
    if flags & V2_ENCRYPTED != 0 {
        return Err(encrypted());
    }
    if flags & !(V2_COMPRESSED | V2_BATCH | V2_HAS_CRC) != 0 {
        return Err(malformed(format!("with unknown flags {flags:#x}")));
    }
    let unpacked_len = ((unpacked >> 32) & 0xff_ffff) as u32 + 1;
    let packed_start = packed & 0xff_ffff_ffff;
    let (packed, packing) = match flags {
        flags if flags & V2_BATCH != 0 => {
            let batch = Fields::of(batches, WHAT, (data >> 32) * BATCH_LEN, BATCH_LEN)?;
            let packing = Packing::Batch {
                start: data as u32,
                len: batch.u32(4),
            };
            (range(packed_start, batch.u32(0))?, packing)
        }
        flags => {
            let packing = match flags & V2_COMPRESSED {
                0 => Packing::Plain,
                _ => Packing::Compressed,
            };
            (range(packed_start, (packed >> 40) as u32)?, packing)
        }
    };
    Ok(Place {
        unpacked: range((unpacked & 0xffff_ffff) << 12, unpacked_len)?,
        packed,
        packing,
    })
}

#[cfg(test)]
mod tests {
    use super::super::chunk::{Chunk, Digester};
    use super::super::decode::Decoder;
    use super::*;

    /// A table as nydus' `BatchContextGenerator` writes it: two chunks in one batch, one by itself.
    fn table() -> Vec<u8> {
        let entry = |unpacked: u64, len: u64, flags: u64, packed: u64, data: u64| {
            [flags << 56 | (len - 1) << 32 | unpacked >> 12, packed, data]
                .map(u64::to_le_bytes)
                .concat()
        };
        let mut table = entry(0, 10, V2_COMPRESSED | V2_BATCH, 100, 0);
        table.extend(entry(4096, 20, V2_COMPRESSED | V2_BATCH, 100, 10));
        table.extend(entry(8192, 5000, 0, 5000 << 40 | 500, 0));
        table.extend([40_u32, 30].map(u32::to_le_bytes).concat());
        table.resize(table.len() + 32, 0);
        table
    }

    fn blob(table: &[u8]) -> Blob {
        Blob::for_test(3, table.len() as u64)
    }

    fn with_header(blob: &Blob, table: &[u8], batches: u32) -> Vec<u8> {
        let mut bytes = table.to_vec();
        let start = bytes.len();
        bytes.resize(start + BLOCK_LEN as usize, 0);
        let mut put = |at: usize, field: &[u8]| {
            bytes[start + at..start + at + field.len()].copy_from_slice(field);
        };
        put(0, &MAGIC.to_le_bytes());
        put(12, &blob.chunk_count.to_le_bytes());
        put(16, &blob.meta_start.to_le_bytes());
        put(24, &blob.meta_len.to_le_bytes());
        put(32, &blob.meta_unpacked_len.to_le_bytes());
        put(56, &batches.to_le_bytes());
        put(BLOCK_LEN as usize - 4, &MAGIC.to_le_bytes());
        bytes
    }

    #[test]
    fn chunks_in_a_batch_are_cut_out_of_it() {
        let table = table();
        let blob = blob(&table);
        let places = BlobMeta::parse(&blob, &with_header(&blob, &table, 1))
            .unwrap()
            .places;
        assert_eq!(places[0].packed, ByteRange::new(100, 140).unwrap());
        assert_eq!(places[1].packed, places[0].packed);
        assert_eq!(places[1].packing, Packing::Batch { start: 10, len: 30 });
        assert_eq!(places[2].packed, ByteRange::new(500, 5500).unwrap());
        assert_eq!(places[2].packing, Packing::Plain);
        let content: Vec<u8> = (0..30).collect();
        let packed = zstd::bulk::compress(&content, 1).unwrap();
        let chunk = |place: &Place, content: &[u8]| Chunk {
            packed: ByteRange::new(100, 100 + packed.len() as u64).unwrap(),
            unpacked: place.unpacked,
            digest: *blake3::hash(content).as_bytes(),
            packing: place.packing,
        };
        let mut decoder = Decoder::new(Compressor::Zstd, Digester::Blake3);
        let second = chunk(&places[1], &content[10..]);
        assert_eq!(decoder.decode(&second, &packed).unwrap()[..], content[10..]);
        let first = chunk(&places[0], &content[..10]);
        assert_eq!(decoder.decode(&first, &packed).unwrap()[..], content[..10]);
        let wrong = chunk(&places[0], &content[1..11]);
        decoder.decode(&wrong, &packed).unwrap_err();
    }

    #[test]
    fn a_table_that_lies_is_an_error() {
        let table = table();
        let blob = blob(&table);
        let good = with_header(&blob, &table, 1);
        BlobMeta::parse(&blob, &with_header(&blob, &table, 2))
            .err()
            .unwrap();
        BlobMeta::parse(&blob, &with_header(&blob, &table, 0))
            .err()
            .unwrap();
        BlobMeta::parse(&blob, &good[..good.len() - 1])
            .err()
            .unwrap();
        for at in 0..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                // A place may be wrong: the chunk map checks it. It must not be a panic.
                let _ = BlobMeta::parse(&blob, &bytes);
            }
        }
    }
}
