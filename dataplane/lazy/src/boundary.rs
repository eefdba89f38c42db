//! The calls to the kernel that the compiler cannot check. The only unsafe code of the FUSE and cachefiles backends.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

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
