//! What a process leaves behind about its mounts, so that the next one finds those of a dead process.
//!
//! `ROOT/lock` is held while the process lives. `ROOT/N/` is one mount: `devices` is where its FUSE file system is mounted,
//! `at` and `metadata` hold the paths of the EROFS mount over it. They are written before anything is mounted and removed
//! after everything is unmounted. Nothing here is worth more than the machine's uptime: ROOT belongs below `/run`.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::mount::{UnmountFlags, unmount};

use crate::backend::MountError;
use crate::backend::erofs::{detach, refused};
use crate::backend::mountinfo::{Mounted, mounts};

/// The folder with the records of one process.
pub(super) struct Records {
    root: PathBuf,
    /// Locked; the kernel lets go when the process dies.
    _lock: File,
}

/// The record of one mount.
#[derive(Debug, Clone)]
pub(super) struct Record {
    dir: PathBuf,
}

impl Records {
    /// Takes the folder over and unmounts what a dead process has left mounted. Returns where.
    pub(super) fn open(root: &Path) -> Result<(Self, Vec<PathBuf>), MountError> {
        let failed = |what: &str, error| refused(format!("{what} {}", root.display()), error);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|error| failed("make the folder", error))?;
        let lock = File::create(root.join("lock")).map_err(|error| failed("lock", error))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| failed("lock (does another process serve from it?)", errno.into()))?;
        let mounted = mounts().map_err(|error| refused("read the list of mounts", error))?;
        let mut taken_down = Vec::new();
        let entries = fs::read_dir(root).map_err(|error| failed("read", error))?;
        for entry in entries {
            let entry = entry.map_err(|error| failed("read", error))?;
            if entry.file_name() == "lock" {
                continue;
            }
            let record = Record { dir: entry.path() };
            taken_down.extend(record.take_down_stale(&mounted)?);
        }
        let records = Self {
            root: root.to_owned(),
            _lock: lock,
        };
        Ok((records, taken_down))
    }

    /// Notes mount number `number`, before it is made.
    pub(super) fn note(
        &self,
        number: u64,
        at: &Path,
        metadata: &Path,
    ) -> Result<Record, MountError> {
        let record = Record {
            dir: self.root.join(number.to_string()),
        };
        let write = || {
            fs::create_dir(&record.dir)?;
            fs::create_dir(record.devices())?;
            fs::write(record.dir.join("metadata"), metadata.as_os_str().as_bytes())?;
            fs::write(record.dir.join("at"), at.as_os_str().as_bytes())
        };
        write()
            .map_err(|error| refused(format!("note a mount in {}", record.dir.display()), error))?;
        Ok(record)
    }
}

impl Record {
    /// Where the devices' file system is mounted.
    pub(super) fn devices(&self) -> PathBuf {
        self.dir.join("devices")
    }

    /// Takes the devices' file system down: its reads that are under way fail, and all later ones.
    pub(super) fn unmount_devices(&self) -> Result<(), MountError> {
        let at = self.devices();
        // FORCE ends the connection, so that nobody waits in it; DETACH lets go of who holds its files open: the EROFS
        // mount, as long as somebody uses that.
        unmount(&at, UnmountFlags::FORCE | UnmountFlags::DETACH)
            .map_err(|errno| refused(format!("unmount {}", at.display()), errno))
    }

    /// Forgets the mount, which is unmounted.
    pub(super) fn forget(&self) -> Result<(), MountError> {
        // Not recursively: were it still mounted, nothing of it should be touched.
        let remove = || {
            for file in ["at", "metadata"] {
                match fs::remove_file(self.dir.join(file)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
            match fs::remove_dir(self.devices()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::remove_dir(&self.dir)
        };
        remove().map_err(|error| refused(format!("remove {}", self.dir.display()), error))
    }

    /// Takes down what is left of a dead process's mount; says where EROFS was mounted if it was.
    fn take_down_stale(&self, mounted: &[Mounted]) -> Result<Option<PathBuf>, MountError> {
        let path_in = |file: &str| {
            let bytes = fs::read(self.dir.join(file)).ok()?;
            Some(PathBuf::from(OsStr::from_bytes(&bytes)))
        };
        let mut taken_down = None;
        if let (Some(at), Some(metadata)) = (path_in("at"), path_in("metadata")) {
            // Only if it is still ours that lies on top there.
            let top = mounted.iter().rev().find(|mount| mount.at == at);
            if top.is_some_and(|top| top.fs_type == "erofs" && top.source == metadata) {
                detach(&at)?;
                taken_down = Some(at);
            }
        }
        let devices = self.devices();
        if mounted.iter().any(|mount| mount.at == devices) {
            self.unmount_devices()?;
        }
        self.forget()?;
        Ok(taken_down)
    }
}
