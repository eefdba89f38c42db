//! Whether this machine can do it: tried, not concluded from version numbers.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use pantala_supervisor::fanotify;

use crate::backend::{MountError, erofs};

/// Why lazy mounts over fanotify cannot be made here.
#[derive(Debug, thiserror::Error)]
pub enum Unable {
    /// The kernel has no such events, or does not give them to this user.
    #[error(
        "the kernel gives no events before access ({0}): they need Linux 6.14 or later and CAP_SYS_ADMIN"
    )]
    Events(io::Error),
    /// The directory's file system does not.
    #[error(
        "files in the data directory cannot be watched ({0}): it must lie on ext4, xfs or btrfs"
    )]
    FileSystem(io::Error),
    /// EROFS cannot be mounted from a file.
    #[error(
        "{0}: file-backed EROFS mounts need Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE"
    )]
    Mount(MountError),
    /// Nothing can be tried in the directory.
    #[error("nothing can be tried in {dir}: {source}")]
    Dir {
        /// The directory.
        dir: String,
        /// Why.
        source: io::Error,
    },
}

/// Tries all that a mount needs, in `dir`, and leaves nothing behind. Blocks.
///
/// # Errors
/// [`Unable`].
pub fn probe(dir: &Path) -> Result<(), Unable> {
    let trial = dir.join(format!("probe-{}", std::process::id()));
    let of_dir = |source| Unable::Dir {
        dir: trial.display().to_string(),
        source,
    };
    fs::create_dir_all(&trial).map_err(of_dir)?;
    let outcome = try_in(&trial, &of_dir);
    let removed = fs::remove_dir_all(&trial).map_err(of_dir);
    outcome.and(removed)
}

fn try_in(trial: &Path, of_dir: &dyn Fn(io::Error) -> Unable) -> Result<(), Unable> {
    let (image, at) = (trial.join("image"), trial.join("at"));
    fs::write(&image, erofs::empty_image()).map_err(of_dir)?;
    fs::create_dir_all(&at).map_err(of_dir)?;
    let group = fanotify::new_group().map_err(Unable::Events)?;
    let file = File::open(&image).map_err(of_dir)?;
    fanotify::mark(group.as_fd(), file.as_fd()).map_err(Unable::FileSystem)?;
    // Nobody answers this group: its mark must be gone before the kernel reads the image.
    fanotify::unmark(group.as_fd(), file.as_fd()).map_err(Unable::FileSystem)?;
    drop(group);
    erofs::mount(&image, &[], &at).map_err(Unable::Mount)?;
    erofs::unmount(&at).map_err(Unable::Mount)
}
