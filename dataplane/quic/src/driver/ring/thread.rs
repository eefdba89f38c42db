//! A thread's life: its start, its loop, what it is told, and its end.

use std::collections::VecDeque;
use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use pantala_uring::{Event, Received, Ring, RingConfig, RingError, SocketId};
use quinn_proto::{ConnectionHandle, Transmit};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::connection::{Connection, Shared};
use super::inbox::{Command, Hall, Inbox};
use super::turn::Table;
use crate::driver::errors::{connect_error, connection_error};
use crate::driver::setup::{CALL_BYTES_MAX, DRAIN_MAX, Setup};
use crate::error::{CloseReason, Error};
use crate::identity::SERVER_NAME;

/// Submissions that may wait for the kernel: sends and the few operations beside them.
const RING_ENTRIES: u32 = 64;
/// Receive buffers that the kernel fills: more are colder, fewer end a burst early.
const RECEIVE_BUFFERS: u16 = 8;
/// A whole batch of coalesced datagrams.
const RECEIVE_BUFFER_BYTES: usize = 65_535;
/// Receive buffers, besides, that unread slices of theirs keep; past them slices are copied. 16 MiB.
const RECEIVE_BUFFERS_LENT_MAX: usize = 256;
/// Batches on their way to the network at once: enough for one call into the kernel to carry several, few
/// enough to stay in the core's cache.
const SEND_BUFFERS: usize = 8;
/// Bytes of what is answered without a connection: a version negotiation, a retry, a refusal, a reset.
const ANSWER_BYTES: usize = 2048;

/// One thread of an endpoint.
pub(super) struct Thread {
    pub(super) number: usize,
    pub(super) threads: u8,
    pub(super) ring: Ring,
    pub(super) socket: SocketId,
    pub(super) endpoint: quinn_proto::Endpoint,
    pub(super) setup: Setup,
    pub(super) inbox: Arc<Inbox>,
    pub(super) inboxes: Arc<[Arc<Inbox>]>,
    pub(super) hall: Arc<Hall>,
    pub(super) table: Table,
    /// The connection ID met last that is known to be this thread's.
    pub(super) last_id: [u8; super::super::ids::ID_BYTES],
    pub(super) now: Instant,
    /// All send buffers are on their way.
    pub(super) buffers_out: bool,
    /// When the endpoint was closed, and why.
    closing: Option<(Instant, CloseReason)>,
}

/// A thread that has begun to start.
pub(super) struct Starting {
    made: Receiver<Result<Arc<Inbox>, RingError>>,
    go: SyncSender<Arc<[Arc<Inbox>]>>,
}

impl Starting {
    /// Its letter box, or why it could not start.
    pub(super) fn inbox(&self) -> io::Result<Arc<Inbox>> {
        self.made
            .recv()
            .map_err(|_| io::Error::other("the thread ended while it started"))?
            .map_err(io::Error::other)
    }

    /// Lets it work.
    pub(super) fn go(self, inboxes: Arc<[Arc<Inbox>]>) {
        // A thread that has ended already has ended its connections: there are none yet.
        let _ = self.go.send(inboxes);
    }
}

impl Thread {
    pub(super) fn start(
        number: usize,
        threads: usize,
        socket: UdpSocket,
        setup: Setup,
        hall: Arc<Hall>,
    ) -> io::Result<Starting> {
        let (tell_made, made) = sync_channel(1);
        let (go, hear_go) = sync_channel(1);
        let threads = u8::try_from(threads).unwrap_or(u8::MAX);
        let endpoint = quinn_proto::Endpoint::new(
            Arc::new(setup.endpoint(number as u8, threads)?),
            Some(Arc::new(setup.server())),
            true,
            None,
        );
        std::thread::Builder::new()
            .name(format!("quic-{number}"))
            .spawn(move || {
                let (ring, id) = match open(socket) {
                    Ok(ring) => ring,
                    Err(error) => {
                        // Whoever started it hears why, or has gone.
                        let _ = tell_made.send(Err(error));
                        hall.thread_ended();
                        return;
                    }
                };
                let inbox = Arc::new(Inbox::new(ring.waker()));
                let mut thread = Self {
                    number,
                    threads,
                    ring,
                    socket: id,
                    endpoint,
                    setup,
                    inbox: inbox.clone(),
                    inboxes: Arc::new([]),
                    hall,
                    table: Table::default(),
                    last_id: Default::default(),
                    now: Instant::now(),
                    buffers_out: false,
                    closing: None,
                };
                if tell_made.send(Ok(inbox)).is_err() {
                    return;
                }
                let Ok(inboxes) = hear_go.recv() else {
                    return;
                };
                thread.inboxes = inboxes;
                if let Err(error) = thread.run() {
                    warn!(%error, "a thread of the peer plane ends: its connections are lost");
                }
            })?;
        Ok(Starting { made, go })
    }

    fn run(&mut self) -> Result<(), RingError> {
        let mut commands = Vec::new();
        let mut forwarded = VecDeque::new();
        loop {
            self.now = Instant::now();
            while let Some(event) = self.ring.next_event() {
                self.take_event(event)?;
            }
            self.read_letters(&mut commands, &mut forwarded);
            self.table.expire(self.now);
            let busy = self.drive();
            if let Some((since, _)) = self.closing
                && (self.table.is_empty() || self.now.duration_since(since) > DRAIN_MAX)
            {
                // What is still queued for the socket leaves with the last submission.
                return self.ring.submit();
            }
            let pause = if busy {
                Some(std::time::Duration::ZERO)
            } else {
                self.next_deadline()
                    .map(|deadline| deadline.saturating_duration_since(Instant::now()))
            };
            self.ring.wait(pause)?;
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let drain = self.closing.map(|(since, _)| since + DRAIN_MAX);
        self.table.next_deadline().into_iter().chain(drain).min()
    }

    fn take_event(&mut self, event: Event) -> Result<(), RingError> {
        match event {
            Event::Received(received) => self.take_datagrams(received),
            Event::Sent {
                result: Err(error),
                destination,
                ..
            } => {
                // What is lost here, QUIC sends again; a path that is gone shows as silence.
                debug!(%destination, %error, "datagrams not sent");
            }
            Event::SocketFailed { error, .. } => {
                return Err(RingError::Kernel {
                    call: "recvmsg",
                    error,
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn read_letters(&mut self, commands: &mut Vec<Command>, forwarded: &mut VecDeque<Received>) {
        let close = self.inbox.read(commands, forwarded);
        for received in forwarded.drain(..) {
            self.take_forwarded(received);
        }
        for command in commands.drain(..) {
            self.obey(command);
        }
        if let Some(reason) = close
            && self.closing.is_none()
        {
            self.closing = Some((self.now, reason));
            for connection in self.table.connections() {
                connection.close(reason);
            }
            self.table.look_at_all();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Look(handle) => self.table.look_at(handle),
            Command::Connect { address, reply } => {
                let connected = match self.closing {
                    Some(_) => Err(Error::EndpointClosed),
                    None => self
                        .endpoint
                        .connect(self.now, self.setup.client(address), address, SERVER_NAME)
                        .map_err(connect_error),
                };
                let connected = connected.map(|(handle, proto)| self.admit(handle, proto));
                answer(reply, connected);
            }
            Command::Accept { incoming, reply } => {
                let config = Arc::new(self.setup.server_for(incoming.remote_address()));
                let mut bytes = Vec::with_capacity(ANSWER_BYTES);
                let accepted = self
                    .endpoint
                    .accept(incoming, self.now, &mut bytes, Some(config));
                let accepted = match accepted {
                    Ok((handle, proto)) => Ok(self.admit(handle, proto)),
                    Err(error) => {
                        if let Some(transmit) = error.response {
                            self.send_answer(&transmit, &bytes);
                        }
                        Err(connection_error(error.cause))
                    }
                };
                answer(reply, accepted);
            }
            Command::Refuse(incoming) => {
                let mut bytes = Vec::with_capacity(ANSWER_BYTES);
                let transmit = self.endpoint.refuse(incoming, &mut bytes);
                self.send_answer(&transmit, &bytes);
            }
            Command::Retry(incoming) => {
                let mut bytes = Vec::with_capacity(ANSWER_BYTES);
                match self.endpoint.retry(incoming, &mut bytes) {
                    Ok(transmit) => self.send_answer(&transmit, &bytes),
                    // Its address is proven already, which the caller has just looked up.
                    Err(error) => {
                        let transmit = self.endpoint.refuse(error.into_incoming(), &mut bytes);
                        self.send_answer(&transmit, &bytes);
                    }
                }
            }
        }
    }

    fn admit(&mut self, handle: ConnectionHandle, proto: quinn_proto::Connection) -> Connection {
        let peer = proto.remote_address();
        let shared = Shared::new(handle, proto, self.inbox.clone());
        if let Some((_, reason)) = self.closing {
            shared.close(reason);
        }
        self.hall.add_peer(peer, self.number);
        self.table.add(shared.clone(), peer);
        Connection(shared)
    }

    /// Sends what belongs to no connection. Where no buffer is free it is lost, like any datagram.
    pub(super) fn send_answer(&mut self, transmit: &Transmit, bytes: &[u8]) {
        if let Some(mut buffer) = self.ring.take_send_buffer() {
            buffer.extend_from_slice(&bytes[..transmit.size.min(bytes.len())]);
            self.ring
                .send(self.socket, buffer, super::turn::head(transmit));
        }
    }
}

/// A ring that listens to `socket`.
fn open(socket: UdpSocket) -> Result<(Ring, SocketId), RingError> {
    let mut ring = Ring::new(&RingConfig {
        entries: RING_ENTRIES,
        receive_buffers: RECEIVE_BUFFERS,
        receive_buffer_bytes: RECEIVE_BUFFER_BYTES,
        send_buffers: SEND_BUFFERS,
        send_buffer_bytes: CALL_BYTES_MAX,
        receive_buffers_lent_max: RECEIVE_BUFFERS_LENT_MAX,
    })?;
    let id = ring.add_socket(socket)?;
    Ok((ring, id))
}

fn answer(reply: oneshot::Sender<Result<Connection, Error>>, result: Result<Connection, Error>) {
    if let Err(Ok(unwanted)) = reply.send(result) {
        unwanted.close(CloseReason::Done);
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        for command in self.inbox.shut() {
            match command {
                Command::Accept { incoming, .. }
                | Command::Refuse(incoming)
                | Command::Retry(incoming) => self.endpoint.ignore(incoming),
                Command::Connect { .. } | Command::Look(_) => {}
            }
        }
        for connection in self.table.connections() {
            connection.abandon();
        }
        self.hall.thread_ended();
    }
}
