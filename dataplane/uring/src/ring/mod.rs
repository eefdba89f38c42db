//! One thread's ring.

mod complete;
mod config;
mod core;
mod files;
mod receive;
mod tag;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::marker::PhantomData;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

pub use self::config::{Counters, RingConfig};
use self::core::Core;
use crate::error::{Busy, RingError};
use crate::event::{Event, SendHead, SocketId};
use crate::kernel::real::{RealKernel, SetUp};
use crate::message::SendBuffer;
use crate::wake::Waker;

/// Sockets, files and the memory that the kernel works on, driven by one thread: the one that made it.
///
/// Call `wait`, then `next_event` until it says `None`, then again.
pub struct Ring {
    core: Core<RealKernel>,
    /// The kernel accepts calls from the thread that made the ring only.
    _here: PhantomData<*const ()>,
}

impl Ring {
    /// A ring for this thread.
    pub fn new(config: &RingConfig) -> Result<Self, RingError> {
        config.check()?;
        let kernel = RealKernel::new(
            &SetUp::ALL,
            config.entries,
            config.completions_max(),
            config.receive_buffers,
        )?;
        Ok(Self {
            core: Core::new(kernel, config)?,
            _here: PhantomData,
        })
    }

    /// Wakes this ring from any thread.
    pub fn waker(&self) -> Waker {
        self.core.waker()
    }

    /// Receives from `socket` from now on, until it fails or the ring is dropped. At most 64 sockets a ring.
    pub fn add_socket(&mut self, socket: UdpSocket) -> Result<SocketId, RingError> {
        self.core.add_socket(socket)
    }

    /// An empty buffer to fill and send. `None`: all are in flight (or taken), so stop until an [`Event::Sent`].
    pub fn take_send_buffer(&mut self) -> Option<SendBuffer> {
        self.core.take_send_buffer()
    }

    /// The buffer is not sent after all. Dropping it does the same.
    pub fn give_back(&mut self, buffer: SendBuffer) {
        drop(buffer);
    }

    /// Queues a datagram or batch. The next `wait` or `submit` hands it to the kernel, which holds it until the socket
    /// has room; then there is an [`Event::Sent`].
    ///
    /// # Panics
    ///
    /// If the buffer or the socket is another ring's.
    pub fn send(&mut self, socket: SocketId, buffer: SendBuffer, head: SendHead) {
        self.core.send(socket, buffer, &head);
    }

    /// Hands over what is queued now, without waiting.
    pub fn submit(&mut self) -> Result<(), RingError> {
        self.core.submit()
    }

    /// Hands over what is queued. Returns at once if an event is ready, else when there is one or `timeout` has passed
    /// (`None`: never). May also return without an event, for instance after a signal.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<(), RingError> {
        self.core.wait(timeout)
    }

    /// The next thing that has happened, without a system call.
    pub fn next_event(&mut self) -> Option<Event> {
        self.core.next_event()
    }

    /// Reads from `file` at `offset` into the spare room of `buffer`. Ends with [`Event::Read`].
    pub fn read(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        buffer: BytesMut,
        token: u64,
    ) -> Result<(), Busy<BytesMut>> {
        self.core.read(file, offset, buffer, token)
    }

    /// Writes all of `slices` to `file`, one after the other from `offset` on. Ends with [`Event::Wrote`].
    pub fn write_vectored(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        slices: Vec<Bytes>,
        token: u64,
    ) -> Result<(), Busy<Vec<Bytes>>> {
        self.core.write_vectored(file, offset, slices, token)
    }

    /// Cancels the file operations with this token. They still end with their event, with `ECANCELED` or, where they were
    /// too far on, as if nothing had been said.
    pub fn cancel(&mut self, token: u64) {
        self.core.cancel(token);
    }

    /// Whether batches are sent without copying them into the kernel (`sendmsg_zc`). Off at first: over loopback, where the
    /// receiver's kernel then copies, it costs 1.3 times as much, and only a network card that cuts the batches itself
    /// can make it pay. False if this kernel cannot.
    pub fn set_zero_copy_sends(&mut self, on: bool) -> bool {
        let able = !on || crate::probe::has_zero_copy_sends(self.core.kernel().ring());
        self.core.set_zero_copy_sends(on && able);
        able
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.core.counters()
    }
}
