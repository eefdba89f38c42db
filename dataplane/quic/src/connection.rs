//! A connection with one node whose identity is proven.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pantala_wire::{NodeId, Priority};

use crate::driver;
use crate::error::{CloseReason, Error};
use crate::link::Link;
use crate::stream::{RecvStream, SendStream};

/// What QUIC knows of the path of a connection. Counters run since the connection began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Congestion window, in bytes.
    pub cwnd: u64,
    /// Largest UDP payload that the path takes, as far as is known.
    pub udp_payload_bytes: u16,
    /// UDP payload sent, in bytes, repeats included.
    pub sent_bytes: u64,
    /// UDP payload received, in bytes.
    pub received_bytes: u64,
    /// Datagrams sent.
    pub sent_datagrams: u64,
    /// Datagrams received.
    pub received_datagrams: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets sent and found lost.
    pub lost_packets: u64,
}

/// A handle of a connection; clones share it.
///
/// The connection is closed when the last handle and the last stream of it are dropped.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    link: Arc<Link>,
    node: NodeId,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.link.driver.close(CloseReason::Done);
    }
}

impl Connection {
    pub(crate) fn new(link: Arc<Link>, node: NodeId) -> Self {
        Self(Arc::new(Inner { link, node }))
    }

    pub(crate) fn link(&self) -> &Link {
        &self.0.link
    }

    fn driver(&self) -> &driver::Connection {
        &self.0.link.driver
    }

    /// The node at the other end, as its certificate proved.
    pub fn remote_node(&self) -> NodeId {
        self.0.node
    }

    /// Where the other end is now.
    pub fn remote_addr(&self) -> SocketAddr {
        self.driver().remote_addr()
    }

    /// Opens a stream for one request; waits while as many as the peer allows are open.
    ///
    /// The peer learns of the stream with the first byte written. `priority` is that of the request; the
    /// peer sets its own for the answer, from what the request says.
    ///
    /// # Errors
    /// Any of a lost connection.
    pub async fn open(&self, priority: Priority) -> Result<(SendStream, RecvStream), Error> {
        let (send, recv) = self.driver().open().await?;
        Ok((
            SendStream::new(send, self.clone(), priority),
            RecvStream::new(recv, self.clone()),
        ))
    }

    /// The next stream that the peer opened. Its answer is [`Priority::Bulk`] until
    /// [`SendStream::set_priority`] says otherwise.
    ///
    /// # Errors
    /// Any of a lost connection.
    pub async fn accept(&self) -> Result<(SendStream, RecvStream), Error> {
        let (send, recv) = self.driver().accept().await?;
        Ok((
            SendStream::new(send, self.clone(), Priority::Bulk),
            RecvStream::new(recv, self.clone()),
        ))
    }

    /// What is known of the path now.
    pub fn stats(&self) -> PathStats {
        self.driver().stats()
    }

    /// Closes the connection at once; everything that waits on it fails on both sides.
    pub fn close(&self, reason: CloseReason) {
        self.driver().close(reason);
    }

    /// Waits until the connection is over and says why.
    pub async fn closed(&self) -> Error {
        self.driver().closed().await
    }

    /// Whether the connection is over.
    pub fn is_closed(&self) -> bool {
        self.driver().is_closed()
    }
}
