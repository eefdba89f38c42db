//! The ring's logic, over any kernel.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::config::{Counters, RingConfig};
use super::files::{FILE_OPERATIONS_MAX, Files, Next};
use super::receive::{Buffers, Outcome};
use super::tag::Tag;
use crate::error::{Busy, RingError};
use crate::event::{Event, SendHead, SocketId};
use crate::kernel::{Completion, Kernel, Operation, Stay};
use crate::lent::Lent;
use crate::message::{Message, Pool, SendBuffer};
use crate::wake::{Shared, Waker};

/// Sockets of one ring.
pub(super) const SOCKETS_MAX: usize = 64;
/// The read of the bell, and the cancellation of everything.
pub(super) const CONTROL_OPERATIONS_MAX: usize = 2;
/// Errors in a row after which a socket is given up. Datagrams that bounce are reported as errors too, so one means
/// nothing.
const RECEIVE_ERRORS_MAX: u32 = 16;
/// How long a ring that is dropped waits for what is in flight.
const DROP_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long to leave a kernel alone that is short of memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(1);

struct Socket {
    /// Kept open.
    _socket: UdpSocket,
    fd: RawFd,
    is_v6: bool,
    /// Errors since something arrived.
    errors: u32,
}

struct Sending {
    message: Lent<Message>,
    /// What came of it, where the bytes are still in use by the network.
    result: Option<i32>,
}

pub(super) struct Core<K: Kernel> {
    kernel: K,
    /// Operations that the kernel's queue had no room for, in order. At most one for each in flight.
    backlog: VecDeque<(Operation, Tag)>,
    sockets: Vec<Socket>,
    buffers: Buffers,
    template: Lent<libc::msghdr>,
    pool: Rc<Pool>,
    /// By number of the message.
    sending: Vec<Option<Sending>>,
    zero_copy_sends: bool,
    files: Files,
    wake: Arc<Shared>,
    /// What is read from the bell.
    bell: Option<Lent<u64>>,
    bell_error: Option<io::Error>,
    is_woken: bool,
    /// Events that no completion brings. At most one for each call that made one.
    pending: VecDeque<Event>,
    /// Operations whose last completion is still to come.
    in_flight: usize,
    is_closing: bool,
    counters: Counters,
}

impl<K: Kernel> Core<K> {
    pub(super) fn new(mut kernel: K, config: &RingConfig) -> Result<Self, RingError> {
        let wake = Shared::new().map_err(|error| RingError::Kernel {
            call: "eventfd",
            error,
        })?;
        let buffers = Buffers::new(
            &mut kernel,
            config.receive_buffers,
            config.receive_buffer_bytes,
            config.receive_buffers_lent_max,
        );
        let operations_max =
            config.send_buffers + SOCKETS_MAX + 2 * FILE_OPERATIONS_MAX + CONTROL_OPERATIONS_MAX;
        let mut core = Self {
            kernel,
            backlog: VecDeque::with_capacity(operations_max),
            sockets: Vec::new(),
            buffers,
            template: Lent::new(Box::new(Buffers::template())),
            pool: Pool::new(config.send_buffers, config.send_buffer_bytes),
            sending: (0..config.send_buffers).map(|_| None).collect(),
            zero_copy_sends: false,
            files: Files::new(),
            wake,
            bell: None,
            bell_error: None,
            is_woken: false,
            pending: VecDeque::new(),
            in_flight: 0,
            is_closing: false,
            counters: Counters::default(),
        };
        core.hang_bell();
        Ok(core)
    }

    pub(super) fn kernel(&self) -> &K {
        &self.kernel
    }

    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            lent: self.buffers.lent() as u64,
            ..self.counters
        }
    }

    pub(super) fn set_zero_copy_sends(&mut self, on: bool) {
        self.zero_copy_sends = on;
    }

    pub(super) fn add_socket(&mut self, socket: UdpSocket) -> Result<SocketId, RingError> {
        if self.sockets.len() == SOCKETS_MAX {
            return Err(RingError::Config {
                name: "sockets",
                value: SOCKETS_MAX + 1,
                rule: "at most 64",
            });
        }
        let local = socket.local_addr().map_err(|error| RingError::Kernel {
            call: "getsockname",
            error,
        })?;
        // A socket that does not wait would make the kernel report that it is full instead of waiting for room.
        socket
            .set_nonblocking(false)
            .map_err(|error| RingError::Kernel {
                call: "fcntl",
                error,
            })?;
        let id = SocketId(self.sockets.len() as u32);
        self.sockets.push(Socket {
            fd: socket.as_raw_fd(),
            is_v6: local.is_ipv6(),
            _socket: socket,
            errors: 0,
        });
        self.receive(id);
        Ok(id)
    }

    pub(super) fn take_send_buffer(&mut self) -> Option<SendBuffer> {
        self.pool.take()
    }

    pub(super) fn send(&mut self, socket: SocketId, buffer: SendBuffer, head: &SendHead) {
        let Socket { fd, is_v6, .. } = self.sockets[socket.index()];
        let mut message = buffer.into_message();
        message.address(socket, is_v6, head);
        let index = message.index;
        let lent = Lent::new(message);
        // SAFETY: the message is ours until the operation is pushed, below.
        let header = unsafe { Message::link(lent.address()) };
        self.sending[index as usize] = Some(Sending {
            message: lent,
            result: None,
        });
        let operation = Operation::Send {
            fd,
            message: header,
            zero_copy: self.zero_copy_sends,
        };
        self.start(operation, Tag::Send { message: index });
    }

    pub(super) fn read(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        buffer: BytesMut,
        token: u64,
    ) -> Result<(), Busy<BytesMut>> {
        let (operation, tag) = self.files.read(file, offset, buffer, token)?;
        self.start(operation, tag);
        Ok(())
    }

    pub(super) fn write_vectored(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        slices: Vec<Bytes>,
        token: u64,
    ) -> Result<(), Busy<Vec<Bytes>>> {
        match self.files.write(file, offset, slices, token)? {
            Next::Push(operation, tag) => self.start(operation, tag),
            Next::Done(event) => self.pending.push_back(event),
        }
        Ok(())
    }

    pub(super) fn cancel(&mut self, token: u64) {
        let tags: Vec<Tag> = self.files.cancel(token).collect();
        for tag in tags {
            let tag = tag.encode();
            self.push(Operation::Cancel { tag }, Tag::Cancel);
        }
    }

    pub(super) fn submit(&mut self) -> Result<(), RingError> {
        self.work_off_backlog()?;
        if self.kernel.has_queued() {
            self.enter(Stay::No)?;
        }
        Ok(())
    }

    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<(), RingError> {
        if let Some(error) = self.bell_error.take() {
            return Err(RingError::Kernel {
                call: "reading the eventfd",
                error,
            });
        }
        self.work_off_backlog()?;
        self.is_woken |= self.wake.take_note();
        let is_ready = self.is_woken || !self.pending.is_empty() || self.kernel.has_completion();
        if is_ready {
            if self.kernel.has_queued() {
                self.enter(Stay::Reap)?;
            }
            return Ok(());
        }
        if timeout == Some(Duration::ZERO) {
            return self.enter(Stay::Reap);
        }
        if !self.wake.fall_asleep() {
            self.is_woken |= self.wake.get_up();
            return self.enter(Stay::Reap);
        }
        self.counters.sleeps += 1;
        let entered = self.enter(Stay::Until(timeout));
        self.is_woken |= self.wake.get_up();
        entered
    }

    pub(super) fn next_event(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.is_woken) {
            return Some(Event::Woken);
        }
        if let Some(event) = self.pending.pop_front() {
            return Some(event);
        }
        while let Some(completion) = self.kernel.next_completion() {
            if let Some(event) = self.complete(completion) {
                return Some(event);
            }
        }
        None
    }

    fn receive(&mut self, id: SocketId) {
        let operation = Operation::Receive {
            fd: self.sockets[id.index()].fd,
            template: self.template.address(),
        };
        self.start(operation, Tag::Receive { socket: id.0 });
    }

    /// Keeps a read of the bell in flight.
    fn hang_bell(&mut self) {
        let bell = Lent::new(Box::new(0));
        let operation = Operation::Read {
            fd: self.wake.bell(),
            address: bell.address().cast(),
            bytes: size_of::<u64>() as u32,
            offset: 0,
        };
        self.bell = Some(bell);
        self.start(operation, Tag::Bell);
    }

    /// Pushes an operation that has memory on loan.
    fn start(&mut self, operation: Operation, tag: Tag) {
        self.in_flight += 1;
        self.push(operation, tag);
    }

    fn push(&mut self, operation: Operation, tag: Tag) {
        if self.backlog.is_empty() && self.try_push(&operation, tag) {
            return;
        }
        self.backlog.push_back((operation, tag));
        // A full queue is handed over. If that fails, the next `wait` says so.
        if let Err(error) = self.work_off_backlog() {
            tracing::debug!(%error, "handing over a full queue");
        }
    }

    fn try_push(&mut self, operation: &Operation, tag: Tag) -> bool {
        // SAFETY: what the operation points at is in a `Lent` or `LentBuffer`, or is the template, which is lent for as
        // long as the ring lives: none is opened before the operation's last completion, and all leak rather than be
        // freed. The descriptors are kept open by `sockets`, `files` and `wake`.
        unsafe { self.kernel.push(operation, tag.encode()) }
    }

    fn work_off_backlog(&mut self) -> Result<(), RingError> {
        while let Some((operation, tag)) = self.backlog.front().copied() {
            if !self.try_push(&operation, tag) {
                self.enter(Stay::No)?;
                if !self.try_push(&operation, tag) {
                    break;
                }
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    fn enter(&mut self, stay: Stay) -> Result<(), RingError> {
        self.counters.enters += 1;
        match self.kernel.enter(stay) {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Completions must be taken first.
                Some(libc::EBUSY) if self.kernel.has_completion() => Ok(()),
                Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => {
                    std::thread::sleep(SHORTAGE_PAUSE);
                    Ok(())
                }
                _ => Err(RingError::Kernel {
                    call: "io_uring_enter",
                    error,
                }),
            },
        }
    }

    fn complete(&mut self, completion: Completion) -> Option<Event> {
        let Some(tag) = Tag::decode(completion.tag) else {
            tracing::error!(
                tag = completion.tag,
                "a completion of nothing that was begun"
            );
            return None;
        };
        if tag == Tag::Cancel {
            return None;
        }
        self.in_flight -= usize::from(!completion.more());
        match tag {
            Tag::Receive { socket } => self.complete_receive(SocketId(socket), completion),
            Tag::Send { message } => self.complete_send(message, completion),
            Tag::File { slot, generation } => {
                match self.files.complete(slot, generation, completion.bytes())? {
                    Next::Push(operation, tag) => {
                        self.start(operation, tag);
                        None
                    }
                    Next::Done(event) => Some(event),
                }
            }
            Tag::Bell => {
                self.complete_bell(completion);
                None
            }
            Tag::Cancel => None,
        }
    }

    fn complete_receive(&mut self, id: SocketId, completion: Completion) -> Option<Event> {
        let socket = self.sockets.get_mut(id.index())?;
        let mut event = None;
        let mut error = None;
        match (completion.bytes(), completion.buffer()) {
            (Ok(written), Some(number)) if self.is_closing => self.buffers.retire(number, written),
            (Ok(written), Some(number)) => {
                socket.errors = 0;
                event = match self.buffers.complete(&mut self.kernel, number, written, id) {
                    Outcome::InPlace(received) => {
                        self.counters.received_in_place += 1;
                        Some(Event::Received(received))
                    }
                    Outcome::Copied(received) => {
                        self.counters.received_copied += 1;
                        self.counters.copied_bytes += received.payload.len() as u64;
                        Some(Event::Received(received))
                    }
                    Outcome::Discarded => {
                        self.counters.discarded += 1;
                        None
                    }
                };
            }
            (Ok(_), None) => {}
            (Err(no_buffer), _) if no_buffer.raw_os_error() == Some(libc::ENOBUFS) => {}
            (Err(other), _) => {
                socket.errors += 1;
                error = Some(other);
            }
        }
        if completion.more() || self.is_closing {
            return event;
        }
        match error {
            Some(error) if socket.errors > RECEIVE_ERRORS_MAX => {
                Some(Event::SocketFailed { socket: id, error })
            }
            _ => {
                self.counters.rearmed += 1;
                self.receive(id);
                event
            }
        }
    }

    fn complete_send(&mut self, index: u32, completion: Completion) -> Option<Event> {
        let slot = self.sending.get_mut(index as usize)?;
        if completion.more() {
            slot.as_mut()?.result = Some(completion.result);
            return None;
        }
        let Sending { message, result } = slot.take()?;
        // SAFETY: this was the operation's last completion.
        let message = unsafe { message.take_back() };
        let completion = Completion {
            result: result.unwrap_or(completion.result),
            ..completion
        };
        let event = Event::Sent {
            socket: message.socket,
            result: completion.bytes(),
            destination: message.destination,
        };
        self.pool.put(message);
        Some(event)
    }

    fn complete_bell(&mut self, completion: Completion) {
        if let Some(bell) = self.bell.take() {
            // SAFETY: the read's only completion was reaped.
            drop(unsafe { bell.take_back() });
        }
        if self.is_closing {
            return;
        }
        match completion.bytes() {
            Ok(_) => self.hang_bell(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.hang_bell(),
            Err(error) => self.bell_error = Some(error),
        }
    }

    /// Ends everything. True if the kernel has given everything back.
    fn close(&mut self) -> bool {
        self.is_closing = true;
        self.push(Operation::CancelAll, Tag::Cancel);
        let deadline = Instant::now() + DROP_WAIT_MAX;
        loop {
            while let Some(completion) = self.kernel.next_completion() {
                drop(self.complete(completion));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.in_flight == 0 {
                return true;
            }
            if left.is_zero() {
                return false;
            }
            let entered = self
                .work_off_backlog()
                .and_then(|()| self.enter(Stay::Until(Some(left))));
            if let Err(error) = entered {
                tracing::debug!(%error, "closing a ring");
                return false;
            }
        }
    }
}

impl<K: Kernel> Drop for Core<K> {
    fn drop(&mut self) {
        if !self.close() {
            // All that is on loan stays in `Lent`s, which do not free.
            tracing::warn!(
                operations = self.in_flight,
                "a ring was dropped with operations in flight: their memory is leaked"
            );
            return;
        }
        self.kernel.forget_buffers();
        // SAFETY: nothing is in flight, and nothing is begun any more.
        unsafe { self.buffers.retire_all() };
    }
}
