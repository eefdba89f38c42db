//! The socket between daemon and supervisor: whole packets, each with a descriptor or none.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::message::PACKET_BYTES_MAX;

/// The socket's name in its directory.
const NAME: &str = "supervisor.sock";
/// Connections that may wait to be accepted; a daemon makes two.
const BACKLOG: i32 = 8;

/// A packet that has come.
#[derive(Debug)]
pub struct Received {
    /// The bytes; none where the other side is gone.
    pub packet: Vec<u8>,
    /// A descriptor that came along.
    pub descriptor: Option<OwnedFd>,
}

/// The socket's address. A path in an address has 107 bytes at most, and directories of data have
/// longer ones: the directory goes by the number of its descriptor.
fn address(dir: BorrowedFd<'_>) -> io::Result<SocketAddrUnix> {
    let path = format!("/proc/self/fd/{}/{NAME}", dir.as_raw_fd());
    Ok(SocketAddrUnix::new(path)?)
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}

fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    let kind = SocketType::SEQPACKET;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        flags,
        None,
    )?)
}

/// Listens in `dir`, in place of whoever did before. The caller holds the directory's lock.
///
/// # Errors
/// The kernel's.
pub fn listen(dir: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(dir.join(NAME)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let dir = open_dir(dir)?;
    let socket = new_socket(SocketFlags::NONBLOCK)?;
    rustix::net::bind(&socket, &address(dir.as_fd())?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Who connects next, if somebody does and is the same user: whoever else got into the directory gets no
/// descriptor.
///
/// # Errors
/// The kernel's.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::net::accept_with(listener, flags) {
        Ok(socket) => socket,
        Err(
            rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED,
        ) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let is_own = sockopt::socket_peercred(&socket)?.uid == rustix::process::geteuid();
    Ok(is_own.then_some(socket))
}

/// Connects to the supervisor in `dir`; calls on the socket block.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` where none is there.
pub fn connect(dir: &Path) -> io::Result<OwnedFd> {
    let dir = open_dir(dir)?;
    let socket = new_socket(SocketFlags::empty())?;
    rustix::net::connect(&socket, &address(dir.as_fd())?)?;
    Ok(socket)
}

/// Sends a packet.
///
/// # Errors
/// The kernel's: `WouldBlock` on a socket that does not block.
pub fn send(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(packet)];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a packet.
///
/// # Errors
/// The kernel's; `InvalidData` where a packet is longer than any may be.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Received> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut packet)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            // One is sent at most; what is too many is closed here.
            descriptor = descriptors.last();
        }
    }
    if got.flags.contains(rustix::net::ReturnFlags::TRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    packet.truncate(got.bytes);
    Ok(Received { packet, descriptor })
}
