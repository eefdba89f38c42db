//! File-backed EROFS over files that FUSE serves.
//!
//! Each mount has a FUSE file system of its own with one file a device, and the image's `device=` are those files. A read
//! of one asks the device to fill the range and gets its bytes, or `EIO`. It is fail-closed: when the process dies, reads
//! of what is not cached fail, and nothing reads zeros. The mounts of a dead process are of no more use: whoever takes
//! over its folder takes them down ([`FuseBackend::open`]).
//!
//! A device that is complete when it is mounted is given to the kernel as it is, and needs nobody.

mod probe;
mod protocol;
mod records;
mod session;

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use tokio::task::JoinHandle;

pub use self::probe::probe;
use self::records::{Record, Records};
use self::session::{Served, Session};
use super::erofs::{VALUE_BYTES_MAX, detach, mount_with, refused};
use super::{Backend, BackendKind, MountError, MountSpec};
use crate::device::Device;
use crate::faults::{DeviceId, Limits};
use crate::filler::Filler;

/// How long an unmount waits for its session to see that it is over. The kernel says so at once; past this something is
/// wrong with the runtime, and the session is cut off.
const SESSION_END_MAX: Duration = Duration::from_secs(5);

/// EROFS over FUSE. Its methods must be called in a tokio runtime, which also runs the sessions.
pub struct FuseBackend {
    inner: Arc<Inner>,
}

struct Inner {
    records: Records,
    filler: Filler,
    next_number: AtomicU64,
    mounts: Mutex<HashMap<PathBuf, Mount>>,
}

/// One mount and the session beneath it.
struct Mount {
    record: Record,
    devices: Vec<DeviceId>,
    session: JoinHandle<()>,
}

impl FuseBackend {
    /// A backend that keeps its records in the folder `root`, which one process at a time may have. Mounts that a dead
    /// process has left there are taken down; their paths are returned, so that they can be reported.
    /// `limits` bound what is fetched at once and ahead, over all mounts.
    pub fn open(root: &Path, limits: Limits) -> Result<(Self, Vec<PathBuf>), MountError> {
        let (records, taken_down) = Records::open(root)?;
        let inner = Arc::new(Inner {
            records,
            filler: Filler::start(limits),
            next_number: AtomicU64::new(0),
            mounts: Mutex::default(),
        });
        Ok((Self { inner }, taken_down))
    }
}

impl Inner {
    fn mounts(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Mount>> {
        // Nothing panics while it is held, and a map is whole at any time.
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn mount(self: Arc<Self>, spec: MountSpec) -> Result<(), MountError> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        if self.mounts().contains_key(&spec.at) {
            let taken = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
            return Err(refused(
                format!("mount on {} twice", spec.at.display()),
                taken,
            ));
        }
        let record = self.records.note(number, &spec.at, &spec.metadata)?;
        let served = match self.add(&spec.devices).await {
            Ok(served) => served,
            Err(error) => {
                give_up(&record);
                return Err(error);
            }
        };
        let devices: Vec<DeviceId> = served.iter().map(|served| served.id).collect();
        let session = match serve(&record, &spec.at, served, self.filler.clone()) {
            Ok(session) => session,
            Err(error) => {
                self.remove(devices).await;
                give_up(&record);
                return Err(error);
            }
        };
        let at = spec.at.clone();
        // The kernel opens the devices' files, and waits for the session as it does.
        let folder = record.devices();
        let mounted = tokio::task::spawn_blocking(move || mount_over(&folder, &spec)).await;
        match mounted {
            Ok(Ok(())) => {
                let mount = Mount {
                    record,
                    devices,
                    session,
                };
                self.mounts().insert(at, mount);
                Ok(())
            }
            other => {
                let ended = record.unmount_devices();
                session.abort();
                self.remove(devices).await;
                give_up(&record);
                ended?;
                other.map_err(|error| refused("mount EROFS", std::io::Error::other(error)))?
            }
        }
    }

    /// Has the filler know the devices.
    async fn add(&self, devices: &[Arc<dyn Device>]) -> Result<Vec<Served>, MountError> {
        let mut served = Vec::with_capacity(devices.len());
        for device in devices {
            let device = Arc::clone(device);
            let added = self.filler.add(Arc::clone(&device)).await;
            let id = added.map_err(|error| refused("begin to fill a device", error))?;
            served.push(Served { device, id });
        }
        Ok(served)
    }

    async fn remove(&self, devices: Vec<DeviceId>) {
        for device in devices {
            self.filler.remove(device).await;
        }
    }

    async fn unmount(self: Arc<Self>, at: PathBuf) -> Result<(), MountError> {
        let Some(mut mount) = self.mounts().remove(&at) else {
            return Err(MountError::NotMounted(at));
        };
        // Both are tried, whatever comes of the other: what still lives must not be left to serve nobody.
        let detached = detach(&at);
        let ended = mount.record.unmount_devices();
        if tokio::time::timeout(SESSION_END_MAX, &mut mount.session)
            .await
            .is_err()
        {
            tracing::error!(at = %at.display(), "a FUSE session does not end; it is cut off");
            mount.session.abort();
        }
        self.remove(mount.devices).await;
        detached.and(ended).and_then(|()| mount.record.forget())
    }
}

/// A record whose mount could not be made goes; if it cannot, the next process takes it down.
fn give_up(record: &Record) {
    if let Err(error) = record.forget() {
        tracing::warn!(%error, "the record of a mount that was not made stays");
    }
}

fn connect() -> Result<OwnedFd, MountError> {
    rustix::fs::open(
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(|errno| refused("open /dev/fuse", errno))
}

/// Mounts the devices' file system and begins to serve it.
fn serve(
    record: &Record,
    at: &Path,
    devices: Vec<Served>,
    filler: Filler,
) -> Result<JoinHandle<()>, MountError> {
    let kernel = connect()?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,max_read={}",
        kernel.as_raw_fd(),
        protocol::READ_BYTES_MAX,
    );
    let options = CString::new(options)
        .map_err(|error| refused("write FUSE's options", std::io::Error::other(error)))?;
    let folder = record.devices();
    rustix::mount::mount(
        "pantala",
        &folder,
        "fuse.pantala",
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        options.as_c_str(),
    )
    .map_err(|errno| refused(format!("mount FUSE on {}", folder.display()), errno))?;
    let session = match Session::new(kernel, devices, filler) {
        Ok(session) => session,
        Err(error) => {
            record.unmount_devices()?;
            return Err(refused("watch /dev/fuse", error));
        }
    };
    let at = at.to_owned();
    Ok(tokio::spawn(async move {
        if let Err(error) = session.serve().await {
            tracing::error!(%error, at = %at.display(), "a FUSE session broke off: reads of its mount fail");
        }
    }))
}

/// Mounts EROFS over the files in `folder`.
fn mount_over(folder: &Path, spec: &MountSpec) -> Result<(), MountError> {
    let paths: Vec<PathBuf> = spec
        .devices
        .iter()
        .enumerate()
        .map(|(index, device)| {
            let path = device.path();
            if device.is_complete() && path.as_os_str().len() <= VALUE_BYTES_MAX {
                path.to_owned()
            } else {
                folder.join(index.to_string())
            }
        })
        .collect();
    let mut options = vec![("source", spec.metadata.as_os_str())];
    options.extend(paths.iter().map(|path| ("device", path.as_os_str())));
    mount_with(&options, &spec.at)
}

impl Backend for FuseBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Fuse
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
