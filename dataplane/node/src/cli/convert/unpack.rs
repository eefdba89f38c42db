//! A layer's archive as a tree of files in the form in which overlayfs stacks it.
//!
//! The archive is a stranger's. Every path is resolved by the kernel with the tree as its root, so that no link
//! leads out of it; files are made anew and never opened through what is there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use super::archive::{EntryError, Meaning, below_root, meaning, pax_time, xattr_name};

/// Entries of one layer: ten times those of the largest known. Bounds what is remembered of directories.
const ENTRIES_MAX: u64 = 20_000_000;
/// Bytes that one layer may unpack to; a layer that is a bomb has more.
const UNPACKED_BYTES_MAX: u64 = 1 << 40;
/// Directories that an archive takes for granted.
const DIRECTORY_MODE: u32 = 0o755;
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnpackError {
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error("the layer's archive is damaged: {0}")]
    Archive(std::io::Error),
    #[error("cannot {doing} {path:?}: {source}")]
    File {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path:?} has the impossible {what}")]
    Field { path: PathBuf, what: &'static str },
    #[error("the layer has the entry {path:?} of the unknown kind {kind:?}")]
    Kind { path: PathBuf, kind: EntryType },
    #[error("the layer unpacks to more than {UNPACKED_BYTES_MAX} bytes or {ENTRIES_MAX} entries")]
    TooLarge,
}

/// Unpacks `archive` into the empty directory `root`.
pub(super) fn unpack(archive: impl Read, root: &Path) -> Result<(), UnpackError> {
    let mut tree = Tree::open(root)?;
    let mut archive = tar::Archive::new(archive);
    let (mut entries, mut bytes) = (0, 0_u64);
    for entry in archive.entries().map_err(UnpackError::Archive)? {
        let mut entry = entry.map_err(UnpackError::Archive)?;
        entries += 1;
        bytes = bytes.saturating_add(entry.size());
        if entries > ENTRIES_MAX || bytes > UNPACKED_BYTES_MAX {
            return Err(UnpackError::TooLarge);
        }
        let path = entry.path().map_err(UnpackError::Archive)?.into_owned();
        match meaning(&path)? {
            _ if entry.header().entry_type() == EntryType::XGlobalHeader => {}
            Meaning::Nothing => {}
            Meaning::Present(path) => tree.add(&path, &mut entry)?,
            Meaning::Gone(path) => tree.whiteout(&path)?,
            Meaning::Opaque(path) => tree.make_opaque(&path)?,
        }
    }
    tree.finish()
}

/// What an archive says of a file besides its content.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: Mode,
    mtime: Timespec,
    xattrs: Vec<(String, Vec<u8>)>,
}

const EPOCH: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// The tree being made.
struct Tree {
    root: OwnedFd,
    /// Each directory's time, set when nothing changes in it any more.
    directories: BTreeMap<PathBuf, Timespec>,
}

impl Tree {
    fn open(root: &Path) -> Result<Self, UnpackError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(failed("open", root))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(DIRECTORY_MODE))
            .map_err(failed("make", root))?;
        Ok(Self {
            root: fd,
            directories: BTreeMap::from([(PathBuf::new(), EPOCH)]),
        })
    }

    fn add<R: Read>(&mut self, path: &Path, entry: &mut Entry<'_, R>) -> Result<(), UnpackError> {
        let attributes = attributes(path, entry)?;
        let kind = entry.header().entry_type();
        if kind == EntryType::Directory {
            return self.add_directory(path, &attributes);
        }
        let (parent, name) = self.parent(path)?;
        self.remove(&parent, &name, path)?;
        let fail = || failed("make", path);
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(fail())?;
                let mut file = File::from(file);
                std::io::copy(entry, &mut file).map_err(|source| UnpackError::File {
                    doing: "write",
                    path: path.to_owned(),
                    source,
                })?;
                return attributes.set(file.as_fd(), path, true);
            }
            EntryType::Link => return self.add_link(path, &parent, &name, entry),
            EntryType::Symlink => {
                let target = entry.link_name().map_err(UnpackError::Archive)?;
                let target = target.ok_or_else(|| field(path, "link target"))?;
                rustix::fs::symlinkat(&*target, &parent, &name).map_err(fail())?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let (kind, device) = match kind {
                    EntryType::Fifo => (FileType::Fifo, 0),
                    kind => {
                        let header = entry.header();
                        let numbers = (header.device_major(), header.device_minor());
                        let (Ok(Some(major)), Ok(Some(minor))) = numbers else {
                            return Err(field(path, "device number"));
                        };
                        let is_char = kind == EntryType::Char;
                        let kind = if is_char {
                            FileType::CharacterDevice
                        } else {
                            FileType::BlockDevice
                        };
                        (kind, rustix::fs::makedev(major, minor))
                    }
                };
                rustix::fs::mknodat(&parent, &name, kind, attributes.mode, device)
                    .map_err(fail())?;
            }
            kind => {
                return Err(UnpackError::Kind {
                    path: path.to_owned(),
                    kind,
                });
            }
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&parent, &name, flags, Mode::empty()).map_err(fail())?;
        attributes.set(made.as_fd(), path, kind != EntryType::Symlink)
    }

    /// A directory that is there keeps what is in it and gets the attributes. One in the place of a whiteout
    /// hides what the layers below have in it.
    fn add_directory(&mut self, path: &Path, attributes: &Attributes) -> Result<(), UnpackError> {
        self.directories.insert(path.to_owned(), attributes.mtime);
        if path.as_os_str().is_empty() {
            let root = self.root.try_clone().map_err(|source| UnpackError::File {
                doing: "open",
                path: path.to_owned(),
                source,
            })?;
            return attributes.set(root.as_fd(), path, true);
        }
        let (parent, name) = self.parent(path)?;
        let before = stat(&parent, &name, path)?;
        let is_directory =
            |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !before.as_ref().is_some_and(is_directory) {
            self.remove(&parent, &name, path)?;
            rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(DIRECTORY_MODE))
                .map_err(failed("make", path))?;
        }
        let directory = open_directory(&parent, &name, path)?;
        if before.as_ref().is_some_and(is_whiteout) {
            set_opaque(&directory, path)?;
        }
        attributes.set(directory.as_fd(), path, true)
    }

    fn add_link<R: Read>(
        &mut self,
        path: &Path,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry<'_, R>,
    ) -> Result<(), UnpackError> {
        let target = entry.link_name().map_err(UnpackError::Archive)?;
        let target = below_root(&target.ok_or_else(|| field(path, "link target"))?)?;
        let (target_parent, target_name) = self.parent(&target)?;
        rustix::fs::linkat(&target_parent, &target_name, parent, name, AtFlags::empty())
            .map_err(failed("link to its target", path))
    }

    /// Marks `path` as gone, unless this very layer has it: then nothing below it shows through.
    fn whiteout(&mut self, path: &Path) -> Result<(), UnpackError> {
        let (parent, name) = self.parent(path)?;
        match stat(&parent, &name, path)? {
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                set_opaque(&open_directory(&parent, &name, path)?, path)
            }
            Some(_) => Ok(()),
            None => {
                rustix::fs::mknodat(&parent, &name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(failed("make", path))?;
                let times = Timestamps {
                    last_access: EPOCH,
                    last_modification: EPOCH,
                };
                rustix::fs::utimensat(&parent, &name, &times, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("set the time of", path))
            }
        }
    }

    fn make_opaque(&mut self, path: &Path) -> Result<(), UnpackError> {
        let directory = self.directory(path)?;
        set_opaque(&directory, path)
    }

    /// The directory that `path` is in, and its name there.
    fn parent(&mut self, path: &Path) -> Result<(OwnedFd, PathBuf), UnpackError> {
        let name = path.file_name().ok_or_else(|| field(path, "name"))?;
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.directory(parent)?, name.into()))
    }

    /// Opens a directory, and makes it and those above it where an archive takes them for granted.
    fn directory(&mut self, path: &Path) -> Result<OwnedFd, UnpackError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let here = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        match rustix::fs::openat2(&self.root, here, flags, Mode::empty(), how) {
            Ok(directory) => return Ok(directory),
            // Not there, or a whiteout is on the way.
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(e) => return Err(failed("open", path)(e)),
        }
        let (parent, name) = self.parent(path)?;
        let was_gone = stat(&parent, &name, path)?
            .as_ref()
            .is_some_and(is_whiteout);
        if was_gone {
            self.remove(&parent, &name, path)?;
        }
        rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(DIRECTORY_MODE))
            .map_err(failed("make", path))?;
        self.directories.insert(path.to_owned(), EPOCH);
        let directory = open_directory(&parent, &name, path)?;
        if was_gone {
            set_opaque(&directory, path)?;
        }
        Ok(directory)
    }

    /// Makes room for a later entry of the same name.
    fn remove(&mut self, parent: &OwnedFd, name: &Path, path: &Path) -> Result<(), UnpackError> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => {
                self.directories
                    .retain(|directory, _| !directory.starts_with(path));
                let place = through_proc(parent.as_fd()).join(name);
                std::fs::remove_dir_all(place).map_err(|source| UnpackError::File {
                    doing: "replace",
                    path: path.to_owned(),
                    source,
                })
            }
            Err(e) => Err(failed("replace", path)(e)),
        }
    }

    fn finish(mut self) -> Result<(), UnpackError> {
        let directories = std::mem::take(&mut self.directories);
        for (path, mtime) in directories.iter().rev() {
            let times = Timestamps {
                last_access: EPOCH,
                last_modification: *mtime,
            };
            rustix::fs::futimens(self.directory(path)?, &times)
                .map_err(failed("set the time of", path))?;
        }
        Ok(())
    }
}

impl Attributes {
    /// Sets them on what was just made. Owners come first: changing them takes capabilities away.
    fn set(&self, made: BorrowedFd<'_>, path: &Path, has_mode: bool) -> Result<(), UnpackError> {
        let place = through_proc(made);
        let (uid, gid) = (
            rustix::fs::Uid::from_raw(self.uid),
            rustix::fs::Gid::from_raw(self.gid),
        );
        rustix::fs::chownat(made, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
            .map_err(failed("set the owner of", path))?;
        if has_mode {
            rustix::fs::chmod(&place, self.mode).map_err(failed("set the mode of", path))?;
            for (name, value) in &self.xattrs {
                rustix::fs::setxattr(&place, name.as_str(), value, XattrFlags::empty())
                    .map_err(failed("set an attribute of", path))?;
            }
        }
        let times = Timestamps {
            last_access: EPOCH,
            last_modification: self.mtime,
        };
        rustix::fs::utimensat(made, "", &times, AtFlags::EMPTY_PATH)
            .map_err(failed("set the time of", path))
    }
}

fn attributes<R: Read>(path: &Path, entry: &mut Entry<'_, R>) -> Result<Attributes, UnpackError> {
    let mut xattrs = Vec::new();
    let mut mtime = None;
    if let Some(extensions) = entry.pax_extensions().map_err(UnpackError::Archive)? {
        for extension in extensions {
            let extension = extension.map_err(UnpackError::Archive)?;
            let key = extension.key().map_err(|_| field(path, "extension"))?;
            if key == "mtime" {
                mtime = extension.value().ok().and_then(pax_time);
            }
            if let Some(name) = xattr_name(key)? {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    let header = entry.header();
    let fields = header.as_old();
    let number = |value: std::io::Result<u64>, raw: &[u8], what| {
        let value = if is_blank(raw) { Ok(0) } else { value };
        value
            .ok()
            .and_then(|value| u32::try_from(value).ok())
            // The kernel's "leave it as it is".
            .filter(|value| *value != u32::MAX)
            .ok_or_else(|| field(path, what))
    };
    let whole = header.mtime();
    let whole = if is_blank(&fields.mtime) {
        Ok(0)
    } else {
        whole
    };
    let whole = whole.ok().and_then(|seconds| i64::try_from(seconds).ok());
    let (seconds, nanoseconds) = mtime
        .or(whole.map(|seconds| (seconds, 0)))
        .ok_or_else(|| field(path, "time"))?;
    let mode = number(header.mode().map(u64::from), &fields.mode, "mode")?;
    Ok(Attributes {
        uid: number(header.uid(), &fields.uid, "owner")?,
        gid: number(header.gid(), &fields.gid, "group")?,
        mode: Mode::from_raw_mode(mode & 0o7777),
        mtime: Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
        xattrs,
    })
}

/// Makers of archives leave out numbers; for readers they are 0.
fn is_blank(field: &[u8]) -> bool {
    field.iter().all(|byte| matches!(byte, 0 | b' '))
}

fn stat(parent: &OwnedFd, name: &Path, path: &Path) -> Result<Option<Stat>, UnpackError> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn open_directory(parent: &OwnedFd, name: &Path, path: &Path) -> Result<OwnedFd, UnpackError> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(failed("open", path))
}

fn set_opaque(directory: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
    rustix::fs::fsetxattr(directory, OPAQUE_XATTR, b"y", XattrFlags::empty())
        .map_err(failed("set an attribute of", path))
}

/// A path to exactly what a descriptor is open on.
fn through_proc(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> UnpackError {
    let path = path.to_owned();
    move |e| UnpackError::File {
        doing,
        path,
        source: e.into(),
    }
}

fn field(path: &Path, what: &'static str) -> UnpackError {
    UnpackError::Field {
        path: path.to_owned(),
        what,
    }
}
