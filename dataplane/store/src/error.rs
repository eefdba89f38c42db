//! What can go wrong in a store, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use pantala_wire::layout::LayoutError;
use pantala_wire::{BlobDigest, PieceDigest, PieceIndex};

/// A store or blob operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process owns the directory.
    #[error(
        "the store {} is in use by {}: stop it, or give this process a data directory of its own",
        .dir.display(),
        .pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The store's directory.
        dir: PathBuf,
        /// The process that holds the lock, where it left its number.
        pid: Option<u32>,
    },
    /// The configuration makes no sense.
    #[error("the store's configuration is wrong: {0}")]
    Config(&'static str),
    /// There is no room, even without every blob that is not in use.
    #[error(
        "no room for {needed_bytes} bytes: {pinned_bytes} of the {limit_bytes} bytes allowed are in \
         use and cannot be evicted; raise the store's limit or let running downloads finish"
    )]
    Full {
        /// Bytes asked for.
        needed_bytes: u64,
        /// The configured limit.
        limit_bytes: u64,
        /// Bytes of blobs that are open, and so stay.
        pinned_bytes: u64,
    },
    /// The disk is full though the store is below its limit.
    #[error(
        "the disk under {} is full, although the store is below its limit: free space or lower the limit",
        .path.display()
    )]
    DiskFull {
        /// The file that could not grow or be written.
        path: PathBuf,
    },
    /// The operating system refused or failed an operation.
    #[error("cannot {operation} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// A piece on disk is not what it was when it was committed. It has been dropped: fetch it again.
    #[error(
        "piece {piece} of {digest} is damaged on disk and was dropped; it has to be fetched again"
    )]
    Corrupt {
        /// The blob.
        digest: BlobDigest,
        /// The piece.
        piece: PieceIndex,
    },
    /// A blob too large to be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The blob is stored with another size.
    #[error(
        "{digest} is stored with {stored_bytes} bytes, but {asked_bytes} were asked for: one source lies about its size"
    )]
    WrongSize {
        /// The blob.
        digest: BlobDigest,
        /// Its size in the store.
        stored_bytes: u64,
        /// The size the caller believes in.
        asked_bytes: u64,
    },
    /// A write that is not made of whole groups inside the blob.
    #[error(
        "a write of {len} bytes at {offset} is not made of whole groups of a blob of {size} bytes"
    )]
    Unaligned {
        /// Where the write starts.
        offset: u64,
        /// Its length.
        len: u64,
        /// The blob's size.
        size: u64,
    },
    /// The blob has no such piece.
    #[error("the blob has no piece {0}")]
    NoSuchPiece(PieceIndex),
    /// The piece is held, and held pieces do not change.
    #[error("piece {0} is held already; its bytes are not written again")]
    AlreadyHeld(PieceIndex),
    /// Some group of the piece has not been written.
    #[error("piece {0} lacks groups: write all of them before it is committed")]
    Unwritten(PieceIndex),
    /// The bytes of a group are not those that were announced; nothing was written.
    #[error("the group at byte {offset} is not the one announced")]
    WrongGroup {
        /// First byte of the group.
        offset: u64,
    },
    /// The bytes written are not those of the claim.
    #[error("piece {piece} has digest {written:?}, but its claim says {claimed:?}")]
    WrongDigest {
        /// The piece.
        piece: PieceIndex,
        /// Digest of what was written.
        written: PieceDigest,
        /// Digest in the claim.
        claimed: PieceDigest,
    },
    /// The bytes were dropped by a failed flush while the operation ran.
    #[error("piece {0} was dropped while it was being written; write it again")]
    Dropped(PieceIndex),
    /// Bytes of the piece that are being read where they lie could not be moved out of the way; nothing
    /// was written. It can be tried again, and will work once its readers are done.
    #[error("piece {0} is being read and could not be overwritten; write it again")]
    BeingRead(PieceIndex),
    /// A proof of the sha256 that is for another blob, or older than the blob's last change.
    #[error("the proof of {0}'s sha256 is outdated: hash the blob again")]
    StaleProof(BlobDigest),
}

impl StoreError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        if is_disk_full(&source) {
            Self::DiskFull { path }
        } else {
            Self::Io {
                operation,
                path,
                source,
            }
        }
    }

    /// Whether there is no room, by the store's limit or on the disk.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::DiskFull { .. })
    }
}

pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
