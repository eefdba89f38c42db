//! Where a blob's files are.

use std::io;
use std::path::{Path, PathBuf};

use pantala_wire::BlobDigest;

use crate::fs::FileSystem;

/// The directory of all blobs named by their sha256.
pub(crate) fn blobs_dir(store: &Path) -> PathBuf {
    store.join("blobs").join("sha256")
}

/// The paths of one blob: `blobs/sha256/<first two digits>/<digits>/{data,meta}`.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) meta: PathBuf,
}

impl Place {
    pub(crate) fn of(store: &Path, digest: &BlobDigest) -> Self {
        let hex = digest.to_hex();
        let dir = blobs_dir(store).join(&hex[..2]).join(&hex);
        Self {
            data: dir.join("data"),
            meta: dir.join("meta"),
            dir,
        }
    }

    /// Unlinks the blob. The metadata goes first: what a crash leaves of the rest is no blob.
    pub(crate) fn remove(&self, fs: &dyn FileSystem) -> io::Result<()> {
        let absent_is_fine = |result: io::Result<()>| match result {
            // Not empty: somebody else's file is there, and stays.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Ok(())
            }
            other => other,
        };
        absent_is_fine(fs.remove_file(&self.meta))?;
        absent_is_fine(fs.remove_file(&self.data))?;
        absent_is_fine(fs.remove_dir(&self.dir))
    }

    /// Makes the blob's name durable.
    pub(crate) fn sync(&self, fs: &dyn FileSystem) -> io::Result<()> {
        // dir, <two digits>, sha256: a new blob may have created each of them.
        for dir in self.dir.ancestors().take(3) {
            match fs.sync_dir(dir) {
                // Removed while open: there is no name to keep.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
        }
        Ok(())
    }
}
