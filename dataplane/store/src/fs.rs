//! The file operations a store needs, as traits: the operating system's, or a test's that fails.
//!
//! A store does nothing to a disk but through these. Their contract is the kernel's: what has been
//! written is seen by every later read and mapping at once, and survives a crash once a sync that
//! began after the write has returned without an error; a failed sync may have lost it for good.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use pantala_wire::ByteRange;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::map::Map;
use crate::map::data::DataMap;
pub use crate::map::data::{LentBytes, MappedData};

/// Nobody but the owner may look into a store: private images lie there.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// An open file. Offsets and lengths are bytes.
pub trait StoreFile: Send + Sync {
    /// Its length.
    fn length(&self) -> io::Result<u64>;
    /// Makes it `len` bytes long and reserves them on the disk where the file system can.
    fn allocate(&self, len: u64) -> io::Result<()>;
    /// Fills `out` from `offset`; an end of file before that is `UnexpectedEof`.
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when everything written before is on the disk.
    fn sync_data(&self) -> io::Result<()>;
    /// Maps the whole file, metadata that will change, to copy out of it.
    fn map(&self) -> io::Result<Box<dyn MappedFile>>;
    /// Maps `range` of the file, a blob's data, to read it in place. It starts on a page boundary.
    fn map_data(&self, range: ByteRange) -> io::Result<Arc<dyn MappedData>>;
    /// Another descriptor of the same opening of the file, where it is one of the operating system's.
    fn descriptor(&self) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A file mapped for reading.
pub trait MappedFile: Send + Sync {
    /// Fills `out` from `offset`; both must be multiples of 8 bytes. Past the end is `UnexpectedEof`.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

/// A file system.
pub trait FileSystem: Send + Sync {
    /// Creates `dir` and what is missing above it.
    fn create_dirs(&self, dir: &Path) -> io::Result<()>;
    /// Creates the file, empty; one that exists is `AlreadyExists`.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>>;
    /// Opens the file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>>;
    /// The names in `dir`.
    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>>;
    /// Unlinks a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;
    /// Returns when the names in `dir` are on the disk.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Takes the lock file at `path`; the lock lasts as long as what is returned.
    fn lock(&self, path: &Path) -> Result<Box<dyn Send + Sync>, LockError>;
}

/// A lock that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error("held by another process")]
    Held {
        /// Whoever left this process number in the file.
        pid: Option<u32>,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The operating system's files.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsFileSystem;

impl FileSystem for OsFileSystem {
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(path)?;
        Ok(Arc::new(OsFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)?;
        Ok(Arc::new(OsFile(file)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        std::fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect()
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        std::fs::remove_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn Send + Sync>, LockError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                file.rewind()?;
                writeln!(file, "{}", std::process::id())?;
                Ok(Box::new(file))
            }
            Err(TryLockError::WouldBlock) => {
                // A process number has at most ten digits; more is not ours.
                let mut text = String::new();
                let read = file.take(16).read_to_string(&mut text);
                let pid = read.ok().and_then(|_| text.trim().parse().ok());
                Err(LockError::Held { pid })
            }
            Err(TryLockError::Error(error)) => Err(error.into()),
        }
    }
}

pub(crate) struct OsFile(pub(crate) File);

impl StoreFile for OsFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        if len == 0 {
            return self.0.set_len(0);
        }
        match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, len) {
            // The file system cannot reserve: the file is sparse, and a full disk shows when it
            // is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.0.set_len(len),
            other => Ok(other?),
        }
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn map(&self) -> io::Result<Box<dyn MappedFile>> {
        Ok(Box::new(Map::of(&self.0)?))
    }

    fn map_data(&self, range: ByteRange) -> io::Result<Arc<dyn MappedData>> {
        Ok(Arc::new(DataMap::of(&self.0, range)?))
    }

    fn descriptor(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}
