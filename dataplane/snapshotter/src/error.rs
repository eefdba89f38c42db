//! Why a call fails.

use std::io;
use std::path::{Path, PathBuf};

use crate::core::{FilterError, LayerError, TreeError};
use crate::lazy::LazyError;

/// The disk said no.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}: {source}")]
pub struct DiskError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Says what was tried on what.
pub(crate) fn about<E: Into<io::Error>>(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> DiskError {
    move |source| DiskError {
        what,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Why a call to the snapshotter fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules refuse it.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A filter is wrong.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The image's labels make no sense.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A lazy layer cannot be mounted.
    #[error("the lazy layer {name:?} cannot be mounted: {source}")]
    Lazy {
        /// Of which snapshot.
        name: String,
        /// Why.
        source: LazyError,
    },
    /// The image is lazy and this node mounts none.
    #[error(
        "{0:?} is a layer of a lazy image, and this node has no lazy mounts: pull the ordinary image, or turn them on"
    )]
    NoLazyMounts(String),
    /// The disk said no.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The work was given up in the middle: the program is going down, or has a bug.
    #[error("the call was not finished: {0}")]
    Unfinished(String),
}

/// Why the snapshotter cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process works on the same directory.
    #[error("another snapshotter uses {0}: stop it, or give this one a directory of its own")]
    InUse(PathBuf),
    /// The directory cannot hold layers.
    #[error("{path} cannot hold layers: {why}")]
    Unsuitable {
        /// The root.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// Somebody answers on the socket.
    #[error("another program listens on {0}: stop it, or choose another socket")]
    SocketInUse(PathBuf),
    /// The work was given up in the middle.
    #[error("the start was not finished: {0}")]
    Unfinished(String),
    /// The disk said no.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
