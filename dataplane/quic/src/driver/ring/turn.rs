//! One turn of a thread: datagrams in, timers, datagrams out, for each connection that has news.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::BytesMut;
use pantala_uring::{Received, SendHead};
use parking_lot::{ArcMutexGuard, RawMutex};
use quinn_proto::{ConnectionHandle, DatagramEvent, EcnCodepoint, Transmit};

use super::batch::{destination_id, next_connection};
use super::connection::{Shared, State};
use super::thread::Thread;
use crate::driver::ids::thread_of;
use crate::driver::setup::CALL_BYTES_MAX;

/// Most datagrams that the kernel cuts one call into (UDP_MAX_SEGMENTS of older kernels).
const SEGMENTS_MAX: usize = 64;
/// Calls that one connection may fill before the others have their turn.
const CALLS_PER_TURN: usize = 8;
/// Bytes of what a datagram is answered with where no connection does.
const ANSWER_BYTES: usize = 2048;

/// The connections of a thread.
#[derive(Default)]
pub(super) struct Table {
    /// By handle.
    entries: Vec<Option<Entry>>,
    /// Handles of those that have news.
    news: Vec<usize>,
    open: usize,
}

struct Entry {
    shared: Arc<Shared>,
    peer: SocketAddr,
    deadline: Option<Instant>,
    has_news: bool,
}

impl Table {
    pub(super) fn add(&mut self, shared: Arc<Shared>, peer: SocketAddr) {
        let index = shared.handle.0;
        if self.entries.len() <= index {
            self.entries.resize_with(index + 1, || None);
        }
        self.entries[index] = Some(Entry {
            shared,
            peer,
            deadline: None,
            has_news: true,
        });
        self.news.push(index);
        self.open += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open == 0
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = &Arc<Shared>> {
        self.entries.iter().flatten().map(|entry| &entry.shared)
    }

    pub(super) fn look_at(&mut self, handle: ConnectionHandle) {
        if let Some(Some(entry)) = self.entries.get_mut(handle.0)
            && !std::mem::replace(&mut entry.has_news, true)
        {
            self.news.push(handle.0);
        }
    }

    pub(super) fn look_at_all(&mut self) {
        for index in 0..self.entries.len() {
            self.look_at(ConnectionHandle(index));
        }
    }

    /// A timer that has run out is news.
    pub(super) fn expire(&mut self, now: Instant) {
        for index in 0..self.entries.len() {
            let due = self.entries[index]
                .as_ref()
                .and_then(|entry| entry.deadline)
                .is_some_and(|deadline| deadline <= now);
            if due {
                self.look_at(ConnectionHandle(index));
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.entries
            .iter()
            .flatten()
            .filter_map(|entry| entry.deadline)
            .min()
    }

    fn get(&self, handle: ConnectionHandle) -> Option<&Arc<Shared>> {
        Some(&self.entries.get(handle.0)?.as_ref()?.shared)
    }
}

/// Whose a datagram is.
enum Owner {
    /// This thread's, as far as can be seen without its connections.
    Here,
    Thread(usize),
    /// Nobody's connection ID: noise, or a stateless reset.
    Unknown,
}

impl Thread {
    /// Takes in what one receive brought: datagrams of one size, but perhaps the last, from one peer. The
    /// kernel merges by address and port, so those of several connections may be among them; one on the
    /// wrong thread would be answered with a reset, and the peer would believe it.
    pub(super) fn take_datagrams(&mut self, mut received: Received) {
        while let Some(at) = next_connection(&received.payload, received.segment_bytes) {
            let rest = received.payload.split_off(at);
            let payload = std::mem::replace(&mut received.payload, rest);
            self.take_connection(Received {
                payload,
                ..received
            });
        }
        self.take_connection(received);
    }

    /// Datagrams with one connection ID.
    fn take_connection(&mut self, received: Received) {
        let first = received.payload.len().min(received.segment_bytes.max(1));
        match self.owner(&received.payload[..first]) {
            Owner::Here => self.handle(received),
            // What finds no room is lost, like any datagram.
            Owner::Thread(thread) => {
                let _ = self.inboxes[thread].forward(received);
            }
            Owner::Unknown => self.ask_around(received),
        }
    }

    pub(super) fn take_forwarded(&mut self, received: Received) {
        self.handle(received);
    }

    fn owner(&mut self, datagram: &[u8]) -> Owner {
        let (is_short, id) = destination_id(datagram);
        let Some(id) = id else { return Owner::Here };
        if is_short && id == self.last_id {
            return Owner::Here;
        }
        // The first packets of a handshake carry an ID that the client made up; whoever they are led to
        // takes them, by that ID or by a hash: all of one handshake are led to the same thread.
        if !self.setup.ids.made(id) {
            return if is_short {
                Owner::Unknown
            } else {
                Owner::Here
            };
        }
        let Some(first) = id.first() else {
            return Owner::Here;
        };
        let thread = usize::from(thread_of(*first, self.threads));
        if thread != self.number {
            return Owner::Thread(thread);
        }
        if is_short {
            self.last_id.copy_from_slice(id);
        }
        Owner::Here
    }

    /// A stateless reset is believed by the thread that has the connection, which it does not name.
    fn ask_around(&mut self, received: Received) {
        for thread in self.hall.threads_with(&received.source) {
            if thread != self.number {
                let _ = self.inboxes[thread].forward(Received {
                    payload: BytesMut::from(&received.payload[..]),
                    ..received
                });
            }
        }
        self.handle(received);
    }

    fn handle(&mut self, received: Received) {
        let Received {
            mut payload,
            source,
            local_ip,
            ecn,
            segment_bytes,
            ..
        } = received;
        let ecn = EcnCodepoint::from_bits(ecn);
        let mut current: Option<(ConnectionHandle, ArcMutexGuard<RawMutex, State>)> = None;
        while !payload.is_empty() {
            let length = payload.len().min(segment_bytes.max(1));
            let datagram = payload.split_to(length);
            let mut answer = Vec::new();
            let event =
                self.endpoint
                    .handle(self.now, source, local_ip, ecn, datagram, &mut answer);
            match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if current.as_ref().is_none_or(|(held, _)| *held != handle) {
                        current = None;
                        let Some(shared) = self.table.get(handle) else {
                            continue;
                        };
                        current = Some((handle, shared.state.lock_arc()));
                        self.table.look_at(handle);
                    }
                    if let Some((_, state)) = &mut current {
                        state.proto.handle_event(event);
                    }
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    current = None;
                    if let Some(incoming) = self.hall.show(incoming, self.number) {
                        answer.reserve(ANSWER_BYTES);
                        let transmit = self.endpoint.refuse(incoming, &mut answer);
                        self.send_answer(&transmit, &answer);
                    }
                }
                Some(DatagramEvent::Response(transmit)) => self.send_answer(&transmit, &answer),
                None => {}
            }
        }
    }

    /// Gives every connection with news a turn; true if some are not done.
    pub(super) fn drive(&mut self) -> bool {
        self.buffers_out = false;
        let mut news = std::mem::take(&mut self.table.news);
        for index in news.drain(..) {
            let Some(Some(entry)) = self.table.entries.get_mut(index) else {
                continue;
            };
            entry.has_news = false;
            let shared = entry.shared.clone();
            match self.drive_one(&shared) {
                Turn::Done(deadline) => {
                    if let Some(Some(entry)) = self.table.entries.get_mut(index) {
                        entry.deadline = deadline;
                    }
                }
                Turn::Unfinished => self.table.look_at(shared.handle),
                Turn::Over => {
                    if let Some(entry) = self.table.entries[index].take() {
                        self.table.open -= 1;
                        self.hall.remove_peer(entry.peer, self.number);
                    }
                }
            }
        }
        // Keeps the allocation; what came up meanwhile goes first into the next turn.
        news.append(&mut self.table.news);
        self.table.news = news;
        // Where all send buffers are on their way, their completion wakes the thread.
        !self.table.news.is_empty() && !self.buffers_out
    }

    fn drive_one(&mut self, shared: &Shared) -> Turn {
        // Before the wishes are read: what is wished from now on is seen in another turn.
        shared.look_asked.store(false, Ordering::Release);
        let mut guard = shared.state.lock();
        let state = &mut *guard;
        shared.fulfil_wishes(state);
        let mut calls = 0;
        loop {
            if state
                .proto
                .poll_timeout()
                .is_some_and(|deadline| deadline <= self.now)
            {
                state.proto.handle_timeout(self.now);
            }
            let mut again = shared.deliver_events(state);
            while let Some(event) = state.proto.poll_endpoint_events() {
                again = true;
                if let Some(event) = self.endpoint.handle_event(shared.handle, event) {
                    state.proto.handle_event(event);
                }
            }
            if state.proto.is_drained() {
                // What was wished just before its end; what is wished from now on sees the end itself.
                shared.fulfil_wishes(state);
                return Turn::Over;
            }
            loop {
                if calls >= CALLS_PER_TURN {
                    return Turn::Unfinished;
                }
                let Some(mut buffer) = self.ring.take_send_buffer() else {
                    self.buffers_out = true;
                    return Turn::Unfinished;
                };
                let mtu = usize::from(state.proto.current_mtu());
                let datagrams_max = (CALL_BYTES_MAX / mtu).clamp(1, SEGMENTS_MAX);
                match state
                    .proto
                    .poll_transmit(self.now, datagrams_max, &mut buffer)
                {
                    Some(transmit) => {
                        calls += 1;
                        again = true;
                        self.ring.send(self.socket, buffer, head(&transmit));
                    }
                    None => {
                        self.ring.give_back(buffer);
                        break;
                    }
                }
            }
            if !again {
                return Turn::Done(state.proto.poll_timeout());
            }
        }
    }
}

/// How a connection's turn ended.
enum Turn {
    /// Nothing to do until then, or until news come.
    Done(Option<Instant>),
    /// It has more to send.
    Unfinished,
    /// The connection is over and its peer knows.
    Over,
}

/// How the ring is told what quinn-proto says of a batch.
pub(super) fn head(transmit: &Transmit) -> SendHead {
    SendHead {
        destination: transmit.destination,
        source_ip: transmit.src_ip,
        ecn: transmit.ecn.map_or(0, |ecn| ecn as u8),
        segment_bytes: transmit
            .segment_size
            .and_then(|segment| u16::try_from(segment).ok()),
    }
}
