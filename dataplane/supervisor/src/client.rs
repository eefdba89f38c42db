//! The daemon's side of the connection. Calls block, for a moment: the supervisor does nothing else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::message::{Instance, Reply, Request, VERSION};
use crate::socket;

/// A supervisor that takes longer for an answer is not there.
const ANSWER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Something that the supervisor keeps.
#[derive(Debug)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// What was noted.
    pub note: Vec<u8>,
    /// The descriptor, if there is one.
    pub descriptor: Option<OwnedFd>,
}

/// A connection for requests.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    group: OwnedFd,
    instance: Instance,
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}

impl Client {
    /// Connects to the supervisor of `dir`.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` where there is none; `Other` where it is of another version.
    pub fn connect(dir: &Path) -> io::Result<Self> {
        let socket = socket::connect(dir)?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(ANSWER_TIMEOUT))?;
        }
        let (reply, descriptor) = ask(socket.as_fd(), &Request::Hello, None)?;
        match (reply, descriptor) {
            (Reply::Welcome { version, instance }, Some(group)) if version == VERSION => Ok(Self {
                socket,
                group,
                instance,
            }),
            (Reply::Welcome { version, .. }, _) => Err(refused(format!(
                "it speaks version {version} of the protocol, this program {VERSION}"
            ))),
            (reply, _) => Err(refused(format!("{reply:?}"))),
        }
    }

    /// The fanotify group. While this lives, the group does.
    pub fn group(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }

    /// Which group that is.
    pub fn instance(&self) -> Instance {
        self.instance
    }

    /// Hands over a group that another supervisor, which has died, held.
    ///
    /// # Errors
    /// The socket's, or that it has one in use.
    pub fn adopt(&mut self, group: OwnedFd, instance: Instance) -> io::Result<()> {
        self.done(&Request::Adopt { instance }, Some(group.as_fd()))?;
        (self.group, self.instance) = (group, instance);
        Ok(())
    }

    /// Has this kept.
    ///
    /// # Errors
    /// The socket's, or that there is no room.
    pub fn keep(
        &self,
        name: &str,
        note: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let request = Request::Keep {
            name: name.to_owned(),
            note: note.to_vec(),
        };
        self.done(&request, descriptor)
    }

    /// Lets go of this.
    ///
    /// # Errors
    /// The socket's.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        let name = name.to_owned();
        self.done(&Request::Forget { name }, None)
    }

    /// All that is kept, in the order of names.
    ///
    /// # Errors
    /// The socket's.
    pub fn kept(&self) -> io::Result<Vec<Kept>> {
        let mut all: Vec<Kept> = Vec::new();
        loop {
            let name = all.last().map(|kept| kept.name.clone()).unwrap_or_default();
            let (reply, descriptor) = ask(self.socket.as_fd(), &Request::After { name }, None)?;
            match reply {
                Reply::Kept { name, note } => all.push(Kept {
                    name,
                    note,
                    descriptor,
                }),
                Reply::Nothing => return Ok(all),
                reply => return Err(refused(format!("{reply:?}"))),
            }
        }
    }

    /// Another connection, for faults and answers; it does not block. Whoever had one before has none.
    ///
    /// # Errors
    /// The socket's.
    pub fn subscribe(dir: &Path) -> io::Result<OwnedFd> {
        let socket = socket::connect(dir)?;
        socket::send(socket.as_fd(), &Request::Subscribe.encode(), None)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(socket)
    }

    fn done(&self, request: &Request, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        match ask(self.socket.as_fd(), request, descriptor)?.0 {
            Reply::Done => Ok(()),
            Reply::Refused(why) => Err(refused(why)),
            reply => Err(refused(format!("{reply:?}"))),
        }
    }
}

fn ask(
    socket: BorrowedFd<'_>,
    request: &Request,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<(Reply, Option<OwnedFd>)> {
    socket::send(socket, &request.encode(), descriptor)?;
    let received = socket::receive(socket)?;
    if received.packet.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let reply = Reply::parse(&received.packet).map_err(io::Error::other)?;
    Ok((reply, received.descriptor))
}
