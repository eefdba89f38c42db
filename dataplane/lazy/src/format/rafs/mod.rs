//! nydus images, RAFS v6: a *bootstrap* that the kernel mounts as EROFS, and *blobs* of compressed chunks.
//!
//! Each blob of the bootstrap is one device of the mount. The device holds the chunks uncompressed, each at a
//! multiple of the block size; the blob holds them compressed, one behind the other. A [`ChunkMap`]
//! turns ranges of the one into ranges of the other. [`device::RafsDevice`] fills the one from the
//! other.
//!
//! Use: [`Bootstrap::parse`]; fetch [`Blob::meta_range`] of each blob that has one;
//! [`Bootstrap::chunk_maps`].

mod blob_meta;
mod bootstrap;
mod chunk;
mod decode;
pub mod device;
mod map;
mod record;

pub use bootstrap::{Blob, Bootstrap};
pub use chunk::{Chunk, Compressor, Digester, Packing};
pub use decode::{DecodeError, Decoder};
pub use map::ChunkMap;

/// Devices start and chunks lie at multiples of this.
pub(crate) const BLOCK_LEN: u64 = 4096;
/// The largest chunk of a nydus image.
pub const CHUNK_LEN_MAX: u64 = 16 << 20;
/// Chunks in a blob at most; nydus' own limit.
pub const CHUNKS_MAX: u32 = 1 << 24;
