//! UDP sockets as the ring wants them: several on one address, batches, ECN, packet information, no fragmentation.

pub(crate) mod address;
pub(crate) mod control;
mod option;
mod steer;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Bytes of IP and UDP headers.
const V4_HEADERS_BYTES: u32 = 20 + 8;
const V6_HEADERS_BYTES: u32 = 40 + 8;
/// The most that a datagram over IPv4 can carry: 65,535 less the headers. Over IPv6 a little more fits; it is not used.
const PAYLOAD_BYTES_MAX: u32 = 65_507;

/// How sockets are set up.
#[derive(Debug, Clone)]
pub struct SocketOptions {
    /// The kernel's buffers for each socket and direction. The system's limits (`net.core.rmem_max`, `wmem_max`) cap it,
    /// unless the process is privileged.
    pub buffer_bytes: usize,
    /// Datagrams of one sender may arrive as one batch (UDP GRO).
    pub batches: bool,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            buffer_bytes: 4 << 20,
            batches: true,
        }
    }
}

/// Sockets that share an address.
#[derive(Debug)]
pub struct Group {
    /// In the order of their numbers. They live and die together: the kernel renumbers those that are left.
    pub sockets: Vec<UdpSocket>,
    /// Each datagram arrives at the socket that its connection ID names. Otherwise the kernel spreads them by a hash of
    /// the addresses and ports. A group of one is always steered.
    pub steered: bool,
}

/// `count` sockets (at least one) on one address; port 0 is chosen once for all of them. An IPv6 wildcard takes IPv4 too.
///
/// A datagram goes to the socket whose number is the first byte of its connection ID modulo `count`: byte 1 of a QUIC
/// packet with a short header, byte 6 with a long one. Before a server has chosen a connection ID, that is a random
/// byte of the client's, the same in each of its packets.
pub fn bind_group(listen: SocketAddr, count: usize, options: &SocketOptions) -> io::Result<Group> {
    let count = count.max(1);
    let mut sockets: Vec<UdpSocket> = Vec::with_capacity(count);
    let mut address = listen;
    for _ in 0..count {
        let socket = option::open(address, count > 1)?;
        set_options(&socket, options)?;
        address = socket.local_addr()?;
        sockets.push(socket);
    }
    let steered = count == 1
        || match steer::by_connection_id(&sockets[0], count) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "datagrams are spread by a hash");
                false
            }
        };
    Ok(Group { sockets, steered })
}

fn set_options(socket: &UdpSocket, options: &SocketOptions) -> io::Result<()> {
    let is_v6 = socket.local_addr()?.is_ipv6();
    let bytes = i32::try_from(options.buffer_bytes).unwrap_or(i32::MAX);
    option::set_buffer(socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, bytes)?;
    option::set_buffer(socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, bytes)?;
    if options.batches {
        option::set_if_known(socket, libc::SOL_UDP, libc::UDP_GRO, 1)?;
    }
    // A socket of IPv6 has the options of both, for the IPv4 peers that it also hears. One that hears none refuses
    // some of IPv4's, which then do not matter.
    let v4 = [
        (libc::IP_RECVTOS, 1),
        (libc::IP_PKTINFO, 1),
        (libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
    ];
    for (name, value) in v4 {
        let set = option::set(socket, libc::IPPROTO_IP, name, value);
        if !is_v6 {
            set?;
        }
    }
    if is_v6 {
        let v6 = [
            (libc::IPV6_RECVTCLASS, 1),
            (libc::IPV6_RECVPKTINFO, 1),
            (libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
            (libc::IPV6_DONTFRAG, 1),
        ];
        for (name, value) in v6 {
            option::set(socket, libc::IPPROTO_IPV6, name, value)?;
        }
    }
    Ok(())
}

/// How many bytes of UDP payload fit in one packet on the way to `destination`, as far as this host knows: by its route
/// and what the kernel has learned about the path. `None` where there is no route.
pub fn route_payload_bytes(destination: SocketAddr) -> Option<u16> {
    let (any, level, name, headers_bytes) = match destination.ip().to_canonical() {
        IpAddr::V4(_) => (
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            libc::IPPROTO_IP,
            libc::IP_MTU,
            V4_HEADERS_BYTES,
        ),
        IpAddr::V6(_) => (
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU,
            V6_HEADERS_BYTES,
        ),
    };
    let destination = match destination {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => destination,
        _ => SocketAddr::new(destination.ip().to_canonical(), destination.port()),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    // Sends nothing, but looks the route up.
    socket.connect(destination).ok()?;
    let mtu_bytes = u32::try_from(option::get(&socket, level, name).ok()?).ok()?;
    let payload_bytes = mtu_bytes.checked_sub(headers_bytes)?.min(PAYLOAD_BYTES_MAX);
    u16::try_from(payload_bytes).ok()
}
