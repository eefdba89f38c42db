//! The calls to the kernel that the compiler cannot check. The only unsafe code of the FUSE and cachefiles backends.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::ioctl::{IntegerSetter, Opcode, opcode};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a kernel's device says: a request waits, or (FUSE, when it is unmounted) nothing but an error will come.
pub(crate) const REQUESTS: Interest = Interest::READABLE.add(Interest::ERROR);

/// Has the runtime, in which this must be called, watch `descriptor` for [`REQUESTS`].
pub(crate) fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, always says the same number, and is closed by nobody else while the AsyncFd owns it.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, REQUESTS) };
    watched.map_err(|error| error.into_parts().1)
}

/// `CACHEFILES_IOC_READ_COMPLETE`: `_IOW(0x98, 1, int)`.
const READ_COMPLETE: Opcode = opcode::write::<i32>(0x98, 1);

/// Owns the descriptor that a message of `/dev/cachefiles` brings. To be called once for each such message.
pub(crate) fn take_descriptor(number: u32) -> Option<OwnedFd> {
    let number = i32::try_from(number).ok()?;
    // SAFETY: the kernel has opened this descriptor for this process as it handed the message over, so it is open and
    // nobody else knows of it; the message is handled once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Completes the READ message `id` of the cache file behind `descriptor`.
pub(crate) fn complete_read(descriptor: &OwnedFd, id: u32) -> io::Result<()> {
    // SAFETY: this ioctl takes the message's number as its argument itself, reads and writes no memory, and refuses
    // numbers and descriptors that are not of cachefiles.
    unsafe {
        let call = IntegerSetter::<READ_COMPLETE>::new_usize(id as usize);
        Ok(rustix::ioctl::ioctl(descriptor, call)?)
    }
}
