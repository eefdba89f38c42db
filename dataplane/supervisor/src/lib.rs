//! What must outlive the daemon, so that lazily mounted images do.
//!
//! The kernel lets every read of a marked file pass, with zeros where the data is missing, at the moment
//! when the last descriptor of its fanotify group is closed. So a process of its own holds that
//! descriptor: it does so little that there is little to go wrong, and it is not replaced when the daemon
//! is. It reads the kernel's events, passes them to the daemon that is subscribed, and writes the
//! daemon's answers back. An event that was passed on and not answered when the daemon died is passed to
//! the next one; readers wait in between.
//!
//! It also keeps what a new daemon cannot get again: for each marked file a descriptor that was opened
//! before the mark (access through a later one would raise events, for which the daemon would wait for
//! itself), and small notes, such as credentials, which must not lie on a disk.
//!
//! It decides nothing: which range is needed, how it comes and whether a read fails is the daemon's.
//! [`serve`] is the process, [`client`] the daemon's side, [`message`] and [`event`] what is said between
//! daemon, supervisor and kernel. It ends by itself once it keeps nothing and nobody is connected.

#![deny(unsafe_code)]

pub mod client;
pub mod event;
pub mod fanotify;
pub mod keeper;
pub mod message;
pub mod serve;
pub mod socket;
