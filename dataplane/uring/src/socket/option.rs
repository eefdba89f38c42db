//! The system calls on sockets that the standard library lacks.

#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::address::{self, NAME_BYTES};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A socket bound to `address`, which it shares with others of this user if `is_shared`. One of IPv6 on the wildcard
/// address hears IPv4 too.
pub(super) fn open(address: SocketAddr, is_shared: bool) -> io::Result<UdpSocket> {
    let family = if address.is_ipv6() {
        libc::AF_INET6
    } else {
        libc::AF_INET
    };
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: just opened, and owned by nobody else.
    let socket = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
    if address.is_ipv6() {
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
    }
    if is_shared {
        set(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    let mut name = [0; NAME_BYTES];
    let bytes = address::encode(address, address.is_ipv6(), &mut name);
    // SAFETY: `name` holds an address of `bytes` bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), name.as_ptr().cast(), bytes) })?;
    Ok(socket)
}

pub(super) fn set(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_value(socket, level, name, &value)
}

/// As `set`, but a kernel that does not know the option is no error.
pub(super) fn set_if_known(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    match set(socket, level, name, value) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        other => other,
    }
}

/// Sets a buffer's size beyond the system's limit where we may, else up to it.
pub(super) fn set_buffer(
    socket: &UdpSocket,
    forced: libc::c_int,
    limited: libc::c_int,
    bytes: libc::c_int,
) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, forced, bytes)
        .or_else(|_| set(socket, libc::SOL_SOCKET, limited, bytes))
}

pub(super) fn set_value<T: Copy>(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as `value` has. Whether they are what the option takes is its to check; a
    // value with pointers lives through the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

pub(super) fn get(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut bytes = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has as many bytes as `bytes` says.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut bytes,
        )
    })?;
    Ok(value)
}
