//! The threads of an endpoint, from outside.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use pantala_uring::socket::{self, SocketOptions};
use tokio::sync::oneshot;

use super::connection::Connection;
use super::inbox::{Command, Hall, Inbox};
use super::thread::Thread;
use crate::config::{Limits, SeeSockets};
use crate::driver::setup::{DRAIN_MAX, Setup};
use crate::error::{CloseReason, Error};

/// Most threads: a connection keeps one busy at most, and beyond these the disk or the network is the
/// limit. Each holds its receive buffers.
const THREADS_MAX: usize = 8;

#[derive(Debug, Clone)]
pub(crate) struct Endpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    inboxes: Arc<[Arc<Inbox>]>,
    hall: Arc<Hall>,
    local_addr: SocketAddr,
    /// Whose turn it is to take the next outgoing connection.
    next: AtomicUsize,
}

impl Endpoint {
    /// Binds the sockets and starts the threads; also returns how many.
    pub(in crate::driver) fn bind(
        listen: SocketAddr,
        limits: &Limits,
        setup: Setup,
        see: Option<SeeSockets<'_>>,
    ) -> io::Result<(Self, usize)> {
        let threads = match limits.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
        .min(THREADS_MAX);
        let options = SocketOptions {
            buffer_bytes: limits.socket_buffer_bytes,
            batches: true,
        };
        let group = socket::bind_group(listen, threads, &options)?;
        if let Some(see) = see {
            see(&group.sockets)?;
        }
        let local_addr = group
            .sockets
            .first()
            .ok_or_else(|| io::Error::other("no socket"))?
            .local_addr()?;
        if !group.steered {
            tracing::info!(
                "the kernel does not steer datagrams to their threads; they are handed on instead"
            );
        }
        let hall = Hall::new(threads);
        let mut starting = Vec::new();
        for (number, socket) in group.sockets.into_iter().enumerate() {
            starting.push(Thread::start(
                number,
                threads,
                socket,
                setup.clone(),
                hall.clone(),
            )?);
        }
        let mut inboxes = Vec::new();
        let mut failed = None;
        for start in &starting {
            match start.inbox() {
                Ok(inbox) => inboxes.push(inbox),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            // Threads that wait for the others' letter boxes end when `starting` is dropped.
            return Err(error);
        }
        let inboxes: Arc<[Arc<Inbox>]> = inboxes.into();
        for start in starting {
            start.go(inboxes.clone());
        }
        let inner = Inner {
            inboxes,
            hall,
            local_addr,
            next: AtomicUsize::new(0),
        };
        Ok((Self(Arc::new(inner)), threads))
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.0.local_addr
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Result<Connection, Error> {
        let address = self.reachable(address)?;
        if self.0.hall.is_closed() {
            return Err(Error::EndpointClosed);
        }
        let next = self.0.next.fetch_add(1, Ordering::Relaxed) % self.0.inboxes.len();
        let (reply, connection) = oneshot::channel();
        let command = Command::Connect { address, reply };
        if !self.0.inboxes[next].tell(command) {
            return Err(Error::EndpointClosed);
        }
        let connection = connection.await.map_err(|_| Error::EndpointClosed)??;
        CloseUnlessEstablished(Some(connection)).established().await
    }

    /// `address` as the socket's family writes it.
    fn reachable(&self, address: SocketAddr) -> Result<SocketAddr, Error> {
        match (self.0.local_addr.ip(), address.ip()) {
            (IpAddr::V4(_), IpAddr::V6(_)) => Err(Error::Address(address)),
            (IpAddr::V6(_), IpAddr::V4(ip)) => {
                Ok(SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()))
            }
            _ => Ok(address),
        }
    }

    pub(crate) async fn accept(&self) -> Option<Incoming> {
        loop {
            let notified = self.0.hall.arrived.notified();
            match self.0.hall.next() {
                Err(()) => return None,
                Ok(Some((proto, thread))) => {
                    return Some(Incoming {
                        proto: Some(proto),
                        inbox: self.0.inboxes[thread].clone(),
                    });
                }
                Ok(None) => notified.await,
            }
        }
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        for (incoming, thread) in self.0.hall.close() {
            // A thread that is gone needs no telling.
            self.0.inboxes[thread].tell(Command::Refuse(incoming));
        }
        for inbox in self.0.inboxes.iter() {
            inbox.close(reason);
        }
    }

    /// Waits until all threads have ended, which they do once their peers know, or after a moment.
    pub(crate) async fn drained(&self) {
        let ended = async {
            loop {
                let notified = self.0.hall.ended.notified();
                if self.0.hall.threads() == 0 {
                    return;
                }
                notified.await;
            }
        };
        // What is not drained by then ends with its peers' idle timeout.
        let _ = tokio::time::timeout(2 * DRAIN_MAX, ended).await;
    }
}

/// Closes a connection whose handshake nobody waits for any more.
struct CloseUnlessEstablished(Option<Connection>);

impl CloseUnlessEstablished {
    async fn established(mut self) -> Result<Connection, Error> {
        let Some(connection) = self.0.clone() else {
            return Err(Error::ClosedLocally);
        };
        let connection = connection.established().await?;
        self.0 = None;
        Ok(connection)
    }
}

impl Drop for CloseUnlessEstablished {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close(CloseReason::Done);
        }
    }
}

/// A handshake that a peer has begun; one that is dropped is refused.
pub(crate) struct Incoming {
    proto: Option<quinn_proto::Incoming>,
    inbox: Arc<Inbox>,
}

impl Incoming {
    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.proto
            .as_ref()
            .map_or(SocketAddr::from(([0; 4], 0)), |it| it.remote_address())
    }

    pub(crate) fn is_address_validated(&self) -> bool {
        self.proto
            .as_ref()
            .is_some_and(quinn_proto::Incoming::remote_address_validated)
    }

    pub(crate) fn validate_address(mut self) {
        if let Some(proto) = self.proto.take() {
            // A thread that is gone answers nobody.
            self.inbox.tell(Command::Retry(proto));
        }
    }

    pub(crate) fn refuse(self) {
        drop(self);
    }

    pub(crate) async fn establish(mut self) -> Result<Connection, Error> {
        let (reply, connection) = oneshot::channel();
        let Some(incoming) = self.proto.take() else {
            return Err(Error::EndpointClosed);
        };
        let command = Command::Accept { incoming, reply };
        if !self.inbox.tell(command) {
            return Err(Error::EndpointClosed);
        }
        let connection = connection.await.map_err(|_| Error::EndpointClosed)??;
        CloseUnlessEstablished(Some(connection)).established().await
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(proto) = self.proto.take() {
            // A thread that is gone answers nobody.
            self.inbox.tell(Command::Refuse(proto));
        }
    }
}
