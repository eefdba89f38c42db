//! The directories of snapshots: `snapshots/ID/fs` with the files, `work` for overlayfs, `lazy` where
//! an image is mounted.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::core::{Kind, Overlay};
use crate::error::{DiskError, about};
use crate::records::sync_dir;

/// As containerd's own snapshotter: what a container sees as `/` must be passable for all.
const FS_MODE: u32 = 0o755;
const WORK_MODE: u32 = 0o711;
const ROOT_MODE: u32 = 0o700;

/// Where the snapshots' files are.
#[derive(Debug, Clone)]
pub(crate) struct Directories {
    root: PathBuf,
}

impl Directories {
    pub(crate) fn open(root: PathBuf) -> Result<Self, DiskError> {
        fs::create_dir_all(&root)
            .and_then(|()| fs::set_permissions(&root, PermissionsExt::from_mode(ROOT_MODE)))
            .map_err(about("create", &root))?;
        Ok(Self { root })
    }

    fn of(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    pub(crate) fn fs(&self, id: u64) -> PathBuf {
        self.of(id).join("fs")
    }

    pub(crate) fn work(&self, id: u64) -> PathBuf {
        self.of(id).join("work")
    }

    pub(crate) fn lazy(&self, id: u64) -> PathBuf {
        self.of(id).join("lazy")
    }

    /// Makes those of a new snapshot; `/` in it belongs to whom it belongs in `lower`.
    pub(crate) fn create(
        &self,
        id: u64,
        kind: Kind,
        lower: Option<&Path>,
    ) -> Result<(), DiskError> {
        let dir = self.of(id);
        let create = || {
            create_dir(&dir, ROOT_MODE)?;
            create_dir(&self.fs(id), FS_MODE)?;
            if let Some(lower) = lower {
                let owner = fs::metadata(lower)?;
                chown(self.fs(id), Some(owner.uid()), Some(owner.gid()))?;
            }
            if kind == Kind::Active {
                create_dir(&self.work(id), WORK_MODE)?;
            }
            sync_dir(&dir)?;
            sync_dir(&self.root)
        };
        create().map_err(about("create", &dir))
    }

    /// Makes the directory that an image is mounted on.
    pub(crate) fn create_lazy(&self, id: u64) -> Result<PathBuf, DiskError> {
        let dir = self.lazy(id);
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(about("create", &dir)(error))
            }
            _ => Ok(dir),
        }
    }

    /// The file that an image's author put at `name` into the snapshot. A link would lead whoever opens it
    /// as root to any file of this machine.
    pub(crate) fn file_of(&self, id: u64, name: &str) -> Result<PathBuf, DiskError> {
        let root = self.fs(id);
        let path = root.join(name);
        let open = || {
            let root = fs::File::open(&root)?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let file = fs::File::from(openat2(root, name, flags, Mode::empty(), resolve)?);
            match file.metadata()?.is_file() {
                true => Ok(()),
                false => Err(io::Error::other("it is no file")),
            }
        };
        open().map_err(about("open", &path))?;
        Ok(path)
    }

    /// Whether an image was ever mounted here.
    pub(crate) fn has_lazy(&self, id: u64) -> bool {
        self.lazy(id).symlink_metadata().is_ok()
    }

    /// Removes those of a snapshot; nothing may be mounted below. That there are none is no error.
    pub(crate) fn remove(&self, id: u64) -> Result<(), DiskError> {
        let dir = self.of(id);
        let result = self
            .refuse_mounted(id)
            .and_then(|()| fs::remove_dir_all(&dir));
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(about("remove", &dir)(error))
            }
            _ => Ok(()),
        }
    }

    /// A walk that removes must not enter what is mounted.
    fn refuse_mounted(&self, id: u64) -> io::Result<()> {
        let above = fs::symlink_metadata(self.of(id))?.dev();
        match fs::symlink_metadata(self.lazy(id)) {
            Ok(lazy) if lazy.dev() != above => {
                Err(io::Error::other("an image is still mounted in it"))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The ids of all directories.
    pub(crate) fn ids(&self) -> Result<Vec<u64>, DiskError> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(about("read", &self.root))? {
            let name = entry.map_err(about("read", &self.root))?.file_name();
            ids.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        Ok(ids)
    }

    /// Makes all that was written into the snapshot durable: a layer that is committed is never
    /// downloaded again, so a power cut must not leave its files empty.
    pub(crate) fn sync(&self, id: u64) -> Result<(), DiskError> {
        let dir = self.fs(id);
        fs::File::open(&dir)
            .and_then(|dir| Ok(rustix::fs::syncfs(dir)?))
            .map_err(about("sync", &dir))
    }
}

fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    // Past the umask.
    fs::set_permissions(path, PermissionsExt::from_mode(mode))
}

/// What this kernel's overlayfs must be told.
pub(crate) fn probe_overlay() -> Overlay {
    // The first namespace maps every user to itself, in one line.
    let is_first_namespace = fs::read_to_string("/proc/self/uid_map")
        .map(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
        .unwrap_or(true);
    Overlay {
        index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
        userxattr: !is_first_namespace,
    }
}
