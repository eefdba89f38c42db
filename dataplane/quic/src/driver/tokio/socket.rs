//! The UDP socket below quinn: large kernel buffers, and batches as large as the kernel takes.
//!
//! quinn hands over at most ten datagrams at a time, which is its main loss: every call into the kernel
//! costs the same, whatever it carries. This socket holds a full hand of ten back until more come for the
//! same peer, sends as many at once as segmentation offload takes, and lets a task send what is left when
//! quinn has nothing more to say. A smaller hand is the end of what there was to send: it goes out at once.
//!
//! It also cuts what is too large. Ten datagrams of a jumbo path are more than the 64 KiB of one call;
//! the kernel refuses them (EMSGSIZE), quinn takes that for loss, and falls back to the smallest packets.

use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::net::sockopt;
use tokio::sync::Notify;
use tracing::{debug, info};

use crate::config::{Limits, SeeSockets};
use crate::driver::setup::CALL_BYTES_MAX;

/// Most bytes that a receive with coalescing returns at once.
const RECEIVE_BYTES_MAX: usize = 65_535;
/// Datagrams in a full hand of quinn's (its `MAX_TRANSMIT_SEGMENTS`).
const FULL_HAND: usize = 10;
/// Batches side by side; a peer always has the same one, which keeps its datagrams in order, and peers
/// mostly have different ones, so that their connections do not wait for each other's calls.
const LANES: usize = 8;

/// Binds the socket that an endpoint lives on.
pub(super) fn bind(
    listen: SocketAddr,
    limits: &Limits,
    see: Option<SeeSockets<'_>>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = std::net::UdpSocket::bind(listen)?;
    raise_buffers(&socket, limits.socket_buffer_bytes);
    if let Some(see) = see {
        see(std::slice::from_ref(&socket))?;
    }
    let merging = Arc::new(MergingSocket {
        inner: TokioRuntime.wrap_udp_socket(socket)?,
        receive_segments_max: RECEIVE_BYTES_MAX.div_ceil(limits.udp_payload_max_bytes.into()),
        lanes: Default::default(),
        held: Arc::new(Notify::new()),
    });
    let held = merging.held.clone();
    let weak = Arc::downgrade(&merging);
    tokio::spawn(async move {
        loop {
            held.notified().await;
            // Let connections that have more to send go first.
            tokio::task::yield_now().await;
            let Some(socket) = weak.upgrade() else { return };
            socket.send_held().await;
        }
    });
    Ok(merging)
}

/// Asks for buffers that hold a burst; without privilege the kernel gives at most its `rmem_max`.
fn raise_buffers(socket: &std::net::UdpSocket, bytes: usize) {
    let raised = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes))
        .and_then(|()| {
            sockopt::set_socket_send_buffer_size_force(socket, bytes)
                .or_else(|_| sockopt::set_socket_send_buffer_size(socket, bytes))
        })
        .and_then(|()| sockopt::socket_recv_buffer_size(socket));
    match raised {
        // The kernel counts its own overhead too and reports twice what was asked for.
        Ok(got) if got < bytes => info!(
            got_bytes = got / 2,
            wanted_bytes = bytes,
            "small UDP buffers; raise net.core.rmem_max and net.core.wmem_max"
        ),
        Ok(_) => {}
        Err(error) => debug!(%error, "UDP buffers stay as they are"),
    }
}

#[derive(Debug)]
struct MergingSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    receive_segments_max: usize,
    lanes: [Mutex<Batch>; LANES],
    /// Something may be held back in a lane.
    held: Arc<Notify>,
}

/// Datagrams held back: all for one peer, all of one size but perhaps the last.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    head: Option<Head>,
}

/// What datagrams of one call have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Head {
    destination: SocketAddr,
    src_ip: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    segment_size: usize,
}

impl MergingSocket {
    fn lane(&self, destination: SocketAddr) -> &Mutex<Batch> {
        let mut hasher = DefaultHasher::new();
        destination.hash(&mut hasher);
        &self.lanes[hasher.finish() as usize % LANES]
    }

    /// Sends the batch in calls as large as may be; keeps, unless `all`, what does not fill a call.
    fn send(&self, batch: &mut Batch, all: bool) -> io::Result<()> {
        let Some(head) = batch.head else {
            return Ok(());
        };
        let segments_max = (CALL_BYTES_MAX / head.segment_size)
            .min(self.inner.max_transmit_segments())
            .max(1);
        let call_bytes = segments_max * head.segment_size;
        let mut sent = 0;
        let mut result = Ok(());
        while sent < batch.bytes.len() && (all || batch.bytes.len() - sent >= call_bytes) {
            let end = (sent + call_bytes).min(batch.bytes.len());
            let contents = &batch.bytes[sent..end];
            result = self.inner.try_send(&Transmit {
                destination: head.destination,
                ecn: head.ecn,
                contents,
                segment_size: (contents.len() > head.segment_size).then_some(head.segment_size),
                src_ip: head.src_ip,
            });
            if result.is_err() {
                break;
            }
            sent = end;
        }
        batch.bytes.drain(..sent);
        if batch.bytes.is_empty() {
            batch.head = None;
        }
        result
    }

    async fn send_held(self: Arc<Self>) {
        let mut poller = self.inner.clone().create_io_poller();
        for lane in &self.lanes {
            loop {
                let result = self.send(&mut lane.lock(), true);
                match result {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if poll_fn(|cx| poller.as_mut().poll_writable(cx))
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                    Err(error) => {
                        // What is lost here, QUIC sends again.
                        debug!(%error, "datagrams not sent");
                        *lane.lock() = Batch::default();
                        break;
                    }
                    Ok(()) => break,
                }
            }
        }
    }
}

impl Drop for MergingSocket {
    fn drop(&mut self) {
        // Lets the task see that the socket is gone.
        self.held.notify_one();
    }
}

impl AsyncUdpSocket for MergingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let length = transmit.contents.len();
        let head = Head {
            destination: transmit.destination,
            src_ip: transmit.src_ip,
            ecn: transmit.ecn,
            segment_size: transmit.segment_size.unwrap_or(length),
        };
        let mut batch = self.lane(transmit.destination).lock();
        // A shorter datagram can only be the last of a call.
        let is_ended = !batch.bytes.len().is_multiple_of(head.segment_size);
        if batch.head.is_some_and(|held| held != head || is_ended) {
            self.send(&mut batch, true)?;
        }
        let is_full_hand = length >= FULL_HAND * head.segment_size;
        if batch.head.is_none() && !is_full_hand && length <= CALL_BYTES_MAX {
            return self.inner.try_send(transmit);
        }
        if batch.bytes.len() >= CALL_BYTES_MAX {
            // A call that could not be made before; nothing more is taken until it is.
            self.send(&mut batch, false)?;
        }
        batch.head = Some(head);
        batch.bytes.extend_from_slice(transmit.contents);
        // The datagrams are taken now, so a full socket is no error of this call: the task goes on.
        let result = self.send(&mut batch, !is_full_hand);
        if !batch.bytes.is_empty() {
            self.held.notify_one();
        }
        match result {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    /// quinn makes its receive buffers this many of the largest datagrams long.
    fn max_receive_segments(&self) -> usize {
        self.inner
            .max_receive_segments()
            .min(self.receive_segments_max)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
