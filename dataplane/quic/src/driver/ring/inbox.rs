//! What threads are told, by tasks and by each other.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use pantala_uring::{Received, Waker};
use parking_lot::Mutex;
use quinn_proto::{ConnectionHandle, Incoming};
use tokio::sync::{Notify, oneshot};

use super::connection::Connection;
use crate::error::{CloseReason, Error};

/// Datagrams that wait for the thread that they belong to. Steering leaves few of them; a flood of
/// others is dropped, as a full socket would.
const FORWARDED_MAX: usize = 256;

/// What a thread is asked to do.
pub(super) enum Command {
    /// Connect to a peer.
    Connect {
        address: SocketAddr,
        reply: oneshot::Sender<Result<Connection, Error>>,
    },
    /// Go on with a handshake that a peer has begun.
    Accept {
        incoming: Incoming,
        reply: oneshot::Sender<Result<Connection, Error>>,
    },
    /// Send such a peer away.
    Refuse(Incoming),
    /// Let such a peer prove its address.
    Retry(Incoming),
    /// Look at a connection: a task has changed it.
    Look(ConnectionHandle),
}

/// A thread's letter box.
pub(super) struct Inbox {
    letters: Mutex<Letters>,
    waker: Waker,
}

#[derive(Default)]
struct Letters {
    /// Bounded by connections and handshakes: each has at most one letter here.
    commands: Vec<Command>,
    forwarded: VecDeque<Received>,
    close: Option<CloseReason>,
    /// The thread is gone.
    dead: bool,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

impl Inbox {
    pub(super) fn new(waker: Waker) -> Self {
        Self {
            letters: Mutex::default(),
            waker,
        }
    }

    /// Leaves a command; false where nobody will read it.
    pub(super) fn tell(&self, command: Command) -> bool {
        let mut letters = self.letters.lock();
        if letters.dead {
            return false;
        }
        letters.commands.push(command);
        drop(letters);
        self.waker.wake();
        true
    }

    /// Hands a datagram on; false where there is no room.
    pub(super) fn forward(&self, datagram: Received) -> bool {
        let mut letters = self.letters.lock();
        if letters.dead || letters.forwarded.len() >= FORWARDED_MAX {
            return false;
        }
        letters.forwarded.push_back(datagram);
        drop(letters);
        self.waker.wake();
        true
    }

    pub(super) fn close(&self, reason: CloseReason) {
        self.letters.lock().close.get_or_insert(reason);
        self.waker.wake();
    }

    /// Takes all letters out. The thread calls it with vectors that it keeps.
    pub(super) fn read(
        &self,
        commands: &mut Vec<Command>,
        forwarded: &mut VecDeque<Received>,
    ) -> Option<CloseReason> {
        let mut letters = self.letters.lock();
        std::mem::swap(&mut letters.commands, commands);
        std::mem::swap(&mut letters.forwarded, forwarded);
        letters.close
    }

    /// No letter is read any more; returns those that were not.
    pub(super) fn shut(&self) -> Vec<Command> {
        let mut letters = self.letters.lock();
        letters.dead = true;
        letters.forwarded.clear();
        std::mem::take(&mut letters.commands)
    }
}

/// What the endpoint and its threads share.
#[derive(Debug)]
pub(super) struct Hall {
    state: Mutex<HallState>,
    /// Handshakes have come, or the endpoint has been closed.
    pub(super) arrived: Notify,
    /// A thread has ended.
    pub(super) ended: Notify,
}

#[derive(Debug)]
struct HallState {
    /// Handshakes that peers have begun, with the thread they came to. quinn-proto refuses more than
    /// `handshakes_max` a thread.
    incoming: VecDeque<(Incoming, usize)>,
    closed: bool,
    threads: usize,
    /// How many connections with each address each thread has: a stateless reset does not say whose
    /// connection it is for.
    peers: HashMap<SocketAddr, Vec<u32>>,
}

impl Hall {
    pub(super) fn new(threads: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(HallState {
                incoming: VecDeque::new(),
                closed: false,
                threads,
                peers: HashMap::new(),
            }),
            arrived: Notify::new(),
            ended: Notify::new(),
        })
    }

    /// Shows a handshake to whoever accepts; gives it back where the endpoint is closed.
    pub(super) fn show(&self, incoming: Incoming, thread: usize) -> Option<Incoming> {
        let mut state = self.state.lock();
        if state.closed {
            return Some(incoming);
        }
        state.incoming.push_back((incoming, thread));
        drop(state);
        self.arrived.notify_one();
        None
    }

    /// The next handshake; `Err` once the endpoint is closed.
    pub(super) fn next(&self) -> Result<Option<(Incoming, usize)>, ()> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(());
        }
        Ok(state.incoming.pop_front())
    }

    /// No handshake is shown any more; returns those that nobody took.
    pub(super) fn close(&self) -> VecDeque<(Incoming, usize)> {
        let mut state = self.state.lock();
        state.closed = true;
        let left = std::mem::take(&mut state.incoming);
        drop(state);
        self.arrived.notify_one();
        left
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    pub(super) fn thread_ended(&self) {
        self.state.lock().threads -= 1;
        self.ended.notify_waiters();
    }

    pub(super) fn threads(&self) -> usize {
        self.state.lock().threads
    }

    pub(super) fn add_peer(&self, peer: SocketAddr, thread: usize) {
        let mut state = self.state.lock();
        let counts = state.peers.entry(peer).or_default();
        if counts.len() <= thread {
            counts.resize(thread + 1, 0);
        }
        counts[thread] += 1;
    }

    pub(super) fn remove_peer(&self, peer: SocketAddr, thread: usize) {
        let mut state = self.state.lock();
        if let Some(counts) = state.peers.get_mut(&peer) {
            if let Some(count) = counts.get_mut(thread) {
                *count = count.saturating_sub(1);
            }
            if counts.iter().all(|count| *count == 0) {
                state.peers.remove(&peer);
            }
        }
    }

    /// The threads that have connections with `peer`.
    pub(super) fn threads_with(&self, peer: &SocketAddr) -> Vec<usize> {
        let state = self.state.lock();
        let counts = state.peers.get(peer).map_or(&[][..], Vec::as_slice);
        (0..counts.len()).filter(|t| counts[*t] > 0).collect()
    }
}
