//! Reads and writes of files that are in flight.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::tag::Tag;
use crate::error::Busy;
use crate::event::Event;
use crate::kernel::Operation;
use crate::lent::{Lent, LentBuffer};

/// File operations in flight, for each ring.
pub(super) const FILE_OPERATIONS_MAX: usize = 128;
/// Slices that one system call takes (`IOV_MAX`).
const SLICES_PER_CALL_MAX: usize = 1024;
/// Bytes that one read may ask for.
const READ_BYTES_MAX: usize = 1 << 30;

/// What the kernel may look at while the operation is in flight.
struct InFlight {
    file: Arc<File>,
    work: Work,
}

enum Work {
    Read(LentBuffer),
    Write(Write),
}

struct Write {
    /// Keeps alive what `vectors` point at.
    _slices: Vec<Bytes>,
    vectors: Vec<libc::iovec>,
    /// Vectors before this one are written.
    first: usize,
    offset: u64,
    written: usize,
    total: usize,
}

impl Write {
    /// Goes `bytes` further.
    fn advance(&mut self, mut bytes: usize) {
        self.offset += bytes as u64;
        self.written += bytes;
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }
}

#[derive(Default)]
struct Slot {
    generation: u32,
    token: u64,
    is_cancelled: bool,
    in_flight: Option<Lent<InFlight>>,
}

/// What is to be done next about an operation.
pub(super) enum Next {
    /// It goes on: hand this to the kernel.
    Push(Operation, Tag),
    Done(Event),
}

pub(super) struct Files {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Files {
    pub(super) fn new() -> Self {
        Self {
            slots: (0..FILE_OPERATIONS_MAX).map(|_| Slot::default()).collect(),
            free: (0..FILE_OPERATIONS_MAX as u32).rev().collect(),
        }
    }

    pub(super) fn read(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        buffer: BytesMut,
        token: u64,
    ) -> Result<(Operation, Tag), Busy<BytesMut>> {
        let Some(slot) = self.free.pop() else {
            return Err(Busy(buffer));
        };
        let mut buffer = LentBuffer::new(buffer);
        let (address, bytes) = buffer.room();
        let operation = Operation::Read {
            fd: file.as_raw_fd(),
            address,
            bytes: bytes.min(READ_BYTES_MAX) as u32,
            offset,
        };
        let work = Work::Read(buffer);
        let tag = self.lend(slot, token, Arc::clone(file), work);
        Ok((operation, tag))
    }

    /// `None` if there is nothing to write.
    pub(super) fn write(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        slices: Vec<Bytes>,
        token: u64,
    ) -> Result<Next, Busy<Vec<Bytes>>> {
        let vectors: Vec<_> = slices
            .iter()
            .filter(|slice| !slice.is_empty())
            .map(|slice| libc::iovec {
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let total = vectors.iter().map(|vector| vector.iov_len).sum();
        if total == 0 {
            let result = Ok(0);
            return Ok(Next::Done(Event::Wrote { token, result }));
        }
        let Some(slot) = self.free.pop() else {
            return Err(Busy(slices));
        };
        let write = Write {
            _slices: slices,
            vectors,
            first: 0,
            offset,
            written: 0,
            total,
        };
        let operation = write_operation(file, &write);
        let tag = self.lend(slot, token, Arc::clone(file), Work::Write(write));
        Ok(Next::Push(operation, tag))
    }

    fn lend(&mut self, index: u32, token: u64, file: Arc<File>, work: Work) -> Tag {
        let slot = &mut self.slots[index as usize];
        slot.generation = Tag::next_generation(slot.generation);
        slot.token = token;
        slot.is_cancelled = false;
        slot.in_flight = Some(Lent::new(Box::new(InFlight { file, work })));
        Tag::File {
            slot: index,
            generation: slot.generation,
        }
    }

    /// The operations with this token that nobody has cancelled yet.
    pub(super) fn cancel(&mut self, token: u64) -> impl Iterator<Item = Tag> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter(move |(_, slot)| {
                slot.in_flight.is_some() && slot.token == token && !slot.is_cancelled
            })
            .map(|(index, slot)| {
                slot.is_cancelled = true;
                Tag::File {
                    slot: index as u32,
                    generation: slot.generation,
                }
            })
    }

    /// What is in flight is not gone on with.
    pub(super) fn close(&mut self) {
        for slot in &mut self.slots {
            slot.is_cancelled = true;
        }
    }

    /// An operation has completed, for the moment or for good. `None` if there is no such operation.
    pub(super) fn complete(
        &mut self,
        index: u32,
        generation: u32,
        result: io::Result<usize>,
    ) -> Option<Next> {
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != generation {
            return None;
        }
        let in_flight = slot.in_flight.take()?;
        // SAFETY: the operation's only completion was reaped.
        let mut in_flight = unsafe { in_flight.take_back() };
        let token = slot.token;
        let event = match in_flight.work {
            Work::Read(buffer) => {
                let written = *result.as_ref().unwrap_or(&0);
                // SAFETY: as above, and the kernel says how much it has read.
                let buffer = unsafe { buffer.take_back(written) };
                Event::Read {
                    token,
                    buffer,
                    result,
                }
            }
            Work::Write(ref mut write) => {
                let result = match result {
                    Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                    Ok(bytes) if write.written + bytes >= write.total => Ok(write.total),
                    Ok(_) if slot.is_cancelled => {
                        Err(io::Error::from_raw_os_error(libc::ECANCELED))
                    }
                    Ok(bytes) => {
                        write.advance(bytes);
                        let operation = write_operation(&in_flight.file, write);
                        slot.in_flight = Some(Lent::new(in_flight));
                        let tag = Tag::File {
                            slot: index,
                            generation,
                        };
                        return Some(Next::Push(operation, tag));
                    }
                    Err(error) => Err(error),
                };
                Event::Wrote { token, result }
            }
        };
        self.free.push(index);
        Some(Next::Done(event))
    }
}

fn write_operation(file: &Arc<File>, write: &Write) -> Operation {
    let vectors = &write.vectors[write.first..];
    Operation::Write {
        fd: file.as_raw_fd(),
        slices: vectors.as_ptr(),
        count: vectors.len().min(SLICES_PER_CALL_MAX) as u32,
        offset: write.offset,
    }
}
