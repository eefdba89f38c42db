//! cachefiles on-demand, the "fscache mode" of nydus.
//!
//! The kernel keeps a cache file for the metadata and one for each device, and asks on `/dev/cachefiles` for what they
//! lack. The bytes are copied into them: this way there are two copies on the disk.
//!
//! `/dev/cachefiles` can be open once in the whole system, and its cache lives as long as one descriptor of it is open.
//! [`bind`] makes one; whoever is to outlive the daemon keeps a duplicate. While nobody serves, readers wait (they can be
//! killed); a new daemon [`resume`](CachefilesBackend::resume)s with the descriptor and the mounts as they were, and the
//! kernel asks it again. When the last descriptor is closed, reads of what is not cached fail: fail-closed.
//!
//! A device's name in the kernel is `MOUNT-INDEX`, and the metadata's is `MOUNT`, where MOUNT is a number that never comes
//! again: the kernel would answer from an old file of the same name.

mod cache;
mod protocol;
mod serve;
mod table;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{BoxFuture, FutureExt};
use pantala_wire::{ByteRange, Priority};
use rustix::fs::{Mode, OFlags};
use tokio::task::JoinHandle;

use self::serve::{Served, Server};
use super::erofs::{detach, mount_with, refused};
use super::mountinfo::mounts;
use super::{Backend, BackendKind, MountError, MountSpec};
use crate::device::{Device, FillError};
use crate::faults::{DeviceId, Limits};

/// One mount by the name that the kernel has for it.
#[derive(Clone)]
pub struct NamedMount {
    /// The name.
    pub name: String,
    /// The mount.
    pub spec: MountSpec,
}

/// EROFS over cachefiles. Its methods must be called in a tokio runtime, which also serves.
pub struct CachefilesBackend {
    inner: Arc<Inner>,
    serving: JoinHandle<()>,
}

struct Mount {
    named: NamedMount,
    devices: Vec<DeviceId>,
}

struct Inner {
    server: Arc<Server>,
    mounts: Mutex<HashMap<PathBuf, Mount>>,
}

/// Opens `/dev/cachefiles` and binds it to a cache in the folder `dir`, which must lie on a file system with user extended
/// attributes (ext4, xfs, btrfs). What earlier lives have cached there is removed.
pub fn bind(dir: &Path) -> Result<OwnedFd, MountError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| refused(format!("make the folder {}", dir.display()), error))?;
    let control = rustix::fs::open(
        "/dev/cachefiles",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| {
        let hint = match errno {
            rustix::io::Errno::BUSY => " (another process has it, or a mount that it left)",
            rustix::io::Errno::NOENT => " (load the module cachefiles, if the kernel has it)",
            _ => "",
        };
        refused(format!("open /dev/cachefiles{hint}"), errno)
    })?;
    cache::clear(dir).map_err(|error| refused(format!("empty {}", dir.display()), error))?;
    let dir_line = [b"dir ", dir.as_os_str().as_encoded_bytes()].concat();
    for command in [&dir_line[..], b"tag pantala", b"bind ondemand"] {
        let tried = || {
            let command = String::from_utf8_lossy(command);
            format!("tell cachefiles '{command}' (on-demand mode needs CONFIG_CACHEFILES_ONDEMAND)")
        };
        rustix::io::write(&control, command).map_err(|errno| match errno {
            rustix::io::Errno::OPNOTSUPP => MountError::Unsuitable {
                path: dir.to_owned(),
                source: errno.into(),
            },
            _ => refused(tried(), errno),
        })?;
    }
    Ok(control)
}

impl CachefilesBackend {
    /// Serves with a descriptor that [`bind`] has made for `dir`. `limits` bound what is fetched at once and ahead, over
    /// all mounts.
    pub async fn new(control: OwnedFd, dir: &Path, limits: Limits) -> Result<Self, MountError> {
        Self::with_mounts(control, dir, limits, Vec::new()).await
    }

    /// Serves with the descriptor of a daemon that is gone. `mounts` are its mounts, which go on: the kernel asks again
    /// what it was not answered. What is not among them fails.
    pub async fn resume(
        control: OwnedFd,
        dir: &Path,
        limits: Limits,
        mounts: Vec<NamedMount>,
    ) -> Result<Self, MountError> {
        let backend = Self::with_mounts(control, dir, limits, mounts).await?;
        let server = &backend.inner.server;
        server
            .tell("restore")
            .map_err(|error| refused("tell cachefiles 'restore'", error))?;
        Ok(backend)
    }

    async fn with_mounts(
        control: OwnedFd,
        dir: &Path,
        limits: Limits,
        mounts: Vec<NamedMount>,
    ) -> Result<Self, MountError> {
        let server = Server::new(control, dir.to_owned(), limits)
            .map_err(|error| refused("watch /dev/cachefiles", error))?;
        let inner = Arc::new(Inner {
            server: Arc::clone(&server),
            mounts: Mutex::default(),
        });
        for mount in mounts {
            inner.add(mount).await?;
        }
        let serving = tokio::spawn(server.serve());
        Ok(Self { inner, serving })
    }

    /// The mounts, for whoever is to [`resume`](Self::resume) with them.
    pub fn mounts(&self) -> Vec<NamedMount> {
        let mounts = self.inner.mounts();
        mounts.values().map(|mount| mount.named.clone()).collect()
    }
}

impl Drop for CachefilesBackend {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn device_name(mount: &str, index: usize) -> String {
    format!("{mount}-{index}")
}

impl Inner {
    fn mounts(&self) -> MutexGuard<'_, HashMap<PathBuf, Mount>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the mount's metadata and devices are served.
    async fn add(&self, mount: NamedMount) -> Result<(), MountError> {
        let metadata = LocalFile::open(&mount.spec.metadata)
            .map_err(|error| refused(format!("open {}", mount.spec.metadata.display()), error))?;
        let mut served = Vec::with_capacity(mount.spec.devices.len());
        for device in &mount.spec.devices {
            let added = self.server.filler.add(Arc::clone(device)).await;
            let id = added.map_err(|error| refused("begin to fill a device", error))?;
            served.push(Served {
                device: Arc::clone(device),
                id: Some(id),
            });
        }
        let devices = served.iter().filter_map(|served| served.id).collect();
        self.serve(&mount.name, metadata, served);
        let at = mount.spec.at.clone();
        let mount = Mount {
            named: mount,
            devices,
        };
        self.mounts().insert(at, mount);
        Ok(())
    }

    fn serve(&self, name: &str, metadata: LocalFile, devices: Vec<Served>) {
        let size_bytes = metadata.size_bytes();
        let device: Arc<dyn Device> = Arc::new(metadata);
        let mut table = self.server.table();
        table.add(name, Served { device, id: None }, size_bytes);
        for (index, served) in devices.into_iter().enumerate() {
            let size_bytes = served.device.size_bytes();
            table.add(device_name(name, index), served, size_bytes);
        }
    }

    /// From now on reads of the mount fail.
    async fn remove(&self, at: &Path) -> Option<NamedMount> {
        let Mount { named, devices } = self.mounts().remove(at)?;
        self.refuse(&named);
        for device in devices {
            self.server.filler.remove(device).await;
        }
        Some(named)
    }

    fn refuse(&self, mount: &NamedMount) {
        let mut table = self.server.table();
        table.remove(mount.name.as_bytes());
        for index in 0..mount.spec.devices.len() {
            table.remove(device_name(&mount.name, index).as_bytes());
        }
    }

    async fn mount(self: Arc<Self>, spec: MountSpec) -> Result<(), MountError> {
        let at = spec.at.clone();
        if self.mounts().contains_key(&at) {
            let taken = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
            return Err(refused(format!("mount on {} twice", at.display()), taken));
        }
        let name = new_name()?;
        let devices = spec.devices.len();
        self.add(NamedMount {
            name: name.clone(),
            spec,
        })
        .await?;
        let place = at.clone();
        // The kernel opens the files and reads the metadata, and waits for us as it does.
        let mounted = tokio::task::spawn_blocking(move || mount_named(&name, devices, &place))
            .await
            .unwrap_or_else(|error| Err(refused("mount EROFS", std::io::Error::other(error))));
        if mounted.is_err() {
            self.remove(&at).await;
        }
        mounted
    }

    async fn unmount(self: Arc<Self>, at: PathBuf) -> Result<(), MountError> {
        // First of all reads fail, so that the kernel, when it closes the files, finds them unused.
        let mount = self
            .remove(&at)
            .await
            .ok_or_else(|| MountError::NotMounted(at.clone()))?;
        let detached = detach(&at);
        if detached.is_err() && is_mounted(&at) {
            self.add(mount).await?;
        }
        detached
    }
}

/// Whether something is mounted there; yes if that cannot be found out.
fn is_mounted(at: &Path) -> bool {
    mounts().map_or(true, |mounts| mounts.iter().any(|mount| mount.at == at))
}

/// A name that never comes again.
fn new_name() -> Result<String, MountError> {
    let path = "/proc/sys/kernel/random/uuid";
    let uuid =
        std::fs::read_to_string(path).map_err(|error| refused(format!("read {path}"), error))?;
    Ok(uuid.trim().replace('-', ""))
}

fn mount_named(name: &str, devices: usize, at: &Path) -> Result<(), MountError> {
    let devices: Vec<String> = (0..devices).map(|index| device_name(name, index)).collect();
    let mut options = vec![
        ("source", OsStr::new("pantala")),
        ("fsid", OsStr::new(name)),
        ("domain_id", OsStr::new(cache::DOMAIN)),
    ];
    options.extend(devices.iter().map(|name| ("device", OsStr::new(name))));
    mount_with(&options, at)
}

/// The metadata: wholly local.
struct LocalFile {
    path: PathBuf,
    file: File,
    size_bytes: u64,
}

impl LocalFile {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self {
            path: path.to_owned(),
            size_bytes: file.metadata()?.len(),
            file,
        })
    }
}

impl Device for LocalFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn is_complete(&self) -> bool {
        true
    }

    fn fill(&self, _: ByteRange, _: Priority) -> BoxFuture<'_, Result<(), FillError>> {
        std::future::ready(Ok(())).boxed()
    }
}

impl Backend for CachefilesBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Cachefiles
    }

    fn mount(&self, spec: MountSpec) -> BoxFuture<'_, Result<(), MountError>> {
        // A task of its own: a mount whose caller goes away is still made or undone as a whole.
        let task = tokio::spawn(Arc::clone(&self.inner).mount(spec));
        Box::pin(async move {
            task.await
                .map_err(|error| refused("mount", std::io::Error::other(error)))?
        })
    }

    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), MountError>> {
        let task = tokio::spawn(Arc::clone(&self.inner).unmount(at.to_owned()));
        Box::pin(async move {
            task.await
                .map_err(|error| refused("unmount", std::io::Error::other(error)))?
        })
    }
}
