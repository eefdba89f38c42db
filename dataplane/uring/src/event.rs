//! What goes into the ring with a datagram, and what comes out of it.

use std::io;
use std::net::{IpAddr, SocketAddr};

use bytes::BytesMut;

/// One of the ring's sockets, in the order in which they were added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub(crate) u32);

impl SocketId {
    /// 0 for the first socket of its ring.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a datagram, or a batch of datagrams of one size, goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendHead {
    /// The receiver. An IPv4 address may also be given to an IPv6 socket, and the other way if it is a mapped one.
    pub destination: SocketAddr,
    /// The address to send from; where none is given, the kernel chooses.
    pub source_ip: Option<IpAddr>,
    /// The two ECN bits.
    pub ecn: u8,
    /// The buffer holds many datagrams of this size (the last may be shorter): the kernel, or the network card, cuts
    /// it. At most 64 of them and 65,000 bytes in all.
    pub segment_bytes: Option<u16>,
}

/// A datagram, or many of one size from one sender.
#[derive(Debug)]
pub struct Received {
    /// Where it arrived.
    pub socket: SocketId,
    /// The bytes as the kernel wrote them. Never empty.
    pub payload: BytesMut,
    /// The sender, as the socket shows it: on an IPv6 socket, IPv4 peers have mapped addresses.
    pub source: SocketAddr,
    /// The address it was sent to.
    pub local_ip: Option<IpAddr>,
    /// The two ECN bits.
    pub ecn: u8,
    /// The size of all datagrams in `payload` but the last, which may be shorter. From 1 to the length of `payload`.
    pub segment_bytes: usize,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// Datagrams arrived.
    Received(Received),
    /// A datagram or batch has left, or has not. Its buffer is back in the pool.
    Sent {
        /// By which socket.
        socket: SocketId,
        /// Bytes sent, or what the kernel said: `EMSGSIZE` for what is too large for the path, `ENETUNREACH`, `EIO`
        /// where the device cannot cut batches.
        result: io::Result<usize>,
        /// To whom.
        destination: SocketAddr,
    },
    /// Nothing more will arrive at this socket. Sending may work.
    SocketFailed {
        /// Which.
        socket: SocketId,
        /// The last of a row of errors.
        error: io::Error,
    },
    /// Somebody called [`crate::Waker::wake`], once or more often.
    Woken,
    /// A read from a file ended.
    Read {
        /// As given.
        token: u64,
        /// As given, with the bytes read appended.
        buffer: BytesMut,
        /// Bytes read; fewer than asked for at the file's end or if a signal came.
        result: io::Result<usize>,
    },
    /// A write to a file ended.
    Wrote {
        /// As given.
        token: u64,
        /// All bytes, or why not all. What was written before an error stays written.
        result: io::Result<usize>,
    },
}
