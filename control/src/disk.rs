//! Secrets on disk: written whole or not at all, and readable by their owner alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Largest file that is read here: keys, certificates and tokens are a few KiB.
const FILE_SIZE_MAX: u64 = 64 * 1024;

/// A file or folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refuses.
    #[error("cannot {what} {path}: {cause}; check that the folder exists, has space, and belongs to the user that runs this program", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// Nothing that this program wrote is so large.
    #[error("{path} is larger than the {FILE_SIZE_MAX} bytes that belong there", path = .0.display())]
    TooLarge(PathBuf),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |cause| DiskError::Io { what, path, cause }
}

/// Makes `dir`, and its parents, for the owner alone.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), DiskError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("create", dir))
}

/// The content of `path`, or `None` where there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, DiskError> {
    match fs::metadata(path) {
        Ok(found) if found.len() > FILE_SIZE_MAX => Err(DiskError::TooLarge(path.to_owned())),
        Ok(_) => fs::read(path).map(Some).map_err(failed("read", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Puts `content` at `path` with mode 0600: after a crash the file is the old one or the new one.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<(), DiskError> {
    let name = path.file_name().unwrap_or_default();
    let mut new_name = name.to_owned();
    new_name.push(".new");
    let new = path.with_file_name(new_name);
    // A leftover of a crash may have a wider mode than the one that creating sets.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("replace", &new)(error));
        }
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .map_err(failed("create", &new))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &new))?;
    fs::rename(&new, path).map_err(failed("replace", path))?;
    if let Some(dir) = path.parent() {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed("flush", dir))?;
    }
    Ok(())
}
