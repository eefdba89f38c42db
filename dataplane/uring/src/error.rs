//! What can go wrong with a ring.

use std::io;

/// Why the ring cannot be used here. Nothing is wrong with Pantala or its configuration.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// The sysctl `kernel.io_uring_disabled` forbids it.
    #[error("the sysctl kernel.io_uring_disabled is {0}")]
    Sysctl(u8),
    /// A sandbox (seccomp, as container runtimes set it up) or a security module forbids it.
    #[error(
        "io_uring_setup is forbidden here (seccomp, as in most containers, or a security module)"
    )]
    Forbidden,
    /// The kernel is built without it, or a sandbox hides it.
    #[error("this kernel has no io_uring, or a sandbox hides it")]
    Absent,
    /// The limit of locked memory (`RLIMIT_MEMLOCK`) or memory itself does not suffice.
    #[error("no memory for a ring: the limit of locked memory (RLIMIT_MEMLOCK) may be too low")]
    Memory,
    /// The kernel is too old for something that the ring is built on.
    #[error("this kernel's io_uring lacks {0}")]
    Lacks(&'static str),
    /// A small exchange over loopback did not work.
    #[error("a trial of io_uring failed at {step}")]
    Trial {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
}

/// A ring could not be made, or is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel does not let us.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A configuration out of bounds.
    #[error("ring: {name} is {value}, and must be {rule}")]
    Config {
        /// The field of `RingConfig`.
        name: &'static str,
        /// What it is.
        value: usize,
        /// What it must be.
        rule: &'static str,
    },
    /// A system call failed in a way that cannot be recovered from.
    #[error("ring: {call}")]
    Kernel {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// As many file operations are in flight as are allowed. What was to be used comes back.
#[derive(Debug, thiserror::Error)]
#[error("all slots for file operations are in use")]
pub struct Busy<T>(pub T);
