//! Both halves of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use quinn_proto::{Connection, FinishError, ReadError, ReadableError, StreamId, WriteError};

use super::connection::Shared;
use crate::driver::errors::connection_error;
use crate::driver::setup::CANCELLED;
use crate::error::Error;

/// Most slices handed over at once: what one vectored write takes.
const SLICES_MAX: usize = 1024;

/// A read under way: how much is wanted, and what has come of it.
pub(super) struct Reading {
    wanted_bytes: usize,
    /// One slice is enough.
    any: bool,
    slices: Vec<Bytes>,
    bytes: usize,
    end: Option<End>,
    pub(super) waker: Waker,
}

/// How a stream ended; quinn-proto forgets it then.
#[derive(Debug, Clone, Copy)]
enum End {
    Finished,
    Reset,
    /// On this side.
    Closed,
}

impl Reading {
    /// Takes what is there; true if nothing more is to be waited for.
    pub(super) fn pull(&mut self, proto: &mut Connection, id: StreamId) -> bool {
        if self.is_done() {
            return true;
        }
        let mut stream = proto.recv_stream(id);
        let mut chunks = match stream.read(true) {
            Ok(chunks) => chunks,
            Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => {
                self.end = Some(End::Closed);
                return true;
            }
        };
        while !self.is_done() {
            match chunks.next(self.wanted_bytes - self.bytes) {
                Ok(Some(chunk)) => {
                    self.bytes += chunk.bytes.len();
                    self.slices.push(chunk.bytes);
                }
                Ok(None) => self.end = Some(End::Finished),
                Err(ReadError::Reset(_)) => self.end = Some(End::Reset),
                Err(ReadError::Blocked) => break,
            }
        }
        self.is_done()
    }

    fn is_done(&self) -> bool {
        self.end.is_some()
            || self.bytes >= self.wanted_bytes
            || self.slices.len() >= SLICES_MAX
            || (self.any && self.bytes > 0)
    }
}

#[derive(Debug)]
pub(crate) struct RecvStream {
    connection: Arc<Shared>,
    id: StreamId,
    end: Option<End>,
}

impl RecvStream {
    pub(super) fn new(connection: Arc<Shared>, id: StreamId) -> Self {
        Self {
            connection,
            id,
            end: None,
        }
    }

    pub(crate) async fn read(&mut self, max: usize) -> Result<Option<Bytes>, Error> {
        // One slice more than `any` asks for may come from a read that was abandoned.
        let mut slices = poll_fn(|cx| self.poll_read(cx, max, true)).await?;
        if slices.len() > 1 {
            let rest = slices.split_off(1);
            self.put_back(rest);
        }
        Ok(slices.pop())
    }

    pub(crate) async fn read_slices(&mut self, bytes: usize) -> Result<Vec<Bytes>, Error> {
        poll_fn(|cx| self.poll_read(cx, bytes, false)).await
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        wanted_bytes: usize,
        any: bool,
    ) -> Poll<Result<Vec<Bytes>, Error>> {
        let mut guard = self.connection.state.lock();
        let state = &mut *guard;
        let mut reading = match state.readings.remove(&self.id) {
            Some(mut reading) => {
                reading.wanted_bytes = wanted_bytes;
                reading.any = any;
                reading.waker.clone_from(cx.waker());
                reading
            }
            None => Reading {
                wanted_bytes,
                any,
                slices: Vec::new(),
                bytes: 0,
                end: None,
                waker: cx.waker().clone(),
            },
        };
        if self.end.is_none() && reading.end.is_none() {
            let before = reading.bytes;
            reading.pull(&mut state.proto, self.id);
            if reading.bytes > before {
                // The peer may be waiting to hear that there is room again.
                self.connection.ask_to_look(state);
            }
        }
        self.end = self.end.or(reading.end);
        if reading.bytes > wanted_bytes {
            // An abandoned read had wanted more.
            let slices = take_front(&mut reading, wanted_bytes);
            state.readings.insert(self.id, reading);
            return Poll::Ready(Ok(slices));
        }
        match self.end {
            _ if reading.bytes > 0 && (reading.is_done() || self.end.is_some()) => {
                Poll::Ready(Ok(reading.slices))
            }
            _ if wanted_bytes == 0 => Poll::Ready(Ok(Vec::new())),
            Some(End::Finished) => Poll::Ready(Ok(Vec::new())),
            Some(End::Reset) => Poll::Ready(Err(Error::StreamReset)),
            Some(End::Closed) => Poll::Ready(Err(Error::StreamClosed)),
            None => {
                if let Some(error) = &state.error {
                    return Poll::Ready(Err(connection_error(error.clone())));
                }
                state.readings.insert(self.id, reading);
                Poll::Pending
            }
        }
    }

    /// Keeps slices for the next read.
    fn put_back(&mut self, slices: Vec<Bytes>) {
        let mut state = self.connection.state.lock();
        let reading = state.readings.entry(self.id).or_insert_with(|| Reading {
            wanted_bytes: 0,
            any: true,
            slices: Vec::new(),
            bytes: 0,
            end: None,
            waker: Waker::noop().clone(),
        });
        reading.bytes += slices.iter().map(Bytes::len).sum::<usize>();
        reading.slices.splice(0..0, slices);
    }

    pub(crate) fn stop(&mut self) {
        let mut state = self.connection.state.lock();
        state.readings.remove(&self.id);
        if self.end.is_none() {
            self.end = Some(End::Closed);
            // An error means that the stream is over already.
            let _ = state.proto.recv_stream(self.id).stop(CANCELLED);
            self.connection.ask_to_look(&mut state);
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The first `bytes` bytes of what was read.
fn take_front(reading: &mut Reading, bytes: usize) -> Vec<Bytes> {
    let mut taken = Vec::new();
    let mut missing = bytes;
    while missing > 0 && !reading.slices.is_empty() {
        if reading.slices[0].len() <= missing {
            let slice = reading.slices.remove(0);
            missing -= slice.len();
            taken.push(slice);
        } else {
            taken.push(reading.slices[0].split_to(missing));
            missing = 0;
        }
    }
    reading.bytes -= bytes - missing;
    taken
}

/// A write under way: what is left of it.
pub(super) struct Writing {
    rest: Bytes,
    result: Option<Result<(), WriteError>>,
    pub(super) waker: Waker,
}

impl Writing {
    /// Hands over what there is room for; true if nothing more is to be waited for.
    pub(super) fn push(&mut self, proto: &mut Connection, id: StreamId) -> bool {
        while self.result.is_none() {
            // Leaves what was not taken behind in its argument.
            match proto
                .send_stream(id)
                .write_chunks(std::slice::from_mut(&mut self.rest))
            {
                Ok(_) if self.rest.is_empty() => self.result = Some(Ok(())),
                Ok(_) => {}
                Err(WriteError::Blocked) => return false,
                Err(error) => self.result = Some(Err(error)),
            }
        }
        true
    }

    pub(super) fn end(&mut self, result: Result<(), WriteError>) {
        self.result.get_or_insert(result);
    }
}

#[derive(Debug)]
pub(crate) struct SendStream {
    connection: Arc<Shared>,
    id: StreamId,
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.connection.state.lock().deliveries.remove(&self.id);
    }
}

/// Takes a write out that is abandoned.
struct Unwrite<'a>(&'a SendStream);

impl Drop for Unwrite<'_> {
    fn drop(&mut self) {
        self.0.connection.state.lock().writings.remove(&self.0.id);
    }
}

impl SendStream {
    pub(super) fn new(connection: Arc<Shared>, id: StreamId) -> Self {
        Self { connection, id }
    }

    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        let mut bytes = Some(bytes);
        let this = &*self;
        let _unwrite = Unwrite(this);
        poll_fn(|cx| this.poll_write(cx, &mut bytes)).await
    }

    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        bytes: &mut Option<Bytes>,
    ) -> Poll<Result<(), Error>> {
        let mut guard = self.connection.state.lock();
        let state = &mut *guard;
        if let Some(bytes) = bytes.take() {
            let mut writing = Writing {
                rest: bytes,
                result: None,
                waker: cx.waker().clone(),
            };
            writing.push(&mut state.proto, self.id);
            state.writings.insert(self.id, writing);
            self.connection.ask_to_look(state);
        }
        let Some(writing) = state.writings.get_mut(&self.id) else {
            return Poll::Ready(Err(Error::StreamClosed));
        };
        match (&writing.result, &state.error) {
            (Some(Ok(())), _) => Poll::Ready(Ok(())),
            (Some(Err(WriteError::Stopped(_))), _) => Poll::Ready(Err(Error::StreamStopped)),
            (_, Some(error)) => Poll::Ready(Err(connection_error(error.clone()))),
            (Some(Err(_)), None) => Poll::Ready(Err(Error::StreamClosed)),
            (None, None) => {
                writing.waker.clone_from(cx.waker());
                Poll::Pending
            }
        }
    }

    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        let mut state = self.connection.state.lock();
        let finished = state.proto.send_stream(self.id).finish();
        self.connection.ask_to_look(&mut state);
        finished.map_err(|error| match error {
            FinishError::Stopped(_) | FinishError::ClosedStream => Error::StreamClosed,
        })
    }

    pub(crate) fn reset(&mut self) {
        let mut state = self.connection.state.lock();
        // An error means that the stream is over already.
        let _ = state.proto.send_stream(self.id).reset(CANCELLED);
        self.connection.ask_to_look(&mut state);
    }

    pub(crate) fn set_rank(&mut self, rank: i32) {
        let mut state = self.connection.state.lock();
        // An error means that the stream is over already.
        let _ = state.proto.send_stream(self.id).set_priority(rank);
    }

    pub(crate) async fn delivered(&mut self) -> Result<(), Error> {
        poll_fn(|cx| {
            let mut guard = self.connection.state.lock();
            let state = &mut *guard;
            match (state.proto.send_stream(self.id).stopped(), &state.error) {
                (Ok(Some(_)), _) => Poll::Ready(Err(Error::StreamStopped)),
                // Forgotten: the peer has everything, or it was reset on this side.
                (Err(_), _) => Poll::Ready(Ok(())),
                (Ok(None), Some(error)) => Poll::Ready(Err(connection_error(error.clone()))),
                (Ok(None), None) => {
                    state.deliveries.insert(self.id, cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
