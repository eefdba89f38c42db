//! A snapshotter in a directory of its own, and file trees made and read through its mounts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pantala_snapshotter::core::{Kind, Labels, Mount};
use pantala_snapshotter::{Call, Error, LazyLayers, Snapshotter};
use rustix::mount::{MountFlags, UnmountFlags};

/// Runs `test` where mounts are possible.
pub(crate) fn as_root(test: impl AsyncFnOnce()) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED HERE: mounts need root");
        return;
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test());
}

pub(crate) struct Stage {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) snapshotter: Snapshotter,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::with(None).await
    }

    pub(crate) async fn with(lazy: Option<Arc<dyn LazyLayers>>) -> Self {
        // Not where tests usually go: that may be a tmpfs without what overlayfs needs.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let snapshotter = open(dir.path(), lazy).await;
        Self { dir, snapshotter }
    }

    /// As a process that is killed and started again: nothing is told to end.
    pub(crate) async fn restart(self) -> Self {
        let Self { dir, snapshotter } = self;
        drop(snapshotter);
        let snapshotter = open(dir.path(), None).await;
        Self { dir, snapshotter }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Error> {
        self.create(Kind::Active, key, parent, Labels::new()).await
    }

    pub(crate) async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Error> {
        self.create(Kind::View, key, parent, Labels::new()).await
    }

    pub(crate) async fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let parent = (!parent.is_empty()).then_some(parent);
        self.snapshotter
            .create(&Call::default(), kind, key, parent, labels)
            .await
    }

    pub(crate) async fn commit(&self, name: &str, key: &str) -> Result<(), Error> {
        self.snapshotter.commit(name, key, Labels::new()).await
    }

    /// Prepares on `parent`, changes it, commits it as `name`.
    pub(crate) async fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("{name}-key");
        let mounts = self.prepare(&key, parent).await.unwrap();
        change(self.mount(&mounts).path());
        self.commit(name, &key).await.unwrap();
    }

    /// What a view of `name` shows.
    pub(crate) async fn seen(&self, name: &str) -> Shown {
        let key = format!("{name}-seen");
        let mounts = self.view(&key, name).await.unwrap();
        let shown = show(self.mount(&mounts).path());
        self.snapshotter.remove(&key).await.unwrap();
        shown
    }

    pub(crate) fn mount(&self, mounts: &[Mount]) -> Mounted {
        let at = tempfile::tempdir_in(self.dir.path()).unwrap();
        mount_all(mounts, at.path());
        Mounted { at }
    }

    /// The names below `snapshots`.
    pub(crate) fn directories(&self) -> usize {
        fs::read_dir(self.root().join("snapshots")).unwrap().count()
    }
}

async fn open(dir: &Path, lazy: Option<Arc<dyn LazyLayers>>) -> Snapshotter {
    Snapshotter::open(dir.join("root"), lazy, None)
        .await
        .unwrap()
}

/// Does with mounts what containerd does with them.
fn mount_all(mounts: &[Mount], at: &Path) {
    for mount in mounts {
        let mut flags = MountFlags::empty();
        let mut data = Vec::new();
        for option in &mount.options {
            match option.as_str() {
                "ro" => flags |= MountFlags::RDONLY,
                "rw" | "rbind" => {}
                other => data.push(other),
            }
        }
        if mount.kind == "bind" {
            rustix::mount::mount_bind_recursive(&mount.source, at).unwrap();
            if flags.contains(MountFlags::RDONLY) {
                rustix::mount::mount_remount(at, MountFlags::BIND | MountFlags::RDONLY, "")
                    .unwrap();
            }
        } else {
            let data = std::ffi::CString::new(data.join(",")).unwrap();
            rustix::mount::mount(&mount.source, at, mount.kind, flags, data.as_c_str()).unwrap();
        }
    }
}

/// A mounted snapshot, until it is dropped.
pub(crate) struct Mounted {
    at: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn path(&self) -> &Path {
        self.at.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(self.at.path(), UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.at.path().display());
        }
    }
}

/// Every path with its kind, mode, owner and content.
pub(crate) type Shown = BTreeMap<PathBuf, String>;

pub(crate) fn show(root: &Path) -> Shown {
    let mut shown = Shown::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_dir() {
                dirs.push(path.clone());
                "dir".to_owned()
            } else if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if meta.file_type().is_char_device() {
                format!("char {}", meta.rdev())
            } else {
                format!("{} links {:?}", meta.nlink(), fs::read(&path).unwrap())
            };
            let mode = meta.permissions().mode();
            let text = format!("{mode:o} {}:{} {content}", meta.uid(), meta.gid());
            shown.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    shown
}

/// Writes `text` to `name` below `root`.
pub(crate) fn write(root: &Path, name: &str, text: &str) {
    fs::write(root.join(name), text).unwrap();
}
