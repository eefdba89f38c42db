//! The operating system's files, some of which were opened before this process was there.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fs::{FileSystem, LockError, OsFile, OsFileSystem, StoreFile};

/// As [`OsFileSystem`], but files that were handed in are not opened again: the kernel watches some
/// files that a lazy mount reads, and access through a descriptor that was opened later waits for the
/// very process that would answer.
#[derive(Debug, Default)]
pub struct HandedFileSystem {
    handed: HashMap<PathBuf, File>,
}

impl HandedFileSystem {
    /// With these descriptors for the files at these paths, each open for reading and writing.
    pub fn new(handed: impl IntoIterator<Item = (PathBuf, File)>) -> Self {
        Self {
            handed: handed.into_iter().collect(),
        }
    }

    /// What was handed in for `path`, if that is still the file there.
    fn handed(&self, path: &Path) -> io::Result<Option<File>> {
        let Some(file) = self.handed.get(path) else {
            return Ok(None);
        };
        let (there, ours) = (std::fs::symlink_metadata(path)?, file.metadata()?);
        match (there.dev(), there.ino()) == (ours.dev(), ours.ino()) {
            true => file.try_clone().map(Some),
            false => Ok(None),
        }
    }
}

impl FileSystem for HandedFileSystem {
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        OsFileSystem.create_dirs(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        OsFileSystem.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        match self.handed(path)? {
            Some(file) => Ok(Arc::new(OsFile(file))),
            None => OsFileSystem.open(path),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        OsFileSystem.list(dir)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        OsFileSystem.remove_file(path)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        OsFileSystem.remove_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        OsFileSystem.sync_dir(dir)
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn Send + Sync>, LockError> {
        OsFileSystem.lock(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handed_file_is_used_until_another_takes_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, b"old").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let fs = HandedFileSystem::new([(path.clone(), file)]);
        let content = |file: Arc<dyn StoreFile>| {
            let mut bytes = [0; 3];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let by_name = File::open(&path).unwrap();
        assert_eq!(&content(fs.open(&path).unwrap()), b"old");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"new").unwrap();
        assert_eq!(&content(fs.open(&path).unwrap()), b"new");
        drop(by_name);
    }
}
