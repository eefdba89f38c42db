//! quinn-proto on own threads, each with an io_uring, a UDP socket and the connections that arrive there.
//!
//! All sockets of an endpoint share one address. Each connection belongs to one thread, whose number is
//! in the connection's IDs; the kernel steers datagrams by it, and a thread hands on what reaches it by
//! mistake. The state of a connection lies behind a lock: its thread takes it to let packets in and out,
//! tasks take it to open streams, to leave bytes to be sent, and to say how many they want to read. A
//! task that waits is woken once for all it asked for, not for every packet.
//!
//! A thread ends when the endpoint is closed and the peers have been told, or a moment later; a panic in
//! one ends its connections with an error, and what is asked of it from then on fails.

mod batch;
mod connection;
mod endpoint;
mod inbox;
mod stream;
mod thread;
mod turn;

pub(crate) use self::connection::Connection;
pub(crate) use self::endpoint::{Endpoint, Incoming};
pub(crate) use self::stream::{RecvStream, SendStream};
