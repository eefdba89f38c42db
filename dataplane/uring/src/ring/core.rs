//! The ring's logic, over any kernel.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::config::{Counters, RingConfig};
use super::files::{FILE_OPERATIONS_MAX, Files, Next};
use super::receive::Buffers;
use super::tag::Tag;
use crate::error::{Busy, RingError};
use crate::event::{Event, SendHead, SocketId};
use crate::kernel::{Kernel, Operation, Stay};
use crate::lent::Lent;
use crate::message::{Message, Pool, SendBuffer};
use crate::wake::{Shared, Waker};

/// Sockets of one ring.
pub(super) const SOCKETS_MAX: usize = 64;
/// The read of the bell, and the cancellation of everything.
pub(super) const CONTROL_OPERATIONS_MAX: usize = 2;
/// How long to leave a kernel alone that is short of memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(1);

pub(super) struct Socket {
    /// Kept open.
    _socket: UdpSocket,
    fd: RawFd,
    is_v6: bool,
    /// A receive is in flight.
    pub(super) is_receiving: bool,
    /// Errors since something arrived.
    pub(super) errors: u32,
}

pub(super) struct Sending {
    pub(super) message: Lent<Message>,
    /// What came of it, where the bytes are still in use by the network.
    pub(super) result: Option<i32>,
}

pub(super) struct Core<K: Kernel> {
    pub(super) kernel: K,
    /// Operations that the kernel's queue had no room for, in order. At most one for each in flight.
    backlog: VecDeque<(Operation, Tag)>,
    pub(super) sockets: Vec<Socket>,
    pub(super) buffers: Buffers,
    template: Lent<libc::msghdr>,
    pub(super) pool: Rc<Pool>,
    /// By number of the message.
    pub(super) sending: Vec<Option<Sending>>,
    zero_copy_sends: bool,
    pub(super) files: Files,
    wake: Arc<Shared>,
    /// What is read from the bell.
    pub(super) bell: Option<Lent<u64>>,
    pub(super) bell_error: Option<io::Error>,
    is_woken: bool,
    /// Events that no completion brings. At most one for each call that made one.
    pending: VecDeque<Event>,
    /// Operations whose last completion is still to come.
    pub(super) in_flight: usize,
    pub(super) is_closing: bool,
    pub(super) counters: Counters,
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
            is_receiving: false,
            errors: 0,
        });
        self.receive(id);
        Ok(id)
    }

    pub(super) fn take_send_buffer(&mut self) -> Option<SendBuffer> {
        self.pool.take()
    }

    pub(super) fn send(&mut self, socket: SocketId, buffer: SendBuffer, head: &SendHead) {
        assert!(
            buffer.is_of(&self.pool),
            "a buffer is sent by the ring that it was taken from"
        );
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

    pub(super) fn receive(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.index()];
        socket.is_receiving = true;
        let operation = Operation::Receive {
            fd: socket.fd,
            template: self.template.address(),
        };
        self.start(operation, Tag::Receive { socket: id.0 });
    }

    /// Keeps a read of the bell in flight.
    pub(super) fn hang_bell(&mut self) {
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

    pub(super) fn push(&mut self, operation: Operation, tag: Tag) {
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

    pub(super) fn work_off_backlog(&mut self) -> Result<(), RingError> {
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

    pub(super) fn enter(&mut self, stay: Stay) -> Result<(), RingError> {
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
}
