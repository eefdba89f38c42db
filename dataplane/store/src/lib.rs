//! Blobs on disk.
//!
//! A [`Store`] owns one directory and nobody else writes there (it holds a lock on it). It keeps
//! each blob in one preallocated file beside a small metadata file ([`meta`] draws its bytes), and
//! forgets the least recently used blobs when it grows past its limit. A [`Blob`] is an open one;
//! while any clone of it lives, the blob stays.
//!
//! What a caller may rely on:
//!
//! - **No read returns wrong bytes.** Bytes are readable once they are written and hashed. After a
//!   restart, a piece is verified against its recorded digests before its first byte is returned;
//!   one that is wrong is dropped, and the reader learns of it ([`StoreError::Corrupt`]).
//! - **What was flushed survives.** A piece counts as kept over a crash once [`Blob::flush`] has
//!   returned: its bytes and record reach the disk before the bit that vouches for them.
//! - **Whatever is in doubt is forgotten.** Metadata that does not parse, or does not fit its place,
//!   costs a download, never an error.
//!
//! - **Lent bytes never change.** [`Blob::slice`] lends a blob's bytes where they lie in the page cache;
//!   whatever becomes of the blob, they stay what they were while somebody has them.
//!
//! Every call may block on the disk: call from threads that may. All types are shared freely
//! between threads, and no lock is held while the disk works but the one that orders flushes.
//! A store shuts down when its last clone and the last blob are dropped.

#![deny(unsafe_code)]

mod blob;
mod error;
mod file;
mod flush;
mod fs;
mod handed;
mod hash;
mod map;
pub mod meta;
mod open;
mod place;
mod registry;
mod slice;
mod state;
mod store;
mod write;

pub use blob::Blob;
pub use error::StoreError;
pub use fs::{FileSystem, LentBytes, LockError, MappedData, MappedFile, OsFileSystem, StoreFile};
pub use handed::HandedFileSystem;
pub use hash::{Sha256Progress, Sha256Proof, Sha256Verdict};
pub use meta::PieceProof;
pub use store::{BlobSummary, Store, StoreConfig};
