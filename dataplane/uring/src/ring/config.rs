//! Bounds of a ring, and its counters.

use crate::error::RingError;

use super::core::{CONTROL_OPERATIONS_MAX, SOCKETS_MAX};
use super::files::FILE_OPERATIONS_MAX;

/// How large a ring is. The memory it takes is
/// `(receive_buffers + receive_buffers_lent_max) * receive_buffer_bytes + send_buffers * send_buffer_bytes`, less where the
/// load asks for less.
#[derive(Debug, Clone)]
pub struct RingConfig {
    /// Operations that may be queued between two system calls. More are no error, but cost a call.
    pub entries: u32,
    /// Buffers that the kernel may receive into. Few of them stay in the cache: 64 is enough for a core.
    pub receive_buffers: u16,
    /// Bytes of payload that one of them holds: 65,535 for whole batches.
    pub receive_buffer_bytes: usize,
    /// Datagrams or batches that may be in flight.
    pub send_buffers: usize,
    /// Bytes that each has room for at first.
    pub send_buffer_bytes: usize,
    /// Receive buffers that may be with readers, besides those with the kernel. When that many are, what arrives is
    /// copied.
    pub receive_buffers_lent_max: usize,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            entries: 256,
            receive_buffers: 64,
            receive_buffer_bytes: 65_535,
            send_buffers: 64,
            send_buffer_bytes: 65_535,
            receive_buffers_lent_max: 256,
        }
    }
}

impl RingConfig {
    pub(super) fn check(&self) -> Result<(), RingError> {
        let bounds = [
            (
                "entries",
                self.entries as usize,
                1..=32_768,
                "from 1 to 32,768",
            ),
            (
                "receive_buffers",
                usize::from(self.receive_buffers),
                1..=32_768,
                "from 1 to 32,768",
            ),
            (
                "receive_buffer_bytes",
                self.receive_buffer_bytes,
                1_200..=1 << 20,
                "from 1,200 to 1 MiB",
            ),
            (
                "send_buffers",
                self.send_buffers,
                1..=16_384,
                "from 1 to 16,384",
            ),
            (
                "send_buffer_bytes",
                self.send_buffer_bytes,
                1..=1 << 20,
                "from 1 to 1 MiB",
            ),
            (
                "receive_buffers_lent_max",
                self.receive_buffers_lent_max,
                0..=1 << 20,
                "at most 1,048,576",
            ),
        ];
        for (name, value, range, rule) in bounds {
            if !range.contains(&value) {
                return Err(RingError::Config { name, value, rule });
            }
        }
        Ok(())
    }

    /// Completions that can be outstanding if nobody takes any: then none is ever dropped, nor a receive ended for want
    /// of room.
    pub(super) fn completions_max(&self) -> u32 {
        let sends = 2 * self.send_buffers; // with zero copy, each has two
        let receives = usize::from(self.receive_buffers) + SOCKETS_MAX;
        (sends + receives + 2 * FILE_OPERATIONS_MAX + CONTROL_OPERATIONS_MAX) as u32
    }
}

/// What has happened since the ring was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// System calls.
    pub enters: u64,
    /// Of these, such as slept, or would have if nothing had been there.
    pub sleeps: u64,
    /// Batches handed out in the buffer they were received in.
    pub received_in_place: u64,
    /// Batches copied: small, or too many buffers with readers.
    pub received_copied: u64,
    /// Bytes of these.
    pub copied_bytes: u64,
    /// Datagrams thrown away: cut off, empty, or without a sender.
    pub discarded: u64,
    /// How often receiving ended and was begun again, for instance as no buffer was free.
    pub rearmed: u64,
    /// Receive buffers with readers, as far as known.
    pub lent: u64,
}
