//! The kernel's ways to learn that bytes are touched which are not here yet.

pub mod cachefiles;
pub mod erofs;
pub mod fanotify;
pub mod fuse;
pub mod mountinfo;

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::device::Device;

/// Which of the kernel's ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackendKind {
    /// fanotify pre-content events on a file-backed EROFS mount.
    Fanotify,
    /// cachefiles on-demand, nydus' "fscache mode".
    Cachefiles,
    /// A file-backed EROFS mount over a blob that FUSE serves.
    Fuse,
}

impl BackendKind {
    /// The name in configuration, status and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Cachefiles => "cachefiles",
            Self::Fuse => "fuse",
        }
    }
}

/// One mount to make.
#[derive(Clone)]
pub struct MountSpec {
    /// The EROFS image with all metadata, complete.
    pub metadata: PathBuf,
    /// The devices, in the order of the image's device table.
    pub devices: Vec<Arc<dyn Device>>,
    /// The directory to mount on.
    pub at: PathBuf,
}

/// Why a mount was not made or not taken down.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was tried, on what.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// This file system cannot hold lazy data.
    #[error(
        "{path} lies on a file system that cannot be watched ({source}): use ext4, xfs or btrfs"
    )]
    Unsuitable {
        /// The data file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Nothing is mounted there by this backend.
    #[error("nothing of ours is mounted on {0}")]
    NotMounted(PathBuf),
    /// The keeper of the kernel's descriptors is gone, or says no.
    #[error("the supervisor ({what}): {why}")]
    Supervisor {
        /// What was asked of it.
        what: String,
        /// What came back.
        why: String,
    },
}

/// A way to be told of touches, and the mounts made over it.
pub trait Backend: Send + Sync + 'static {
    /// Which one.
    fn kind(&self) -> BackendKind;

    /// Mounts; from its return on, every read is answered by the devices' `fill` or fails.
    fn mount(&self, spec: MountSpec) -> BoxFuture<'_, Result<(), MountError>>;

    /// Takes up a mount that was made before the daemon was restarted; nothing is mounted.
    fn adopt(&self, spec: MountSpec) -> BoxFuture<'_, Result<(), MountError>> {
        Box::pin(async move {
            Err(MountError::Supervisor {
                what: format!("adoption of {}", spec.at.display()),
                why: format!("a mount over {} ends with its daemon", self.kind().name()),
            })
        })
    }

    /// Takes the mount down. One that is in use stays, and the error says so.
    fn unmount<'a>(&'a self, at: &'a std::path::Path) -> BoxFuture<'a, Result<(), MountError>>;
}
