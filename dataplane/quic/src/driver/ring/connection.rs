//! A connection, shared by the thread that moves its packets and the tasks that use it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use quinn_proto::{
    ConnectionError, ConnectionHandle, ConnectionStats, Dir, Event, StreamEvent, StreamId,
    TransportError, TransportErrorCode, VarInt, WriteError,
};
use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;

use super::inbox::{Command, Inbox};
use super::stream::{Reading, RecvStream, SendStream, Writing};
use crate::driver::errors::connection_error;
use crate::error::{CloseReason, Error};

/// A handle; clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) handle: ConnectionHandle,
    pub(super) inbox: Arc<Inbox>,
    /// In an `Arc` of its own so that a guard may be held apart from this.
    pub(super) state: Arc<Mutex<State>>,
    /// The handshake is done, or the connection is over.
    connected: Notify,
    /// A peer's stream is here, or the connection is over; for each direction.
    arrived: [Notify; 2],
    /// A stream may be opened, or the connection is over.
    available: Notify,
    closed: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

/// What the lock guards.
pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    /// Why the connection is over.
    pub(super) error: Option<ConnectionError>,
    is_connected: bool,
    /// The thread has been asked to look.
    pub(super) look_asked: bool,
    /// Reads and writes under way; at most one of each a stream.
    pub(super) readings: HashMap<StreamId, Reading>,
    pub(super) writings: HashMap<StreamId, Writing>,
    /// Who waits for a stream to be delivered or stopped.
    pub(super) deliveries: HashMap<StreamId, Waker>,
}

impl Shared {
    pub(super) fn new(
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
        inbox: Arc<Inbox>,
    ) -> Arc<Self> {
        Arc::new(Self {
            handle,
            inbox,
            state: Arc::new(Mutex::new(State {
                proto,
                error: None,
                is_connected: false,
                look_asked: false,
                readings: HashMap::new(),
                writings: HashMap::new(),
                deliveries: HashMap::new(),
            })),
            connected: Notify::new(),
            arrived: [Notify::new(), Notify::new()],
            available: Notify::new(),
            closed: Notify::new(),
        })
    }

    /// Asks the thread, once, to look at what a task has changed.
    pub(super) fn ask_to_look(&self, state: &mut State) {
        if !std::mem::replace(&mut state.look_asked, true) {
            // A thread that is gone has ended its connections.
            let _ = self.inbox.tell(Command::Look(self.handle));
        }
    }

    /// Passes on what quinn-proto has to say; true if it said something.
    pub(super) fn deliver_events(&self, state: &mut State) -> bool {
        let mut any = false;
        while let Some(event) = state.proto.poll() {
            any = true;
            match event {
                Event::Connected => {
                    state.is_connected = true;
                    self.connected.notify_waiters();
                }
                Event::ConnectionLost { reason } => self.end(state, reason),
                Event::Stream(event) => self.deliver_stream_event(state, event),
                // Not used by this protocol.
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {
                }
            }
        }
        any
    }

    fn deliver_stream_event(&self, state: &mut State, event: StreamEvent) {
        match event {
            StreamEvent::Opened { dir } => self.arrived[dir as usize].notify_waiters(),
            StreamEvent::Available { .. } => self.available.notify_waiters(),
            StreamEvent::Readable { id } => {
                if let Some(reading) = state.readings.get_mut(&id)
                    && reading.pull(&mut state.proto, id)
                {
                    reading.waker.wake_by_ref();
                }
            }
            StreamEvent::Writable { id } => {
                if let Some(writing) = state.writings.get_mut(&id)
                    && writing.push(&mut state.proto, id)
                {
                    writing.waker.wake_by_ref();
                }
            }
            StreamEvent::Finished { id } => {
                if let Some(waker) = state.deliveries.remove(&id) {
                    waker.wake();
                }
            }
            StreamEvent::Stopped { id, error_code } => {
                if let Some(waker) = state.deliveries.remove(&id) {
                    waker.wake();
                }
                if let Some(writing) = state.writings.get_mut(&id) {
                    writing.end(Err(WriteError::Stopped(error_code)));
                    writing.waker.wake_by_ref();
                }
            }
        }
    }

    /// The connection is over: everything that waits on it fails.
    pub(super) fn end(&self, state: &mut State, reason: ConnectionError) {
        state.error.get_or_insert(reason);
        for reading in state.readings.values() {
            reading.waker.wake_by_ref();
        }
        for writing in state.writings.values() {
            writing.waker.wake_by_ref();
        }
        for (_, waker) in state.deliveries.drain() {
            waker.wake();
        }
        self.connected.notify_waiters();
        for arrived in &self.arrived {
            arrived.notify_waiters();
        }
        self.available.notify_waiters();
        self.closed.notify_waiters();
    }

    /// The thread that moved the packets is gone.
    pub(super) fn abandon(&self) {
        self.end(
            &mut self.state.lock(),
            ConnectionError::TransportError(TransportError {
                code: TransportErrorCode::INTERNAL_ERROR,
                frame: None,
                reason: "the thread of the connection has ended".into(),
            }),
        );
    }

    pub(super) fn close(&self, reason: CloseReason) {
        let mut state = self.state.lock();
        if state.error.is_some() {
            return;
        }
        let code = VarInt::from_u32(reason as u32);
        state.proto.close(Instant::now(), code, Bytes::new());
        self.end(&mut state, ConnectionError::LocallyClosed);
        self.ask_to_look(&mut state);
    }
}

impl Connection {
    /// Waits until the handshake is done.
    pub(super) async fn established(self) -> Result<Self, Error> {
        self.until(&self.0.connected, |state| state.is_connected.then_some(()))
            .await?;
        Ok(self)
    }

    /// Waits until `look` finds something; looks again whenever `news` come.
    async fn until<T>(
        &self,
        news: &Notify,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        loop {
            let notified = {
                let mut state = self.0.state.lock();
                if let Some(error) = &state.error {
                    return Err(connection_error(error.clone()));
                }
                if let Some(found) = look(&mut state) {
                    return Ok(found);
                }
                // Made under the lock: no news can come between the look and the wait.
                news.notified()
            };
            notified.await;
        }
    }

    pub(crate) fn certificates(&self) -> Vec<CertificateDer<'static>> {
        let state = self.0.state.lock();
        state
            .proto
            .crypto_session()
            .peer_identity()
            .and_then(|identity| identity.downcast().ok())
            .map_or_else(Vec::new, |chain| *chain)
    }

    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.0.state.lock().proto.remote_address()
    }

    pub(crate) fn announce_admission(&self) {
        let mut state = self.0.state.lock();
        // The peer allows one such stream from the start; where it does not, it waits in vain.
        if let Some(id) = state.proto.streams().open(Dir::Uni) {
            let finished = state.proto.send_stream(id).finish();
            debug_assert!(finished.is_ok(), "a fresh stream can be finished");
        }
        self.0.ask_to_look(&mut state);
    }

    pub(crate) async fn await_admission(&self) -> Result<(), Error> {
        let id = self
            .until(&self.0.arrived[Dir::Uni as usize], |state| {
                state.proto.streams().accept(Dir::Uni)
            })
            .await?;
        let mut stream = RecvStream::new(self.0.clone(), id);
        // Later versions may say something here; this one only waits for the end.
        while stream.read(usize::MAX).await?.is_some() {}
        Ok(())
    }

    pub(crate) async fn open(&self) -> Result<(SendStream, RecvStream), Error> {
        let id = self
            .until(&self.0.available, |state| {
                state.proto.streams().open(Dir::Bi)
            })
            .await?;
        Ok(self.streams(id))
    }

    pub(crate) async fn accept(&self) -> Result<(SendStream, RecvStream), Error> {
        let id = self
            .until(&self.0.arrived[Dir::Bi as usize], |state| {
                state.proto.streams().accept(Dir::Bi)
            })
            .await?;
        Ok(self.streams(id))
    }

    fn streams(&self, id: StreamId) -> (SendStream, RecvStream) {
        (
            SendStream::new(self.0.clone(), id),
            RecvStream::new(self.0.clone(), id),
        )
    }

    pub(crate) fn stats(&self) -> ConnectionStats {
        self.0.state.lock().proto.stats()
    }

    pub(crate) fn set_send_window(&self, bytes: u64) {
        let mut state = self.0.state.lock();
        state.proto.set_send_window(bytes);
        self.0.ask_to_look(&mut state);
    }

    pub(crate) fn set_receive_window(&self, bytes: u64) {
        let mut state = self.0.state.lock();
        state
            .proto
            .set_receive_window(VarInt::from_u64(bytes).unwrap_or(VarInt::MAX));
        self.0.ask_to_look(&mut state);
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        self.0.close(reason);
    }

    pub(crate) async fn closed(&self) -> Error {
        let forever = |_: &mut State| None::<std::convert::Infallible>;
        match self.until(&self.0.closed, forever).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.state.lock().error.is_some()
    }
}
