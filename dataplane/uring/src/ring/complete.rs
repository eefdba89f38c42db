//! What becomes of completions, and the ring's end.

#![allow(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use super::core::{Core, Sending};
use super::files::Next;
use super::receive::Outcome;
use super::tag::Tag;
use crate::event::{Event, SocketId};
use crate::kernel::{Completion, Kernel, Operation, Stay};

/// Errors in a row after which a socket is given up. Datagrams that bounce are reported as errors too, so one means
/// nothing.
const RECEIVE_ERRORS_MAX: u32 = 16;
/// How long a ring that is dropped waits for what is in flight.
const DROP_WAIT_MAX: Duration = Duration::from_secs(1);

impl<K: Kernel> Core<K> {
    pub(super) fn complete(&mut self, completion: Completion) -> Option<Event> {
        match Tag::decode(completion.tag) {
            Some(Tag::Receive { socket }) => self.complete_receive(SocketId(socket), completion),
            Some(Tag::Send { message }) => self.complete_send(message, completion),
            Some(Tag::File { slot, generation }) => {
                match self.files.complete(slot, generation, completion.bytes())? {
                    Next::Push(operation, tag) => {
                        self.push(operation, tag);
                        None
                    }
                    Next::Done(event) => {
                        self.in_flight -= 1;
                        Some(event)
                    }
                }
            }
            Some(Tag::Bell) => {
                self.complete_bell(completion);
                None
            }
            Some(Tag::Cancel) => None,
            None => {
                tracing::error!(
                    tag = completion.tag,
                    "a completion of nothing that was begun"
                );
                None
            }
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
        if completion.more() || !std::mem::take(&mut socket.is_receiving) {
            return event;
        }
        self.in_flight -= 1;
        if self.is_closing {
            return None;
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
        self.in_flight -= 1;
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
        let Some(bell) = self.bell.take() else {
            return;
        };
        // SAFETY: the read's only completion was reaped.
        drop(unsafe { bell.take_back() });
        self.in_flight -= 1;
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
        self.files.close();
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
