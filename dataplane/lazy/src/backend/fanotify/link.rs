//! The connection to the supervisor's process, which is started where there is none.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use pantala_supervisor::client::{Client, Kept};
use pantala_supervisor::fanotify::{self, Verdict};
use pantala_supervisor::keeper::{KEPT_MAX, WAITING_MAX};
use pantala_supervisor::message::Instance;
use parking_lot::Mutex;

use super::FanotifyConfig;
use crate::backend::MountError;

/// Looks for the socket of a supervisor that was just started, and the pause between two: 5 s in all.
const START_LOOKS: u32 = 250;
const START_PAUSE: Duration = Duration::from_millis(20);
/// Descriptors that a supervisor has for itself, generously.
const OWN_DESCRIPTORS: usize = 64;

/// See the module.
pub(super) struct Link {
    config: FanotifyConfig,
    /// A descriptor of the group of our own: it outlives the supervisor.
    group: OwnedFd,
    instance: Instance,
    client: Mutex<Client>,
}

fn failed(what: impl Into<String>, why: &dyn std::fmt::Display) -> MountError {
    MountError::Supervisor {
        what: what.into(),
        why: why.to_string(),
    }
}

impl Link {
    /// Connects, and asks what is kept.
    pub(super) fn open(config: FanotifyConfig) -> Result<(Self, Vec<Kept>), MountError> {
        let dir = &config.dir;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| failed(format!("its directory {}", dir.display()), &e))?;
        let client = connect_or_start(&config)?;
        let kept = client
            .kept()
            .map_err(|e| failed("asking what it keeps", &e))?;
        let group = client
            .group()
            .try_clone_to_owned()
            .map_err(|e| failed("its group", &e))?;
        let link = Self {
            group,
            instance: client.instance(),
            client: Mutex::new(client),
            config,
        };
        Ok((link, kept))
    }

    pub(super) fn instance(&self) -> Instance {
        self.instance
    }

    pub(super) fn group(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }

    pub(super) fn keep(
        &self,
        name: &str,
        note: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), MountError> {
        let client = self.client.lock();
        client
            .keep(name, note, descriptor)
            .map_err(|e| failed(format!("keeping {name}"), &e))
    }

    pub(super) fn forget(&self, name: &str) -> Result<(), MountError> {
        let client = self.client.lock();
        client
            .forget(name)
            .map_err(|e| failed(format!("forgetting {name}"), &e))
    }

    /// The socket on which faults come.
    pub(super) fn subscribe(&self) -> Result<OwnedFd, MountError> {
        Client::subscribe(&self.config.dir).map_err(|e| failed("asking for events", &e))
    }

    /// After the connection was lost, and with no read left that we know to wait: finds the supervisor
    /// again, or gives another one the group. True where it is another, which keeps nothing yet.
    pub(super) fn renew(&self) -> Result<bool, MountError> {
        let mut client = connect_or_start(&self.config)?;
        let is_new = client.instance() != self.instance;
        if is_new {
            self.refuse_unknown();
            let group = self
                .group
                .try_clone()
                .map_err(|e| failed("copying the group", &e))?;
            client
                .adopt(group, self.instance)
                .map_err(|e| failed("handing the group to another", &e))?;
        }
        *self.client.lock() = client;
        Ok(is_new)
    }

    /// Reads that the dead supervisor had taken from the queue and told nobody of: they wait under the
    /// numbers of its descriptors. They fail, rather than wait for ever.
    fn refuse_unknown(&self) {
        let numbers = KEPT_MAX + WAITING_MAX + OWN_DESCRIPTORS;
        let mut refused = 0;
        for number in 0..numbers as i32 {
            match fanotify::answer(self.group(), number, Verdict::Deny) {
                Ok(true) => refused += 1,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, number, "a read may wait for ever");
                }
            }
        }
        tracing::warn!(
            refused,
            "the supervisor has died; reads that only it knew of failed"
        );
    }
}

fn connect_or_start(config: &FanotifyConfig) -> Result<Client, MountError> {
    match Client::connect(&config.dir) {
        Ok(client) => return Ok(client),
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(failed("connecting", &error)),
    }
    let name = config.supervisor.display();
    let log_path = config.dir.join("supervisor.log");
    let log = File::create(&log_path)
        .map_err(|e| failed(format!("its log {}", log_path.display()), &e))?;
    let mut child = Command::new(&config.supervisor)
        .arg(&config.dir)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|e| failed(format!("starting {name}"), &e))?;
    for _ in 0..START_LOOKS {
        match Client::connect(&config.dir) {
            Ok(client) => {
                // Should it end before the daemon does, somebody has to take note of that.
                std::thread::spawn(move || match child.wait() {
                    Ok(status) => tracing::info!(%status, "the supervisor has ended"),
                    Err(error) => tracing::warn!(%error, "the supervisor's end is not known"),
                });
                tracing::info!(dir = %config.dir.display(), "supervisor started");
                return Ok(client);
            }
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(failed("connecting", &error)),
        }
        if let Ok(Some(status)) = child.try_wait() {
            let said = std::fs::read_to_string(&log_path).unwrap_or_default();
            return Err(failed(
                format!("starting {name}"),
                &format!("{status}: {}", said.trim()),
            ));
        }
        std::thread::sleep(START_PAUSE);
    }
    Err(failed(format!("starting {name}"), &"it does not answer"))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}
