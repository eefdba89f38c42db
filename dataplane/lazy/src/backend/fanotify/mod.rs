//! fanotify pre-content events on file-backed EROFS mounts.
//!
//! The kernel asks before it reads a marked data file, and waits for the answer. The supervisor's process
//! ([`pantala_supervisor`]) stands between: it reads the events and holds what must survive the daemon.
//! Here is the daemon's side. [`FanotifyBackend::open`] finds the supervisor or starts it;
//! mounts of an earlier daemon are taken up with [`Backend::adopt`]; [`FanotifyBackend::start`] begins to
//! answer, and from then on events of files that nobody adopted are refused.
//!
//! If the supervisor dies while the daemon lives, nothing is lost: the daemon holds the group too. It
//! answers what it has been asked, refuses what only the dead one knew, and starts another.

mod driver;
mod link;
pub mod probe;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use pantala_supervisor::client::Kept;
use pantala_supervisor::fanotify;
use pantala_supervisor::message::Instance;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::{Backend, BackendKind, MountError, MountSpec, erofs};
use crate::device::Device;
use crate::faults::Limits;
use driver::{Command, Driver};
use link::Link;

/// Mounts and unmounts under way; who comes then waits.
const COMMANDS_MAX: usize = 64;

/// What the backend is told.
#[derive(Debug, Clone)]
pub struct FanotifyConfig {
    /// Where the supervisor has its socket; made where absent, closed to other users.
    pub dir: PathBuf,
    /// The supervisor's program.
    pub supervisor: PathBuf,
    /// How much is fetched at once.
    pub limits: Limits,
}

/// Mounts over fanotify. Dropped, it answers no more: readers wait for the next daemon.
pub struct FanotifyBackend {
    link: Arc<Link>,
    commands: mpsc::Sender<Command>,
    mounts: Mutex<HashMap<PathBuf, Vec<Arc<dyn Device>>>>,
}

impl FanotifyBackend {
    /// Connects to the supervisor, or starts one; must be called on a tokio runtime. Also returns what
    /// an earlier daemon had kept: descriptors by the name that [`kept_name`] gives a data file.
    ///
    /// # Errors
    /// [`MountError::Supervisor`].
    pub async fn open(config: FanotifyConfig) -> Result<(Self, Vec<Kept>), MountError> {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let limits = config.limits;
        let opened = tokio::task::spawn_blocking(move || Link::open(config)).await;
        let (link, kept) = opened.map_err(|error| MountError::Supervisor {
            what: "connecting".into(),
            why: error.to_string(),
        })??;
        let link = Arc::new(link);
        tokio::spawn(Driver::new(Arc::clone(&link), limits).run(receiver));
        let backend = Self {
            link,
            commands,
            mounts: Mutex::default(),
        };
        Ok((backend, kept))
    }

    /// Whether a supervisor serves `dir` now. Blocks, for a moment.
    pub fn is_supervised(dir: &Path) -> bool {
        pantala_supervisor::client::Client::connect(dir).is_ok()
    }

    /// Lets go of a kept data file that belongs to no mount any more: its reads raise no more events.
    ///
    /// # Errors
    /// [`MountError::Supervisor`].
    pub fn release(&self, path: &Path, file: &OwnedFd) -> Result<(), MountError> {
        if let Err(error) = fanotify::unmark(self.link.group(), file.as_fd()) {
            tracing::debug!(%error, path = %path.display(), "not marked");
        }
        self.link.forget(&kept_name(path))
    }

    /// Which life of the kernel's group this is: mounts that were made in another are poisoned.
    pub fn instance(&self) -> Instance {
        self.link.instance()
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// [`MountError::Supervisor`].
    pub async fn start(&self) -> Result<(), MountError> {
        self.command(|reply| Command::Start { reply }).await
    }

    /// Has a note kept in the supervisor's memory: what must survive the daemon and not touch a disk.
    ///
    /// # Errors
    /// [`MountError::Supervisor`].
    pub fn keep_note(&self, name: &str, note: &[u8]) -> Result<(), MountError> {
        self.link.keep(name, note, None)
    }

    /// Has it forgotten.
    ///
    /// # Errors
    /// [`MountError::Supervisor`].
    pub fn forget(&self, name: &str) -> Result<(), MountError> {
        self.link.forget(name)
    }

    async fn command(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), MountError>>) -> Command,
    ) -> Result<(), MountError> {
        let (reply, answer) = oneshot::channel();
        let gone = || MountError::Supervisor {
            what: "events".into(),
            why: "the loop that answers the kernel has ended".into(),
        };
        let sent = self.commands.send(command(reply)).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn watch(&self, devices: &[Arc<dyn Device>]) -> Result<(), MountError> {
        for (count, device) in devices.iter().enumerate() {
            let device = Arc::clone(device);
            if let Err(error) = self.command(|reply| Command::Watch { device, reply }).await {
                self.unwatch(&devices[..count]).await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn unwatch(&self, devices: &[Arc<dyn Device>]) {
        for device in devices {
            let device = Arc::clone(device);
            let done = self.command(|reply| Command::Unwatch { device, reply });
            if let Err(error) = done.await {
                tracing::warn!(%error, "a data file stays watched");
            }
        }
    }
}

/// The name under which the supervisor keeps the descriptor of a data file.
pub fn kept_name(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// The data file of a kept descriptor's name.
pub fn kept_path(name: &str) -> Option<&Path> {
    name.strip_prefix("file:").map(Path::new)
}

/// The descriptors of data files among what was kept, by their paths.
pub fn kept_files(kept: Vec<Kept>) -> HashMap<PathBuf, OwnedFd> {
    let files = kept.into_iter().filter_map(|kept| {
        let path = kept_path(&kept.name)?.to_owned();
        Some((path, kept.descriptor?))
    });
    files.collect()
}

impl Backend for FanotifyBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Fanotify
    }

    fn mount(&self, spec: MountSpec) -> BoxFuture<'_, Result<(), MountError>> {
        Box::pin(async move {
            // Marks first: a mount opens the data files, and only then it is settled for good
            // whether their reads raise events.
            self.watch(&spec.devices).await?;
            let MountSpec {
                metadata,
                devices,
                at,
            } = spec;
            let mounted = {
                let (devices, at) = (devices.clone(), at.clone());
                blocking(move || {
                    let paths: Vec<&Path> = devices.iter().map(|device| device.path()).collect();
                    erofs::mount(&metadata, &paths, &at)
                })
                .await
            };
            match mounted {
                Ok(()) => {
                    self.mounts.lock().insert(at, devices);
                    Ok(())
                }
                Err(error) => {
                    self.unwatch(&devices).await;
                    Err(error)
                }
            }
        })
    }

    fn adopt(&self, spec: MountSpec) -> BoxFuture<'_, Result<(), MountError>> {
        Box::pin(async move {
            self.watch(&spec.devices).await?;
            self.mounts.lock().insert(spec.at, spec.devices);
            Ok(())
        })
    }

    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), MountError>> {
        Box::pin(async move {
            let devices = self.mounts.lock().get(at).cloned();
            let devices = devices.ok_or_else(|| MountError::NotMounted(at.to_owned()))?;
            let of = at.to_owned();
            blocking(move || erofs::unmount(&of)).await?;
            self.mounts.lock().remove(at);
            self.unwatch(&devices).await;
            Ok(())
        })
    }
}

async fn blocking(
    work: impl FnOnce() -> Result<(), MountError> + Send + 'static,
) -> Result<(), MountError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(MountError::Supervisor {
            what: "a call of the kernel".into(),
            why: error.to_string(),
        }),
    }
}
