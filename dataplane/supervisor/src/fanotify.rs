//! The calls of fanotify, which no safe library offers. The only `unsafe` of this crate.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::event::{self, Event, Malformed};

/// Events in one read of the queue: enough that a burst costs few calls.
const EVENTS_A_READ: usize = 64;
/// An event with its range record.
const EVENT_BYTES: usize = event::METADATA_BYTES + 24;

/// `FAN_PRE_ACCESS`: before bytes of a file are looked at.
const PRE_ACCESS: u64 = 0x0010_0000;
/// `FAN_ALLOW`.
const ALLOW: u32 = 1;
/// `FAN_DENY` with EIO, which is what the reader gets for any error.
const DENY: u32 = 2 | (5 << 24);

/// What becomes of a read that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its bytes are there.
    Allow,
    /// It fails.
    Deny,
}

/// A new group for events before access. Needs CAP_SYS_ADMIN, and a kernel that has them (6.14).
///
/// # Errors
/// The kernel's.
pub fn new_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_PRE_CONTENT
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let of_events = libc::O_RDWR | libc::O_LARGEFILE | libc::O_CLOEXEC;
    // SAFETY: takes two numbers and touches no memory of ours.
    let group = unsafe { libc::fanotify_init(flags, of_events.cast_unsigned()) };
    if group < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(group) })
}

/// From now on, access to the file through descriptors that are opened later raises events.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` where the file system cannot.
pub fn mark(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    change_mark(group, file, libc::FAN_MARK_ADD)
}

/// The file raises no more events.
///
/// # Errors
/// The kernel's; `ENOENT` where it is not marked.
pub fn unmark(group: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    change_mark(group, file, libc::FAN_MARK_REMOVE)
}

fn change_mark(group: BorrowedFd<'_>, file: BorrowedFd<'_>, change: u32) -> io::Result<()> {
    // SAFETY: both descriptors are open as long as they are borrowed; no path means the file itself.
    let done = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            change,
            PRE_ACCESS,
            file.as_raw_fd(),
            std::ptr::null(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An event that waits for an answer, with the descriptor that came with it. While that is open, no
/// other event has its number.
#[derive(Debug)]
pub struct Waiting {
    /// Of the file that is read; access through it raises no events.
    pub file: OwnedFd,
    /// What is about to be read.
    pub event: Event,
}

/// Takes events from the queue, none where there are none.
///
/// # Errors
/// The kernel's. A malformed message is named in the second part; what came before it is in the first.
pub fn take_events(group: BorrowedFd<'_>) -> io::Result<(Vec<Waiting>, Option<Malformed>)> {
    let mut bytes = [0; EVENTS_A_READ * EVENT_BYTES];
    let len = match rustix::io::read(group, &mut bytes) {
        Ok(len) => len,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut waiting = Vec::new();
    let mut malformed = None;
    for event in event::parse(bytes.get(..len).unwrap_or_default()) {
        match event {
            Ok(event) => waiting.push(Waiting {
                // SAFETY: the kernel has opened this descriptor for the read above; nobody else knows it.
                file: unsafe { OwnedFd::from_raw_fd(event.descriptor) },
                event,
            }),
            Err(error) => malformed = Some(error),
        }
    }
    Ok((waiting, malformed))
}

/// Lets a read go on, or fail. True unless no read waits under this number.
///
/// # Errors
/// The kernel's.
pub fn answer(group: BorrowedFd<'_>, number: i32, verdict: Verdict) -> io::Result<bool> {
    let verdict = match verdict {
        Verdict::Allow => ALLOW,
        Verdict::Deny => DENY,
    };
    let mut response = [0; 8];
    response[..4].copy_from_slice(&number.to_ne_bytes());
    response[4..].copy_from_slice(&verdict.to_ne_bytes());
    match rustix::io::write(group, &response) {
        Ok(_) => Ok(true),
        // Its reader was killed while it waited, and took the event with it.
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
