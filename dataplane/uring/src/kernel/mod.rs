//! What the ring asks of a kernel: the real one, or the scripted one of the tests.

#![allow(unsafe_code)]

#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod real;

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// The one group of receive buffers.
pub(crate) const BUFFER_GROUP: u16 = 0;

/// What the kernel is to do. The addresses point into memory that is lent until the last completion.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    /// Receive datagrams into provided buffers until it fails or is cancelled.
    Receive {
        fd: RawFd,
        template: *const libc::msghdr,
    },
    Send {
        fd: RawFd,
        message: *const libc::msghdr,
        /// Without copying the bytes: a second completion says when they are ours again.
        zero_copy: bool,
    },
    Read {
        fd: RawFd,
        address: *mut u8,
        bytes: u32,
        offset: u64,
    },
    Write {
        fd: RawFd,
        slices: *const libc::iovec,
        count: u32,
        offset: u64,
    },
    /// Cancel the operation that has this tag.
    Cancel { tag: u64 },
    /// Cancel everything in flight.
    CancelAll,
}

/// An operation ended, or a step of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) tag: u64,
    /// Bytes, or a negative errno.
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

impl Completion {
    /// More completions of this operation will come.
    pub(crate) fn more(&self) -> bool {
        io_uring::cqueue::more(self.flags)
    }

    /// The receive buffer that was used.
    pub(crate) fn buffer(&self) -> Option<u16> {
        io_uring::cqueue::buffer_select(self.flags)
    }

    pub(crate) fn bytes(&self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

/// How long to stay in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stay {
    /// Hand over what is queued, and come back.
    No,
    /// Hand over what is queued, collect what has completed, and come back.
    Reap,
    /// Until there is a completion, or for this long.
    Until(Option<Duration>),
}

pub(crate) trait Kernel {
    /// Queues an operation. False if the queue is full: enter first.
    ///
    /// # Safety
    ///
    /// Whatever the operation points at stays where it is, and is neither freed nor touched, until its last completion
    /// (the one without `more`) was taken.
    unsafe fn push(&mut self, operation: &Operation, tag: u64) -> bool;

    /// Whether anything is queued.
    fn has_queued(&mut self) -> bool;

    /// The system call. A timeout that passes, or a signal, is no error.
    fn enter(&mut self, stay: Stay) -> io::Result<()>;

    /// Whether a completion waits to be taken.
    fn has_completion(&mut self) -> bool;

    fn next_completion(&mut self) -> Option<Completion>;

    /// Gives the kernel a buffer to receive into.
    ///
    /// # Safety
    ///
    /// The memory stays as it is until a completion names the buffer, or until all receives have had their last.
    /// `buffer` is below the number of buffers that the kernel was made for, and not with the kernel already.
    unsafe fn provide(&mut self, buffer: u16, address: *mut u8, bytes: u32);

    /// No receive is in flight nor will be: the kernel forgets the buffers.
    fn forget_buffers(&mut self);
}
