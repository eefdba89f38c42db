//! The seam to lazy mounts: what the snapshotter asks for and the node does.

use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use pantala_wire::BlobDigest;

use crate::core::ImageSource;

/// What is to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LazyContent {
    /// An EROFS image whose metadata and devices are blobs of the registry.
    Erofs {
        /// The image with all metadata.
        metadata: BlobDigest,
        /// Its devices, in the order of the device table.
        devices: Vec<BlobDigest>,
    },
    /// What a nydus bootstrap describes.
    Nydus {
        /// The bootstrap: a regular file below the snapshot, whose content is not to be trusted.
        bootstrap: PathBuf,
    },
}

/// One layer to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LazyLayer {
    /// What it is.
    pub content: LazyContent,
    /// The repository that has its blobs; none where nobody could say.
    pub image: Option<ImageSource>,
    /// The directory to mount on, which exists.
    pub at: PathBuf,
}

/// Why a layer cannot be mounted or unmounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LazyError {
    /// It may work later: the registry does not answer, the disk is full.
    #[error("{0}")]
    Unavailable(String),
    /// It will not work: the image is damaged, the kernel cannot do it.
    #[error("{0}")]
    Impossible(String),
}

/// Whoever mounts images before their data has arrived. Calls for the same directory come one at a
/// time, and every call ends in bounded time.
pub trait LazyLayers: Send + Sync + 'static {
    /// Mounts `layer`, read-only. From its return on, reads are answered with the right bytes or fail.
    /// A layer that is mounted there already, also by an earlier process, is no error.
    fn mount(&self, layer: LazyLayer) -> BoxFuture<'_, Result<(), LazyError>>;

    /// Takes the mount on `at` down. That nothing is mounted there is no error.
    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), LazyError>>;
}
