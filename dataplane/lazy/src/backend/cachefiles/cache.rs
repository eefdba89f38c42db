//! The folder in which the kernel keeps its cache files: `cache/Ierofs,DOMAIN/@HH/DNAME`.
//!
//! The kernel never removes them by itself, and would take a file of an earlier mount for good if a name came again. So
//! names never come again, and files that nobody uses are removed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All mounts of a node share one domain: the kernel makes 256 folders for each.
pub(super) const DOMAIN: &str = "pantala";
/// The kernel gives a file its name a moment after it has said that it is done with it. What is missed after so many
/// tries is removed by the next [`clear`].
const FORGET_TRIES_MAX: u32 = 20;
const FORGET_PAUSE: Duration = Duration::from_millis(250);

fn domain_dir(cache_dir: &Path) -> PathBuf {
    cache_dir.join(format!("cache/Ierofs,{DOMAIN}"))
}

/// Removes the files of earlier lives. Only while no cache is bound to the folder.
pub(super) fn clear(cache_dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(domain_dir(cache_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the cache file `name` when the kernel has let go of it. Must be called in a runtime.
pub(super) fn forget_later(cache_dir: PathBuf, name: Vec<u8>) {
    tokio::spawn(async move {
        for _ in 0..FORGET_TRIES_MAX {
            tokio::time::sleep(FORGET_PAUSE).await;
            let (dir, name) = (domain_dir(&cache_dir), name.clone());
            match tokio::task::spawn_blocking(move || forget(&dir, &name)).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => return,
                Ok(Err(error)) => {
                    return tracing::warn!(%error, "a cache file that nobody uses cannot be removed");
                }
                Err(_) => return,
            }
        }
        tracing::debug!("a cache file was not found; the next start removes it");
    });
}

/// Whether `name` was there.
fn forget(dir: &Path, name: &[u8]) -> io::Result<bool> {
    let file = OsStr::from_bytes(&[b"D", name].concat()).to_owned();
    for bucket in 0..=u8::MAX {
        match fs::remove_file(dir.join(format!("@{bucket:02x}")).join(&file)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(()) => return Ok(true),
        }
    }
    Ok(false)
}
