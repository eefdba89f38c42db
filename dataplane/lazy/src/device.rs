//! The bytes of one data device of an image, most of which are not here yet.

use std::fs::File;
use std::path::Path;

use futures_util::future::BoxFuture;
use pantala_wire::{ByteRange, Priority};

/// Why a range could not be made present. The reader gets `EIO`: the kernel passes nothing finer on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FillError {
    /// Neither peers nor the source had the bytes in time.
    #[error("{what} cannot be fetched: {why}")]
    Unavailable {
        /// The blob and the range.
        what: String,
        /// What was tried.
        why: String,
    },
    /// The bytes came and are not what the image's digests say.
    #[error("{what} is damaged: {why}")]
    Corrupt {
        /// The blob and the range.
        what: String,
        /// What did not fit.
        why: String,
    },
    /// The local disk failed or is full.
    #[error("{what} cannot be kept: {why}")]
    Disk {
        /// The file.
        what: String,
        /// What the disk said.
        why: String,
    },
    /// The range lies outside the device.
    #[error("a read of {first}+{count} bytes outside a device of {size_bytes} bytes")]
    OutOfRange {
        /// First byte asked for.
        first: u64,
        /// Bytes asked for.
        count: u64,
        /// What the device has.
        size_bytes: u64,
    },
}

/// The bytes of one data device behind a local file in which they appear at their own offsets.
pub trait Device: Send + Sync + 'static {
    /// Length of the device.
    fn size_bytes(&self) -> u64;

    /// Where the kernel finds the bytes that are present. The file has the device's length.
    fn path(&self) -> &Path;

    /// The same file, opened before any watch was set on it: access through this descriptor raises
    /// no event, and so cannot wait for itself.
    fn file(&self) -> &File;

    /// True once every byte is present: the device needs nobody to watch it any more.
    fn is_complete(&self) -> bool;

    /// Makes every byte of `range` present and verified in the file. Ends in bounded time. Called for
    /// many ranges at once, overlapping ones too; a range that is present costs next to nothing.
    fn fill(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<(), FillError>>;
}
