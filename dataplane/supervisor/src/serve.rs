//! The supervisor's process: one thread, one loop.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::fanotify::{self, Waiting};
use crate::keeper::{Item, Keeper};
use crate::message::{self, Fault, Instance, Reply, Request, VERSION};
use crate::socket;

/// Connections at one time: two of a daemon, and two of the one that takes over from it.
const CONNECTIONS_MAX: usize = 8;
/// With nothing to keep and nobody connected, the process ends after this: long enough for a daemon
/// that was just started by hand, or restarted, to connect.
const IDLE: Duration = Duration::from_secs(5);
/// The pause after a call that failed for lack of something, memory or descriptors.
const RETRY: Duration = Duration::from_millis(100);
/// Events that one look into the kernel's queue may bring.
const EVENTS_A_LOOK: usize = 64;

/// Says something on standard error. A log that cannot be written is no reason to end: readers wait.
macro_rules! say {
    ($($what:tt)*) => {
        let _ = writeln!(io::stderr(), $($what)*);
    };
}

struct Connection {
    socket: OwnedFd,
    /// It carries faults and answers.
    subscribed: bool,
    ended: bool,
}

struct Supervisor {
    group: OwnedFd,
    instance: Instance,
    keeper: Keeper,
    connections: Vec<Connection>,
}

/// Serves the directory `dir` until nothing is left to keep.
///
/// # Errors
/// Another supervisor is there (`WouldBlock`), or the kernel has no such events. Once it serves, nothing
/// ends it: a call that fails is said and tried again, because ending would let zeros be read.
pub fn serve(dir: &Path) -> io::Result<()> {
    let lock = File::create(dir.join("supervisor.lock"))?;
    lock.try_lock()?;
    let mut supervisor = Supervisor {
        group: fanotify::new_group()?,
        instance: new_instance()?,
        keeper: Keeper::default(),
        connections: Vec::new(),
    };
    let listener = socket::listen(dir)?;
    let mut idle_since = Instant::now();
    loop {
        match supervisor.wait(&listener) {
            Ok(ready) => supervisor.turn(&listener, &ready),
            Err(error) => {
                say!("waiting failed: {error}");
                std::thread::sleep(RETRY);
            }
        }
        if !supervisor.connections.is_empty() || !supervisor.keeper.is_empty() {
            idle_since = Instant::now();
        } else if idle_since.elapsed() > IDLE {
            return Ok(());
        }
    }
}

fn new_instance() -> io::Result<Instance> {
    use std::io::Read;
    let mut instance = Instance::default();
    File::open("/dev/urandom")?.read_exact(&mut instance)?;
    Ok(instance)
}

/// What can be done without waiting.
struct Ready {
    listener: bool,
    group: bool,
    /// In the order of the connections.
    connections: Vec<PollFlags>,
}

impl Supervisor {
    fn wait(&self, listener: &OwnedFd) -> io::Result<Ready> {
        let subscribed = self.connections.iter().any(|c| c.subscribed);
        // Without a daemon the events stay in the kernel's queue.
        let wants_events = subscribed && self.keeper.has_room(EVENTS_A_LOOK);
        let of_group = match wants_events {
            true => PollFlags::IN,
            false => PollFlags::empty(),
        };
        let mut polled = vec![
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&self.group, of_group),
        ];
        for connection in &self.connections {
            let mut flags = PollFlags::IN;
            flags.set(
                PollFlags::OUT,
                connection.subscribed && self.keeper.has_to_tell(),
            );
            polled.push(PollFd::new(&connection.socket, flags));
        }
        let timeout = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Ready {
            listener: !polled[0].revents().is_empty(),
            group: wants_events && !polled[1].revents().is_empty(),
            connections: polled[2..].iter().map(PollFd::revents).collect(),
        })
    }

    fn turn(&mut self, listener: &OwnedFd, ready: &Ready) {
        for (index, flags) in ready.connections.iter().enumerate() {
            if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                self.receive(index);
            }
        }
        if ready.group
            && let Err(error) = self.take_events()
        {
            say!("the kernel's events cannot be read: {error}");
            std::thread::sleep(RETRY);
        }
        for index in 0..self.connections.len() {
            self.tell(index);
        }
        self.connections.retain(|connection| !connection.ended);
        if ready.listener {
            self.accept(listener);
        }
    }

    fn accept(&mut self, listener: &OwnedFd) {
        match socket::accept(listener.as_fd()) {
            Ok(Some(socket)) if self.connections.len() < CONNECTIONS_MAX => {
                self.connections.push(Connection {
                    socket,
                    subscribed: false,
                    ended: false,
                });
            }
            Ok(_) => {}
            Err(error) => {
                say!("a connection is not accepted: {error}");
                std::thread::sleep(RETRY);
            }
        }
    }

    fn take_events(&mut self) -> io::Result<()> {
        let (events, malformed) = fanotify::take_events(self.group.as_fd())?;
        if let Some(malformed) = malformed {
            say!("a message of the kernel is not understood: {malformed}");
        }
        for Waiting { file, event } in events {
            let (device, inode) = match rustix::fs::fstat(&file) {
                Ok(stat) => (stat.st_dev, stat.st_ino),
                Err(error) => {
                    // The daemon knows no such file, and denies it.
                    say!("a file that is read cannot be looked at: {error}");
                    (0, 0)
                }
            };
            let fault = Fault {
                number: event.descriptor,
                device,
                inode,
                offset: event.offset,
                count: event.count,
            };
            self.keeper.add(fault, file);
        }
        Ok(())
    }

    /// Tells the daemon what it has not been told, as far as the socket takes it.
    fn tell(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).filter(|c| c.subscribed) else {
            return;
        };
        while self.keeper.has_to_tell() {
            let packet = message::encode_faults(&self.keeper.to_tell());
            if packet.is_empty() {
                self.keeper.told();
                continue;
            }
            match socket::send(connection.socket.as_fd(), &packet, None) {
                Ok(()) => self.keeper.told(),
                Err(error) => {
                    connection.ended |= error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            }
        }
    }

    /// Takes one packet of a connection.
    fn receive(&mut self, index: usize) {
        let socket = self.connections[index].socket.as_fd();
        let received = match socket::receive(socket) {
            Ok(received) if received.packet.is_empty() => {
                self.connections[index].ended = true;
                return;
            }
            Ok(received) => received,
            Err(error) => {
                self.connections[index].ended |= error.kind() != io::ErrorKind::WouldBlock;
                return;
            }
        };
        if self.connections[index].subscribed {
            self.answers(index, &received.packet);
            return;
        }
        let reply = match Request::parse(&received.packet) {
            Ok(Request::Subscribe) => {
                self.subscribe(index);
                return;
            }
            Ok(request) => self.perform(request, received.descriptor),
            Err(malformed) => Reply::Refused(malformed.to_string()),
        };
        self.reply(index, &reply);
    }

    fn subscribe(&mut self, index: usize) {
        for (other, connection) in self.connections.iter_mut().enumerate() {
            connection.ended |= connection.subscribed && other != index;
            connection.subscribed = other == index;
        }
        self.keeper.tell_all();
    }

    fn answers(&mut self, index: usize, packet: &[u8]) {
        let Ok(answers) = message::parse_answers(packet) else {
            self.connections[index].ended = true;
            return;
        };
        for answer in answers {
            let group = self.group.as_fd();
            let written = self.keeper.answer(answer, |answer| {
                fanotify::answer(group, answer.number, answer.verdict).map(drop)
            });
            if let Err(error) = written {
                say!("an answer does not reach the kernel, its reader waits: {error}");
            }
        }
    }

    fn perform(&mut self, request: Request, descriptor: Option<OwnedFd>) -> Reply {
        match request {
            Request::Hello => Reply::Welcome {
                version: VERSION,
                instance: self.instance,
            },
            Request::Adopt { instance } => match descriptor {
                Some(group) if self.keeper.is_empty() => {
                    self.group = group;
                    self.instance = instance;
                    Reply::Done
                }
                Some(_) => Reply::Refused("a group is in use already".into()),
                None => Reply::Refused("no descriptor came along".into()),
            },
            Request::Keep { name, note } => {
                match self.keeper.keep(name, Item { descriptor, note }) {
                    true => Reply::Done,
                    false => Reply::Refused("no more can be kept".into()),
                }
            }
            Request::Forget { name } => {
                self.keeper.forget(&name);
                Reply::Done
            }
            Request::After { name } => match self.keeper.after(&name) {
                Some((name, item)) => Reply::Kept {
                    name: name.to_owned(),
                    note: item.note.clone(),
                },
                None => Reply::Nothing,
            },
            Request::Subscribe => Reply::Refused("subscribed already".into()),
        }
    }

    fn reply(&mut self, index: usize, reply: &Reply) {
        let descriptor = match reply {
            Reply::Welcome { .. } => Some(self.group.as_fd()),
            Reply::Kept { name, .. } => self.keeper.descriptor(name),
            _ => None,
        };
        let connection = &mut self.connections[index];
        // A daemon waits for each reply: one that does not fit is not waited for.
        if let Err(error) = socket::send(connection.socket.as_fd(), &reply.encode(), descriptor) {
            say!("a daemon does not take a reply: {error}");
            connection.ended = true;
        }
    }
}
