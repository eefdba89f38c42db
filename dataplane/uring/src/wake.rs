//! Waking a ring that sleeps in the kernel.
//!
//! Three states. Only who finds the ring *asleep* pays for a system call; who finds it *awake* leaves a note that the
//! ring reads before it falls asleep, and who finds a note leaves it at that. No wake-up is lost: the ring falls asleep
//! by a compare-and-exchange that fails if there is a note.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const NOTIFIED: u8 = 2;

#[derive(Debug)]
pub(crate) struct Shared {
    state: AtomicU8,
    /// An eventfd. The ring always has a read of it in flight.
    bell: File,
}

impl Shared {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        // Blocking, so that the ring's read waits instead of failing.
        // SAFETY: no memory is involved.
        let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if bell < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and owned by nobody else.
        let bell = unsafe { OwnedFd::from_raw_fd(bell) };
        Ok(Arc::new(Self {
            state: AtomicU8::new(AWAKE),
            bell: File::from(bell),
        }))
    }

    pub(crate) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Whether there was a note; it is gone then.
    pub(crate) fn take_note(&self) -> bool {
        self.state.load(Ordering::Relaxed) == NOTIFIED
            && self.state.swap(AWAKE, Ordering::AcqRel) == NOTIFIED
    }

    /// From here on, a wake-up rings the bell. False if there is a note.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.state
            .compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Whether somebody woke us.
    pub(crate) fn get_up(&self) -> bool {
        self.state.swap(AWAKE, Ordering::AcqRel) == NOTIFIED
    }
}

/// Wakes one ring, from any thread.
#[derive(Debug, Clone)]
pub struct Waker(pub(crate) Arc<Shared>);

impl Waker {
    /// Makes the ring's current or next [`crate::Ring::wait`] return, with [`crate::Event::Woken`]. What was written
    /// before this call is visible to who takes that event. A system call only if the ring is asleep.
    pub fn wake(&self) {
        if self.0.state.swap(NOTIFIED, Ordering::AcqRel) == ASLEEP
            && let Err(error) = (&self.0.bell).write_all(&1u64.to_ne_bytes())
        {
            // The counter overflows after 2^64 wake-ups that nobody read; there is no other way for this to fail.
            tracing::error!(%error, "a ring could not be woken");
        }
    }
}
