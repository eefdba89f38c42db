//! The ring: datagrams and files through io_uring, without a runtime around it.
//!
//! Owns: the submission and completion queues of one thread, the buffers that are on loan to the kernel, and the
//! sockets that it receives from. Used by: the QUIC driver, which makes one [`Ring`] on each of its threads; anyone may
//! hold a [`Waker`]. Nothing else in Pantala speaks io_uring.
//!
//! A driver's loop is `wait`, then `next_event` until there is none, then `send` what the events ask for. Nothing here
//! spins: a ring with nothing to do sleeps in the kernel until a completion, a [`Waker::wake`] or the timeout.
//!
//! Memory that the kernel may still write to or read from is owned by the ring, by a type that can only be opened by the
//! operation's last completion (the module `lent`). It shuts down by `Drop`: everything is cancelled and reaped, for at
//! most a second; what is on loan even then is leaked, never freed.
//!
//! Fails: [`probe()`] says whether and why not this kernel lets us; a socket that cannot go on is reported by
//! [`Event::SocketFailed`], and the others go on; a [`RingError`] from [`Ring::wait`] means that the ring is of no
//! more use.

#![deny(unsafe_code)]

mod error;
mod event;
mod kernel;
mod lent;
mod message;
mod probe;
mod ring;
pub mod socket;
mod wake;

pub use error::{Busy, RingError, Unsupported};
pub use event::{Event, Received, SendHead, SocketId};
pub use message::SendBuffer;
pub use probe::probe;
pub use ring::{Counters, Ring, RingConfig};
pub use wake::Waker;
