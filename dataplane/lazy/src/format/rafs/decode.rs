//! From the bytes of a blob to those of a device: unpacked, and what their digest says.

use std::borrow::Cow;
use std::io::Read;

use pantala_wire::ByteRange;
use sha2::{Digest as _, Sha256};

use super::chunk::{Chunk, Compressor, Digester, Packing};

/// Why bytes of a blob are not the chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They cannot be decompressed to the length that they should have.
    #[error("it does not decompress to {len} bytes: {why}")]
    Compression {
        /// The length that it should have.
        len: usize,
        /// What the decompressor said.
        why: String,
    },
    /// They are something else.
    #[error("its digest is another than the image's")]
    Digest,
    /// The blob's bytes are fewer or more than the chunk's.
    #[error("it has {got} bytes instead of {expected}")]
    Length {
        /// Bytes given.
        got: usize,
        /// Bytes of the chunk in the blob.
        expected: u64,
    },
}

/// Decodes chunks of one blob. Keeps the batch unpacked last: its chunks are wanted one after the other.
pub struct Decoder {
    compressor: Compressor,
    digester: Digester,
    batch: Option<(ByteRange, Vec<u8>)>,
}

impl Decoder {
    /// A decoder for a blob with these algorithms.
    pub fn new(compressor: Compressor, digester: Digester) -> Self {
        Self {
            compressor,
            digester,
            batch: None,
        }
    }

    /// Turns `packed`, the bytes of `chunk` in the blob, into its verified bytes on the device.
    ///
    /// # Errors
    /// Where they are not what the digest says.
    pub fn decode<'a>(
        &'a mut self,
        chunk: &Chunk,
        packed: &'a [u8],
    ) -> Result<Cow<'a, [u8]>, DecodeError> {
        if packed.len() as u64 != chunk.packed.len() {
            return Err(DecodeError::Length {
                got: packed.len(),
                expected: chunk.packed.len(),
            });
        }
        let len = chunk.unpacked.len() as usize;
        let digester = self.digester;
        let bytes = match chunk.packing {
            Packing::Plain => Cow::Borrowed(packed),
            Packing::Compressed => Cow::Owned(unpack(packed, self.compressor, len)?),
            Packing::Batch {
                start,
                len: batch_len,
            } => {
                let batch = self.batch(chunk.packed, packed, batch_len as usize)?;
                let start = start as usize;
                let part = start.checked_add(len).and_then(|end| batch.get(start..end));
                Cow::Borrowed(part.ok_or_else(|| wrong_length(len, "it lies outside its batch"))?)
            }
        };
        if bytes.len() != len {
            return Err(wrong_length(
                len,
                "it is not compressed and has another length",
            ));
        }
        let digest: [u8; 32] = match digester {
            Digester::Blake3 => *blake3::hash(&bytes).as_bytes(),
            Digester::Sha256 => Sha256::digest(&bytes).into(),
        };
        match digest == chunk.digest {
            true => Ok(bytes),
            false => Err(DecodeError::Digest),
        }
    }

    fn batch(&mut self, place: ByteRange, packed: &[u8], len: usize) -> Result<&[u8], DecodeError> {
        if self
            .batch
            .as_ref()
            .is_none_or(|(other, bytes)| *other != place || bytes.len() != len)
        {
            // A batch that would not have become smaller is stored as it is.
            let bytes = match packed.len() == len {
                true => packed.to_vec(),
                false => unpack(packed, self.compressor, len)?,
            };
            self.batch = Some((place, bytes));
        }
        Ok(self.batch.as_ref().map_or(&[], |(_, bytes)| bytes))
    }
}

/// Decompresses `packed` to exactly `len` bytes, and never makes more of it.
pub(super) fn unpack(
    packed: &[u8],
    compressor: Compressor,
    len: usize,
) -> Result<Vec<u8>, DecodeError> {
    let fail = |why: &dyn std::fmt::Display| wrong_length(len, &why.to_string());
    let out = match compressor {
        Compressor::None => packed.to_vec(),
        Compressor::Lz4 => lz4_flex::block::decompress(packed, len).map_err(|e| fail(&e))?,
        Compressor::Zstd => zstd::bulk::decompress(packed, len).map_err(|e| fail(&e))?,
        Compressor::Gzip => {
            let mut out = Vec::new();
            // One byte more, so that a longer stream shows itself.
            flate2::bufread::GzDecoder::new(packed)
                .take(len as u64 + 1)
                .read_to_end(&mut out)
                .map_err(|e| fail(&e))?;
            out
        }
    };
    match out.len() == len {
        true => Ok(out),
        false => Err(wrong_length(len, &format!("it becomes {}", out.len()))),
    }
}

fn wrong_length(len: usize, why: &str) -> DecodeError {
    DecodeError::Compression {
        len,
        why: why.to_owned(),
    }
}
