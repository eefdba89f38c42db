//! quinn on tokio's sockets.

mod connection;
mod endpoint;
mod socket;
mod stream;

pub(crate) use self::connection::Connection;
pub(crate) use self::endpoint::{Endpoint, Incoming};
pub(crate) use self::stream::{RecvStream, SendStream};
