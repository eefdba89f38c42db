//! Whether this machine can do it: tried, not concluded from version numbers.

use std::fs;
use std::path::Path;

use super::connect;
use crate::backend::MountError;
use crate::backend::erofs::{detach, empty_image, mount_with, refused};

/// Opens `/dev/fuse`, and mounts an empty EROFS image that is a file in `dir`. Leaves nothing behind. Blocks.
pub fn probe(dir: &Path) -> Result<(), MountError> {
    let trial = dir.join(format!("probe-fuse-{}", std::process::id()));
    let failed = |error| refused(format!("try EROFS in {}", trial.display()), error);
    let at = trial.join("at");
    fs::create_dir_all(&at).map_err(failed)?;
    let outcome = try_in(&trial, &at);
    let removed = fs::remove_dir_all(&trial).map_err(failed);
    outcome.and(removed)
}

fn try_in(trial: &Path, at: &Path) -> Result<(), MountError> {
    connect()?;
    let image = trial.join("image");
    fs::write(&image, empty_image())
        .map_err(|error| refused(format!("write {}", image.display()), error))?;
    mount_with(&[("source", image.as_os_str())], at)?;
    detach(at)
}
