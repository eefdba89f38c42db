//! The loop between supervisor, [`Faults`] and devices: it performs and decides nothing.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use pantala_supervisor::fanotify::{self, Verdict};
use pantala_supervisor::message::{self, Answer, BATCH_MAX, Fault};
use pantala_supervisor::socket;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::MissedTickBehavior;

use super::kept_name;
use super::link::Link;
use crate::backend::MountError;
use crate::device::Device;
use crate::faults::{Action, DeviceId, Faults, FillId, Limits};

/// How often devices are looked at, and failed background fills and lost supervisors tried again.
const TICK: Duration = Duration::from_secs(1);

type Reply = oneshot::Sender<Result<(), MountError>>;

/// What the loop is told.
pub(super) enum Command {
    /// One more mount reads this device.
    Watch {
        device: Arc<dyn Device>,
        reply: Reply,
    },
    /// One less.
    Unwatch {
        device: Arc<dyn Device>,
        reply: Reply,
    },
    /// Begin to answer.
    Start { reply: Reply },
}

/// How the kernel names a file.
type FileId = (u64, u64);

struct Watched {
    id: DeviceId,
    device: Arc<dyn Device>,
    mounts: usize,
    /// Its reads raise events.
    marked: bool,
}

pub(super) struct Driver {
    link: Arc<Link>,
    faults: Faults<i32>,
    watched: HashMap<FileId, Watched>,
    by_id: HashMap<DeviceId, Arc<dyn Device>>,
    next_id: u64,
    /// [`Command::Start`] was given.
    started: bool,
    socket: Option<UnixDatagram>,
    /// Not taken by the socket yet; at most as many as reads that wait.
    answers: VecDeque<Answer>,
    fills: JoinSet<(FillId, bool)>,
    fills_by_task: HashMap<Id, FillId>,
}

fn file_id(device: &dyn Device) -> Result<FileId, MountError> {
    match rustix::fs::fstat(device.file()) {
        Ok(stat) => Ok((stat.st_dev, stat.st_ino)),
        Err(error) => Err(MountError::Kernel {
            what: format!("look at {}", device.path().display()),
            source: error.into(),
        }),
    }
}

impl Driver {
    pub(super) fn new(link: Arc<Link>, limits: Limits) -> Self {
        Self {
            link,
            faults: Faults::new(limits),
            watched: HashMap::new(),
            by_id: HashMap::new(),
            next_id: 0,
            started: false,
            socket: None,
            answers: VecDeque::new(),
            fills: JoinSet::new(),
            fills_by_task: HashMap::new(),
        }
    }

    /// Runs until all who could send commands are gone.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.perform();
            self.send_answers();
            tokio::select! {
                () = ready(self.socket.as_ref(), !self.answers.is_empty()) => self.receive(),
                Some(ended) = self.fills.join_next_with_id(), if !self.fills.is_empty() => {
                    self.filled(ended);
                }
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    fn command(&mut self, command: Command) {
        let (done, reply) = match command {
            Command::Watch { device, reply } => (self.watch(device), reply),
            Command::Unwatch { device, reply } => (self.unwatch(device.as_ref()), reply),
            Command::Start { reply } => {
                self.started = true;
                (self.subscribe(), reply)
            }
        };
        if reply.send(done).is_err() {
            tracing::debug!("nobody waited for the end of a command");
        }
    }

    fn subscribe(&mut self) -> Result<(), MountError> {
        let socket = self.link.subscribe()?;
        // A socket of packets, and waited for as any other: the standard library has no type of its own
        // for those that are connected.
        let socket = UnixDatagram::from_std(socket.into()).map_err(|source| {
            let what = "wait for the supervisor's events".into();
            MountError::Kernel { what, source }
        })?;
        self.socket = Some(socket);
        Ok(())
    }

    fn watch(&mut self, device: Arc<dyn Device>) -> Result<(), MountError> {
        let file = file_id(device.as_ref())?;
        if let Some(watched) = self.watched.get_mut(&file) {
            watched.mounts += 1;
            return Ok(());
        }
        // What is complete needs nobody.
        let marked = !device.is_complete();
        if marked {
            let name = kept_name(device.path());
            self.link.keep(&name, &[], Some(device.file().as_fd()))?;
            if let Err(source) = fanotify::mark(self.link.group(), device.file().as_fd()) {
                self.link.forget(&name)?;
                let path = device.path().to_owned();
                return Err(MountError::Unsuitable { path, source });
            }
        }
        let id = DeviceId(self.next_id);
        self.next_id += 1;
        self.by_id.insert(id, Arc::clone(&device));
        self.faults.add(id, device.size_bytes(), marked);
        let new = Watched {
            id,
            device,
            mounts: 1,
            marked,
        };
        self.watched.insert(file, new);
        Ok(())
    }

    fn unwatch(&mut self, device: &dyn Device) -> Result<(), MountError> {
        let file = file_id(device)?;
        let Some(watched) = self.watched.get_mut(&file) else {
            return Ok(());
        };
        watched.mounts -= 1;
        if watched.mounts > 0 {
            return Ok(());
        }
        unmark(&self.link, watched);
        self.faults.remove(watched.id);
        self.by_id.remove(&watched.id);
        self.watched.remove(&file);
        Ok(())
    }

    fn tick(&mut self) {
        for watched in self.watched.values_mut() {
            if watched.marked && watched.device.is_complete() {
                unmark(&self.link, watched);
            }
        }
        self.faults.tick();
        if self.started && self.socket.is_none() {
            self.reconnect();
        }
    }

    /// The supervisor is gone, or has been asked by somebody else. Not before every read that we know of
    /// is answered: under another supervisor the same numbers name other reads.
    fn reconnect(&mut self) {
        if self.faults.waiting() > 0 || !self.answers.is_empty() {
            return;
        }
        let renewed = self.link.renew().and_then(|is_new| {
            for watched in self.watched.values().filter(|w| is_new && w.marked) {
                let name = kept_name(watched.device.path());
                let file = watched.device.file().as_fd();
                self.link.keep(&name, &[], Some(file))?;
            }
            self.subscribe()
        });
        match renewed {
            Ok(()) => tracing::warn!("connected to the supervisor again"),
            Err(error) => tracing::error!(%error, "lazy mounts wait for a supervisor"),
        }
    }

    /// Takes what the supervisor has sent.
    fn receive(&mut self) {
        loop {
            let Some(socket) = &self.socket else {
                return;
            };
            let received = socket.try_io(Interest::READABLE, || socket::receive(socket.as_fd()));
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.lost(&error),
                Ok(received) if received.packet.is_empty() => {
                    self.lost(&io::ErrorKind::UnexpectedEof.into());
                }
                Ok(received) => match message::parse_faults(&received.packet) {
                    Ok(faults) => faults.into_iter().for_each(|fault| self.fault(fault)),
                    Err(malformed) => self.lost(&io::Error::other(malformed)),
                },
            }
        }
    }

    fn lost(&mut self, error: &io::Error) {
        tracing::error!(%error, "the connection to the supervisor is lost");
        self.socket = None;
    }

    fn fault(&mut self, fault: Fault) {
        let Fault {
            number,
            offset,
            count,
            ..
        } = fault;
        match self.watched.get(&(fault.device, fault.inode)) {
            Some(watched) => self.faults.fault(number, watched.id, offset, count),
            None => {
                tracing::warn!(
                    ?fault,
                    "a read of a file that belongs to no mount is refused"
                );
                self.answers.push_back(Answer {
                    number,
                    verdict: Verdict::Deny,
                });
            }
        }
    }

    fn perform(&mut self) {
        while let Some(action) = self.faults.poll() {
            match action {
                Action::Answer { event, ok } => self.answers.push_back(Answer {
                    number: event,
                    verdict: if ok { Verdict::Allow } else { Verdict::Deny },
                }),
                Action::Fill {
                    fill,
                    device,
                    range,
                    urgency,
                } => {
                    let Some(device) = self.by_id.get(&device).cloned() else {
                        self.faults.filled(fill, false);
                        continue;
                    };
                    let task = self.fills.spawn(async move {
                        let done = device.fill(range, urgency).await;
                        if let Err(error) = &done {
                            tracing::warn!(%error, ?range, ?urgency, "bytes of a lazy mount are missing");
                        }
                        (fill, done.is_ok())
                    });
                    self.fills_by_task.insert(task.id(), fill);
                }
            }
        }
    }

    fn filled(&mut self, ended: Result<(Id, (FillId, bool)), JoinError>) {
        match ended {
            Ok((task, (fill, ok))) => {
                self.fills_by_task.remove(&task);
                self.faults.filled(fill, ok);
            }
            Err(error) => {
                tracing::error!(%error, "a fill has panicked");
                if let Some(fill) = self.fills_by_task.remove(&error.id()) {
                    self.faults.filled(fill, false);
                }
            }
        }
    }

    fn send_answers(&mut self) {
        let Some(socket) = &self.socket else {
            self.answer_directly();
            return;
        };
        while !self.answers.is_empty() {
            let count = self.answers.len().min(BATCH_MAX);
            let batch: Vec<Answer> = self.answers.iter().take(count).copied().collect();
            let packet = message::encode_answers(&batch);
            let sent = socket.try_io(Interest::WRITABLE, || {
                socket::send(socket.as_fd(), &packet, None)
            });
            match sent {
                Ok(()) => drop(self.answers.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.lost(&error);
                    return self.answer_directly();
                }
            }
        }
    }

    /// Without a supervisor: the group is ours too.
    fn answer_directly(&mut self) {
        for answer in self.answers.drain(..) {
            let written = fanotify::answer(self.link.group(), answer.number, answer.verdict);
            if let Err(error) = written {
                tracing::error!(%error, "an answer does not reach the kernel, its reader waits");
            }
        }
    }
}

/// Its reads raise no more events, and no descriptor need be kept for it.
fn unmark(link: &Link, watched: &mut Watched) {
    if !std::mem::take(&mut watched.marked) {
        return;
    }
    let (path, file) = (watched.device.path(), watched.device.file());
    if let Err(error) = fanotify::unmark(link.group(), file.as_fd()) {
        tracing::warn!(%error, path = %path.display(), "a data file stays marked");
    }
    if let Err(error) = link.forget(&kept_name(path)) {
        tracing::warn!(%error, "a descriptor stays kept");
    }
}

/// Returns when there is something to receive, or, with answers to send, room for them.
async fn ready(socket: Option<&UnixDatagram>, has_answers: bool) {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    let mut interest = Interest::READABLE;
    if has_answers {
        interest |= Interest::WRITABLE;
    }
    if let Err(error) = socket.ready(interest).await {
        tracing::error!(%error, "the supervisor's socket cannot be waited for");
        std::future::pending::<()>().await;
    }
}
