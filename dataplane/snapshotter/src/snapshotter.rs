//! Performs what the tree decides: records, directories, mounts.
//!
//! Three kinds of state hang together, and the order in which they change makes a crash harmless: a
//! snapshot's directories are there before its record and go after it. So a record always has its
//! files, and a directory without a record is a leftover that [`Snapshotter::cleanup`] removes. Calls
//! that change the tree take turns; walking a tree of files, downloading and mounting happen outside
//! that turn.

mod layers;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{FlockOperation, flock, statfs};

use crate::core::layer::REF;
use crate::core::mounts::{is_mountable, mounts};
use crate::core::{
    Change, Content, Filter, Kind, Labels, Mount, Overlay, Snapshot, Tree, TreeError, Usage,
};
use crate::directories::{Directories, probe_overlay};
use crate::error::{DiskError, Error, StartError, about};
use crate::images::ImageFinder;
use crate::lazy::LazyLayers;
use crate::records::Records;
use crate::usage::disk_usage;

/// `f_type` of overlayfs, which cannot be the upper layer of another.
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// On whose behalf a call is made; tells which of containerd's images a lazy layer belongs to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Call {
    /// containerd's namespace.
    pub namespace: String,
    /// The name that containerd knows this snapshotter by.
    pub snapshotter: String,
}

/// The snapshots of one node. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotter {
    inner: Arc<Inner>,
}

struct Inner {
    tree: RwLock<Tree>,
    /// Held from a plan until its change is applied.
    turn: tokio::sync::Mutex<()>,
    records: Records,
    directories: Directories,
    /// Directories that belong to nobody yet, or whose record could not be read: not leftovers.
    reserved: Mutex<HashSet<u64>>,
    /// One mount at a time on one directory.
    mounting: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
    overlay: Overlay,
    lazy: Option<Arc<dyn LazyLayers>>,
    images: Option<ImageFinder>,
    /// Tells a second process to go away, until this one ends.
    _lock: File,
}

/// An id whose directories are being made.
struct Reserved<'a> {
    inner: &'a Inner,
    id: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.inner.reserved.lock().remove(&self.id);
    }
}

impl Snapshotter {
    /// Opens the snapshots below `root` and removes what a crash left half done.
    ///
    /// # Errors
    /// Where `root` cannot be used, or is in use.
    pub async fn open(
        root: PathBuf,
        lazy: Option<Arc<dyn LazyLayers>>,
        images: Option<ImageFinder>,
    ) -> Result<Self, StartError> {
        let snapshotter = tokio::task::spawn_blocking(move || open(&root, lazy, images))
            .await
            .map_err(|error| StartError::Unfinished(error.to_string()))??;
        let removed = snapshotter.cleanup().await;
        if let Err(error) = removed {
            tracing::warn!(%error, "leftovers of removed snapshots stay for now");
        }
        Ok(snapshotter)
    }

    /// Makes an active snapshot or a view on `parent`. A lazy layer's comes back as
    /// [`TreeError::AlreadyExists`], committed: that tells containerd not to fetch it.
    ///
    /// # Errors
    /// As containerd's own snapshotters, and where a lazy layer cannot be mounted.
    pub async fn create(
        &self,
        call: &Call,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let content = Content::of(&labels)?;
        if content != Content::Files && self.inner.lazy.is_none() {
            return Err(Error::NoLazyMounts(key.to_owned()));
        }
        if let Some(target) = labels.get(REF).cloned()
            && kind == Kind::Active
            && content.needs_no_download()
        {
            return self
                .adopt(call, &target, content, key, parent, labels)
                .await;
        }
        // Refused before anything is mounted for it.
        let plan = |tree: &Tree, id| {
            tree.plan_create(id, kind, key, parent, labels.clone(), now_unix_ns())
        };
        plan(&self.inner.tree.read(), 0)?;
        let lowers = match parent {
            Some(parent) => self.lowers(call, parent, true).await?,
            None => Vec::new(),
        };
        let reserved = self.inner.reserve();
        let id = reserved.id;
        let lower = lowers.first().cloned();
        let made = self
            .blocking(move |inner| inner.directories.create(id, kind, lower.as_deref()))
            .await;
        let made = match made {
            Ok(()) => self.change(|tree| plan(tree, id)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            self.discard(id).await;
            return Err(error);
        }
        Ok(self.inner.mounts(kind, id, &lowers))
    }

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// It is missing or committed, or a lazy layer cannot be mounted.
    pub async fn mounts(&self, call: &Call, key: &str) -> Result<Vec<Mount>, Error> {
        let (id, kind) = {
            let tree = self.inner.tree.read();
            let snapshot = tree.get(key)?;
            (snapshot.id, snapshot.kind)
        };
        if kind == Kind::Committed {
            return Err(Error::Tree(TreeError::FailedPrecondition {
                what: "mount",
                name: key.to_owned(),
                why: "it is committed: prepare another on it, or a view",
            }));
        }
        let lowers = self.lowers(call, key, false).await?;
        Ok(self.inner.mounts(kind, id, &lowers))
    }

    /// The active snapshot `key` becomes the committed one called `name`.
    ///
    /// # Errors
    /// As containerd's own snapshotters.
    pub async fn commit(&self, name: &str, key: &str, labels: Labels) -> Result<(), Error> {
        Content::of(&labels)?;
        let plan =
            |tree: &Tree, usage| tree.plan_commit(name, key, labels.clone(), usage, now_unix_ns());
        plan(&self.inner.tree.read(), Usage::default())?;
        let id = self.inner.tree.read().get(key)?.id;
        let usage = self
            .blocking(move |inner| {
                inner.directories.sync(id)?;
                inner.usage(id)
            })
            .await?;
        self.change(|tree| plan(tree, usage)).await?;
        Ok(())
    }

    /// Removes `key` and its files.
    ///
    /// # Errors
    /// It is missing, or another stands on it. That files cannot be removed is none: what is left goes
    /// at the next [`Self::cleanup`].
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let change = self.change(|tree| tree.plan_remove(key)).await?;
        if let Change::Delete { id, .. } = change {
            self.discard(id).await;
        }
        Ok(())
    }

    /// What is known of `key`.
    ///
    /// # Errors
    /// It is missing.
    pub fn stat(&self, key: &str) -> Result<Snapshot, Error> {
        Ok(self.inner.tree.read().get(key)?.clone())
    }

    /// New labels for `name`, as [`Tree::plan_update`] has it.
    ///
    /// # Errors
    /// It is missing, or a path names what cannot change.
    pub async fn update(
        &self,
        name: &str,
        labels: Labels,
        paths: &[String],
    ) -> Result<Snapshot, Error> {
        self.change(|tree| tree.plan_update(name, labels.clone(), paths, now_unix_ns()))
            .await?;
        self.stat(name)
    }

    /// All that `filter` wants.
    pub fn list(&self, filter: &Filter) -> Vec<Snapshot> {
        let tree = self.inner.tree.read();
        tree.iter()
            .filter(|snapshot| filter.matches(snapshot))
            .cloned()
            .collect()
    }

    /// The disk that `key` takes without its parents.
    ///
    /// # Errors
    /// It is missing, or its files cannot be counted.
    pub async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let snapshot = self.stat(key)?;
        if snapshot.kind != Kind::Active {
            return Ok(snapshot.usage);
        }
        self.blocking(move |inner| inner.usage(snapshot.id)).await
    }

    /// Removes the directories that no snapshot has.
    ///
    /// # Errors
    /// Where directories cannot be listed. What cannot be removed is logged and stays.
    pub async fn cleanup(&self) -> Result<(), Error> {
        let ids = {
            // In turn, so that no directory is just between its record and its removal.
            let _turn = self.inner.turn.lock().await;
            self.blocking(|inner| {
                let mut ids = inner.directories.ids()?;
                let (tree, reserved) = (inner.tree.read(), inner.reserved.lock());
                ids.retain(|id| !tree.has_id(*id) && !reserved.contains(id));
                Ok(ids)
            })
            .await?
        };
        for id in ids {
            self.discard(id).await;
        }
        Ok(())
    }

    /// Plans, makes durable and applies one change.
    async fn change(
        &self,
        plan: impl Fn(&Tree) -> Result<Change, TreeError>,
    ) -> Result<Change, Error> {
        let _turn = self.inner.turn.lock().await;
        let change = plan(&self.inner.tree.read())?;
        let durable = change.clone();
        self.blocking(move |inner| match &durable {
            Change::Write(snapshot) => inner.records.write(snapshot),
            Change::Delete { id, .. } => inner.records.delete(*id),
        })
        .await?;
        self.inner.tree.write().apply(change.clone());
        Ok(change)
    }

    /// Work that waits for the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(Error::Unfinished(error.to_string())),
        }
    }
}

fn open(
    root: &Path,
    lazy: Option<Arc<dyn LazyLayers>>,
    images: Option<ImageFinder>,
) -> Result<Snapshotter, StartError> {
    std::fs::create_dir_all(root).map_err(about("create", root))?;
    let unsuitable = |why| {
        let path = root.to_owned();
        Err(StartError::Unsuitable { path, why })
    };
    if !is_mountable(root) {
        return unsuitable(
            "overlayfs cannot be told of a path with a comma, colon, quote or backslash",
        );
    }
    let file_system = statfs(root).map_err(about("look at", root))?;
    if u64::try_from(file_system.f_type) == Ok(OVERLAYFS_MAGIC) {
        return unsuitable("it lies on overlayfs, which cannot be the upper layer of another");
    }
    let lock_path = root.join("lock");
    let lock = File::create(&lock_path).map_err(about("create", &lock_path))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(StartError::InUse(root.to_owned()));
    }
    let records = Records::open(root.join("records"))?;
    let directories = Directories::open(root.join("snapshots"))?;
    let loaded = records.load()?;
    let next_id = directories.ids()?.into_iter().max().unwrap_or(0) + 1;
    tracing::info!(snapshots = loaded.snapshots.len(), root = %root.display(), "snapshotter");
    Ok(Snapshotter {
        inner: Arc::new(Inner {
            tree: RwLock::new(Tree::load(loaded.snapshots, next_id)),
            turn: tokio::sync::Mutex::default(),
            records,
            directories,
            reserved: Mutex::new(loaded.damaged.into_iter().collect()),
            mounting: Mutex::default(),
            overlay: probe_overlay(),
            lazy,
            images,
            _lock: lock,
        }),
    })
}

impl Inner {
    fn reserve(&self) -> Reserved<'_> {
        let id = self.tree.write().take_id();
        self.reserved.lock().insert(id);
        Reserved { inner: self, id }
    }

    fn usage(&self, id: u64) -> Result<Usage, DiskError> {
        let dir = self.directories.fs(id);
        disk_usage(&dir).map_err(about("count", &dir))
    }

    fn mounts(&self, kind: Kind, id: u64, lowers: &[PathBuf]) -> Vec<Mount> {
        let (fs, work) = (self.directories.fs(id), self.directories.work(id));
        mounts(kind, &fs, &work, lowers, self.overlay)
    }
}

fn now_unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        // A clock before 1970 or after 2554.
        .unwrap_or(0)
}
