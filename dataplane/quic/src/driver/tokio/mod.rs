//! quinn on tokio.

mod connection;
mod endpoint;
mod errors;
mod restart;
mod socket;
mod stream;

pub(crate) use self::connection::Connection;
pub(crate) use self::endpoint::Endpoint;
pub(crate) use self::stream::{RecvStream, SendStream};
