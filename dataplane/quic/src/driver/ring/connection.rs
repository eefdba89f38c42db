//! A connection, shared by the thread that moves its packets and the tasks that use it.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use quinn_proto::{
    ConnectionError, ConnectionHandle, ConnectionStats, Dir, Event, FinishError, StreamEvent,
    StreamId, TransportError, TransportErrorCode, VarInt,
};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, oneshot};

use super::inbox::{Command, Inbox};
use super::stream::{Reading, RecvStream, SendStream, Writing};
use crate::driver::errors::connection_error;
use crate::driver::setup::CANCELLED;
use crate::error::{CloseReason, Error};

/// A handle; clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection(pub(super) Arc<Shared>);

/// What a task asks of a connection. Wishes are fulfilled in the order in which they are left.
pub(super) enum Wish {
    /// Take what arrives.
    Read(StreamId, Arc<Mutex<Reading>>),
    /// Hand over bytes, then say so.
    Write(StreamId, Writing),
    /// No more will be written.
    Finish(StreamId),
    /// What is not delivered need not be.
    Reset(StreamId),
    /// Nothing more will be read.
    Stop(StreamId),
    /// How urgent the stream is.
    Rank(StreamId, i32),
    /// Say when the peer has everything or wants no more.
    Deliver(StreamId, oneshot::Sender<Result<(), Error>>),
    /// Say the number of a new stream when the peer allows one.
    Open(oneshot::Sender<StreamId>),
    SendWindow(u64),
    ReceiveWindow(u64),
}

pub(super) struct Shared {
    pub(super) handle: ConnectionHandle,
    inbox: Arc<Inbox>,
    /// Held by the connection's thread for as long as it works on a batch of packets: tasks do not wait
    /// for it, but leave wishes. In an `Arc` of its own so that a guard may be held apart from this.
    pub(super) state: Arc<Mutex<State>>,
    /// A task has at most one read, one write and one other wish a stream here.
    wishes: Mutex<Vec<Wish>>,
    /// The thread has been asked to look.
    pub(super) look_asked: AtomicBool,
    /// The peer's streams that nobody has accepted, for each direction; bounded by what it may open.
    arrived: [Arrived; 2],
    is_connected: AtomicBool,
    /// The handshake is done, or the connection is over.
    connected: Notify,
    /// Why the connection is over.
    error: OnceLock<ConnectionError>,
    closed: Notify,
}

#[derive(Default)]
struct Arrived {
    streams: Mutex<VecDeque<StreamId>>,
    /// A stream is here, or the connection is over.
    news: Notify,
}

impl Arrived {
    fn next(&self) -> Option<StreamId> {
        let mut streams = self.streams.lock();
        let id = streams.pop_front()?;
        if !streams.is_empty() {
            // For whoever else waits: one notification may stand for many streams.
            self.news.notify_one();
        }
        Some(id)
    }
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
    /// Wishes that wait for the peer; at most one of each kind a stream.
    readings: HashMap<StreamId, Arc<Mutex<Reading>>>,
    writings: HashMap<StreamId, Writing>,
    deliveries: HashMap<StreamId, oneshot::Sender<Result<(), Error>>>,
    openings: VecDeque<oneshot::Sender<StreamId>>,
}

impl State {
    fn fulfil(&mut self, wish: Wish) {
        let proto = &mut self.proto;
        // An error of the last four means that the stream is over already.
        match wish {
            Wish::Read(id, reading) => {
                if !reading.lock().pull(proto, id) {
                    self.readings.insert(id, reading);
                }
            }
            Wish::Write(id, writing) => {
                if let Some(writing) = writing.push(proto, id) {
                    self.writings.insert(id, writing);
                }
            }
            Wish::Deliver(id, reply) => {
                self.deliveries.insert(id, reply);
                self.look_at_delivery(id);
            }
            Wish::Open(reply) => {
                self.openings.push_back(reply);
                self.open_streams();
            }
            Wish::SendWindow(bytes) => proto.set_send_window(bytes),
            Wish::ReceiveWindow(bytes) => {
                proto.set_receive_window(VarInt::from_u64(bytes).unwrap_or(VarInt::MAX));
            }
            Wish::Finish(id) => {
                if let Err(FinishError::Stopped(code)) = proto.send_stream(id).finish() {
                    // The peer waits for an end all the same: a stream that has none is never forgotten,
                    // and counts as open for as long as the connection lives.
                    let _ = proto.send_stream(id).reset(code);
                }
            }
            Wish::Reset(id) => {
                let _ = proto.send_stream(id).reset(CANCELLED);
                self.writings.remove(&id);
                self.look_at_delivery(id);
            }
            Wish::Stop(id) => {
                self.readings.remove(&id);
                let _ = proto.recv_stream(id).stop(CANCELLED);
            }
            Wish::Rank(id, rank) => {
                let _ = proto.send_stream(id).set_priority(rank);
            }
        }
    }

    fn look_at_delivery(&mut self, id: StreamId) {
        let result = match self.proto.send_stream(id).stopped() {
            Ok(None) => return,
            Ok(Some(_)) => Err(Error::StreamStopped),
            // Forgotten: the peer has everything, or it was reset on this side.
            Err(_) => Ok(()),
        };
        if let Some(reply) = self.deliveries.remove(&id) {
            // Whoever asked may have lost interest.
            let _ = reply.send(result);
        }
    }

    fn open_streams(&mut self) {
        while let Some(reply) = self.openings.pop_front() {
            if reply.is_closed() {
                continue;
            }
            let Some(id) = self.proto.streams().open(Dir::Bi) else {
                self.openings.push_front(reply);
                return;
            };
            if reply.send(id).is_err() {
                // Lost interest just now: the number is used up, as if for a request that was dropped.
                let _ = self.proto.send_stream(id).reset(CANCELLED);
                let _ = self.proto.recv_stream(id).stop(CANCELLED);
            }
        }
    }
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
                readings: HashMap::new(),
                writings: HashMap::new(),
                deliveries: HashMap::new(),
                openings: VecDeque::new(),
            })),
            wishes: Mutex::default(),
            look_asked: AtomicBool::new(false),
            arrived: Default::default(),
            is_connected: AtomicBool::new(false),
            connected: Notify::new(),
            error: OnceLock::new(),
            closed: Notify::new(),
        })
    }

    /// Leaves a wish. Where nobody works on the connection just now, it is seen to at once; what is to
    /// be sent for it, the thread sends.
    pub(super) fn wish(&self, wish: Wish) {
        self.wishes.lock().push(wish);
        if let Some(mut state) = self.state.try_lock() {
            self.fulfil_wishes(&mut state);
        } else if self.error.get().is_some() {
            // The thread may have dropped the connection, and nobody holds the lock for long any more.
            self.fulfil_wishes(&mut self.state.lock());
        }
        self.ask_to_look();
    }

    pub(super) fn fulfil_wishes(&self, state: &mut State) {
        loop {
            let wishes = std::mem::take(&mut *self.wishes.lock());
            if wishes.is_empty() {
                return;
            }
            for wish in wishes {
                state.fulfil(wish);
            }
            if let Some(error) = self.error.get() {
                Self::disappoint(state, error);
            }
        }
    }

    /// Asks the thread, once, to look at what a task has changed.
    fn ask_to_look(&self) {
        if !self.look_asked.swap(true, Ordering::AcqRel)
            && !self.inbox.tell(Command::Look(self.handle))
        {
            // The thread is gone, and nobody holds the lock for long any more.
            self.fulfil_wishes(&mut self.state.lock());
        }
    }

    /// Passes on what quinn-proto has to say; true if it said something.
    pub(super) fn deliver_events(&self, state: &mut State) -> bool {
        let mut any = false;
        while let Some(event) = state.proto.poll() {
            any = true;
            match event {
                Event::Connected => {
                    self.is_connected.store(true, Ordering::Release);
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
            StreamEvent::Opened { dir } => {
                let arrived = &self.arrived[dir as usize];
                let mut streams = arrived.streams.lock();
                while let Some(id) = state.proto.streams().accept(dir) {
                    streams.push_back(id);
                }
                drop(streams);
                arrived.news.notify_one();
            }
            StreamEvent::Available { dir: Dir::Bi } => state.open_streams(),
            StreamEvent::Available { dir: Dir::Uni } => {}
            StreamEvent::Readable { id } => {
                if let Some(reading) = state.readings.get(&id)
                    && reading.lock().pull(&mut state.proto, id)
                {
                    state.readings.remove(&id);
                }
            }
            StreamEvent::Writable { id } => {
                if let Some(writing) = state.writings.remove(&id)
                    && let Some(writing) = writing.push(&mut state.proto, id)
                {
                    state.writings.insert(id, writing);
                }
            }
            StreamEvent::Finished { id } => state.look_at_delivery(id),
            StreamEvent::Stopped { id, .. } => {
                if let Some(writing) = state.writings.remove(&id) {
                    writing.end(Err(Error::StreamStopped));
                }
                state.look_at_delivery(id);
            }
        }
    }

    /// The connection is over: everything that waits on it fails.
    pub(super) fn end(&self, state: &mut State, reason: ConnectionError) {
        let error = self.error.get_or_init(|| reason);
        Self::disappoint(state, error);
        self.connected.notify_waiters();
        for arrived in &self.arrived {
            arrived.news.notify_waiters();
            // A waiter that has not begun to wait yet.
            arrived.news.notify_one();
        }
        self.closed.notify_waiters();
    }

    fn disappoint(state: &mut State, error: &ConnectionError) {
        let error = connection_error(error.clone());
        for (_, reading) in state.readings.drain() {
            reading.lock().fail(error.clone());
        }
        for (_, writing) in state.writings.drain() {
            writing.end(Err(error.clone()));
        }
        for (_, reply) in state.deliveries.drain() {
            // Whoever asked may have lost interest.
            let _ = reply.send(Err(error.clone()));
        }
        // Whoever waits for a stream sees its sender go, and asks why.
        state.openings.clear();
    }

    /// The thread that moved the packets is gone.
    pub(super) fn abandon(&self) {
        let mut state = self.state.lock();
        self.end(
            &mut state,
            ConnectionError::TransportError(TransportError {
                code: TransportErrorCode::INTERNAL_ERROR,
                frame: None,
                reason: "the thread of the connection has ended".into(),
            }),
        );
        self.fulfil_wishes(&mut state);
    }

    pub(super) fn close(&self, reason: CloseReason) {
        if self.error.get().is_some() {
            return;
        }
        let mut state = self.state.lock();
        let code = VarInt::from_u32(reason as u32);
        state.proto.close(Instant::now(), code, Bytes::new());
        self.end(&mut state, ConnectionError::LocallyClosed);
        drop(state);
        self.ask_to_look();
    }

    /// Why the connection is over, if it is.
    pub(super) fn error(&self) -> Option<Error> {
        self.error.get().cloned().map(connection_error)
    }

    fn error_or_closed(&self) -> Error {
        self.error().unwrap_or(Error::ClosedLocally)
    }
}

impl Connection {
    /// Waits until the handshake is done.
    pub(super) async fn established(self) -> Result<Self, Error> {
        let shared = self.0.clone();
        loop {
            let notified = shared.connected.notified();
            if let Some(error) = shared.error() {
                return Err(error);
            }
            if shared.is_connected.load(Ordering::Acquire) {
                return Ok(self);
            }
            notified.await;
        }
    }

    /// The next stream that the peer has opened.
    async fn arrived(&self, dir: Dir) -> Result<StreamId, Error> {
        let arrived = &self.0.arrived[dir as usize];
        loop {
            let notified = arrived.news.notified();
            if let Some(error) = self.0.error() {
                return Err(error);
            }
            if let Some(id) = arrived.next() {
                return Ok(id);
            }
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
        drop(state);
        self.0.ask_to_look();
    }

    pub(crate) async fn await_admission(&self) -> Result<(), Error> {
        let id = self.arrived(Dir::Uni).await?;
        let mut stream = RecvStream::new(self.0.clone(), id);
        // Later versions may say something here; this one only waits for the end.
        while stream.read(usize::MAX).await?.is_some() {}
        Ok(())
    }

    pub(crate) async fn open(&self) -> Result<(SendStream, RecvStream), Error> {
        let (reply, opened) = oneshot::channel();
        self.0.wish(Wish::Open(reply));
        let id = opened.await.map_err(|_| self.0.error_or_closed())?;
        if let Some(error) = self.0.error() {
            return Err(error);
        }
        Ok(self.streams(id))
    }

    pub(crate) async fn accept(&self) -> Result<(SendStream, RecvStream), Error> {
        Ok(self.streams(self.arrived(Dir::Bi).await?))
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
        self.0.wish(Wish::SendWindow(bytes));
    }

    pub(crate) fn set_receive_window(&self, bytes: u64) {
        self.0.wish(Wish::ReceiveWindow(bytes));
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        self.0.close(reason);
    }

    pub(crate) async fn closed(&self) -> Error {
        loop {
            let notified = self.0.closed.notified();
            if let Some(error) = self.0.error() {
                return error;
            }
            notified.await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.error.get().is_some()
    }
}
