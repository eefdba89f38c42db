//! Receive buffers: with the kernel, with readers, and on their way between the two.
//!
//! The kernel writes a batch behind a head of fixed size: lengths and flags, the sender's name, control messages. What is
//! large enough goes to the reader as it is, without a copy, and another buffer takes its place. A *stub*, an empty
//! handle to the same allocation, stays here: once all slices that a reader made are gone, it turns into a buffer again.
//! The one that came free last is used first: it is the likeliest to be in the cache still. What a burst has added and
//! nobody needed since goes back to the allocator.
//!
//! A slice pins its whole buffer. So what fills less than an eighth of one is copied; what fills less than half, once half
//! of the `lent_max` buffers that readers may have are with them; and everything, once all of them are.

#![allow(unsafe_code)]

use std::collections::VecDeque;

use bytes::{Buf, BytesMut};

use crate::event::{Received, SocketId};
use crate::kernel::Kernel;
use crate::lent::LentBuffer;
use crate::socket::address::{self, NAME_BYTES};
use crate::socket::control::{self, RECEIVE_BYTES as CONTROL_BYTES};

/// Four 32-bit numbers: the length of the name, of the control messages, of the payload, and flags.
const LENGTHS_BYTES: usize = 16;
/// What stands in front of a payload.
pub(crate) const HEAD_BYTES: usize = LENGTHS_BYTES + NAME_BYTES + CONTROL_BYTES;
/// Stubs looked at for some that are free. They come free nearly in the order in which they were lent.
const STUBS_LOOKED_AT_MAX: usize = 4;
/// Batches after which those buffers are freed that lay unused all the while.
const TRIM_BATCHES: u32 = 1024;
/// Stubs that room is made for at the start.
const STUBS_AT_FIRST_MAX: usize = 4096;

/// What was done with a batch.
pub(super) enum Outcome {
    InPlace(Received),
    Copied(Received),
    /// Cut off, empty, without a sender; or of a buffer that the kernel did not have.
    Discarded,
}

pub(super) struct Buffers {
    /// By number: those that the kernel has.
    slots: Vec<Option<LentBuffer>>,
    stubs: VecDeque<BytesMut>,
    /// Neither with the kernel nor with readers; the one that came free last is at the end.
    free: Vec<BytesMut>,
    /// Fewest of them since the last trimming, and batches since then.
    free_min: usize,
    trim_age: u32,
    /// Head and payload.
    buffer_bytes: usize,
    lent_max: usize,
}

impl Buffers {
    /// `count` buffers, all with `kernel`.
    pub(super) fn new(
        kernel: &mut impl Kernel,
        count: u16,
        payload_bytes: usize,
        lent_max: usize,
    ) -> Self {
        let mut buffers = Self {
            slots: (0..count).map(|_| None).collect(),
            stubs: VecDeque::with_capacity(lent_max.min(STUBS_AT_FIRST_MAX)),
            free: Vec::new(),
            free_min: 0,
            trim_age: 0,
            buffer_bytes: HEAD_BYTES + payload_bytes,
            lent_max,
        };
        for number in 0..count {
            buffers.lend(
                kernel,
                number,
                BytesMut::with_capacity(buffers.buffer_bytes),
            );
        }
        buffers
    }

    /// The header that says how large name and control messages may get.
    pub(super) fn template() -> libc::msghdr {
        let mut template = crate::message::empty_header();
        template.msg_namelen = NAME_BYTES as libc::socklen_t;
        template.msg_controllen = CONTROL_BYTES as _;
        template
    }

    /// Buffers with readers, as far as known.
    pub(super) fn lent(&self) -> usize {
        self.stubs.len()
    }

    /// The kernel has written `written` bytes to buffer `number`. It gets another one, or the same.
    pub(super) fn complete(
        &mut self,
        kernel: &mut impl Kernel,
        number: u16,
        written: usize,
        socket: SocketId,
    ) -> Outcome {
        let Some(mut buffer) = self.take_back(number, written) else {
            tracing::error!(
                number,
                "the kernel names a receive buffer that it did not have"
            );
            return Outcome::Discarded;
        };
        let Some(head) = Head::parse(&buffer) else {
            buffer.clear();
            self.lend(kernel, number, buffer);
            return Outcome::Discarded;
        };
        let payload = &buffer[HEAD_BYTES..][..head.payload_bytes];
        let room_bytes = self.buffer_bytes - HEAD_BYTES;
        let lent_max = match head.payload_bytes {
            bytes if bytes < room_bytes / 8 => None,
            bytes if bytes < room_bytes / 2 => Some(self.lent_max / 2),
            _ => Some(self.lent_max),
        };
        let Some(next) = lent_max.and_then(|max| self.unused(max)) else {
            let copy = BytesMut::from(payload);
            buffer.clear();
            self.lend(kernel, number, buffer);
            return Outcome::Copied(head.received(socket, copy));
        };
        self.stubs.push_back(buffer.split_to(0));
        buffer.truncate(HEAD_BYTES + head.payload_bytes);
        buffer.advance(HEAD_BYTES);
        self.lend(kernel, number, next);
        Outcome::InPlace(head.received(socket, buffer))
    }

    /// Takes buffer `number` from the kernel for good.
    pub(super) fn retire(&mut self, number: u16, written: usize) {
        drop(self.take_back(number, written));
    }

    /// Takes all buffers from the kernel.
    ///
    /// # Safety
    ///
    /// No receive is in flight, nor will one be.
    pub(super) unsafe fn retire_all(&mut self) {
        for slot in self.slots.drain(..).flatten() {
            // SAFETY: as the caller promises; nothing was written.
            drop(unsafe { slot.take_back(0) });
        }
    }

    fn take_back(&mut self, number: u16, written: usize) -> Option<BytesMut> {
        let slot = self.slots.get_mut(usize::from(number))?.take()?;
        // SAFETY: the completion that the caller has reaped names this buffer and how far it was written; the kernel
        // does not come back to it until it is provided again.
        Some(unsafe { slot.take_back(written) })
    }

    fn lend(&mut self, kernel: &mut impl Kernel, number: u16, buffer: BytesMut) {
        let mut slot = LentBuffer::new(buffer);
        let (address, bytes) = slot.room();
        let bytes = bytes.min(self.buffer_bytes) as u32;
        self.slots[usize::from(number)] = Some(slot);
        // SAFETY: the slot keeps the memory until a completion names the buffer, and leaks it otherwise. It was empty,
        // so the kernel does not have a buffer of this number.
        unsafe { kernel.provide(number, address, bytes) };
    }

    /// A buffer that readers have let go of, or a new one as long as they have less than `lent_max`.
    fn unused(&mut self, lent_max: usize) -> Option<BytesMut> {
        for _ in 0..self.stubs.len().min(STUBS_LOOKED_AT_MAX) {
            let mut stub = self.stubs.pop_front()?;
            if stub.try_reclaim(self.buffer_bytes) {
                self.free.push(stub);
            } else {
                self.stubs.push_back(stub);
            }
        }
        let unused = self.free.pop();
        self.trim();
        unused.or_else(|| {
            (self.stubs.len() < lent_max).then(|| BytesMut::with_capacity(self.buffer_bytes))
        })
    }

    /// Frees what no batch has needed for a while.
    fn trim(&mut self) {
        self.free_min = self.free_min.min(self.free.len());
        self.trim_age += 1;
        if self.trim_age >= TRIM_BATCHES {
            self.free.drain(..self.free_min);
            self.free_min = self.free.len();
            self.trim_age = 0;
        }
    }
}

/// What stands in front of a payload.
struct Head {
    source: std::net::SocketAddr,
    arrived: control::Arrived,
    payload_bytes: usize,
}

impl Head {
    fn parse(buffer: &[u8]) -> Option<Self> {
        let (head, payload) = buffer.split_first_chunk::<HEAD_BYTES>()?;
        let number = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        let name_bytes = (number(0) as usize).min(NAME_BYTES);
        let control_bytes = (number(4) as usize).min(CONTROL_BYTES);
        let payload_bytes = number(8) as usize;
        let is_cut = number(12) & libc::MSG_TRUNC as u32 != 0 || payload_bytes > payload.len();
        if is_cut || payload_bytes == 0 {
            return None;
        }
        let (name, control) = head[LENGTHS_BYTES..].split_at(NAME_BYTES);
        Some(Self {
            source: address::decode(&name[..name_bytes])?,
            arrived: control::decode(&control[..control_bytes]),
            payload_bytes,
        })
    }

    fn received(self, socket: SocketId, payload: BytesMut) -> Received {
        let segment_bytes = match self.arrived.segment_bytes {
            Some(bytes) if (1..payload.len()).contains(&bytes) => bytes,
            _ => payload.len(),
        };
        Received {
            socket,
            payload,
            source: self.source,
            local_ip: self.arrived.local_ip,
            ecn: self.arrived.ecn,
            segment_bytes,
        }
    }
}
