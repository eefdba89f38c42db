//! Both halves of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn_proto::{Connection, ReadError, ReadableError, StreamId, WriteError};
use tokio::sync::oneshot;

use super::connection::{Shared, Wish};
use crate::error::Error;

/// Most slices handed over at once: what one vectored write takes.
const SLICES_MAX: usize = 1024;

/// A read: how much is wanted, and what has come of it. The stream keeps it from one read to the next.
pub(super) struct Reading {
    wanted_bytes: usize,
    /// One slice is enough.
    any: bool,
    slices: Vec<Bytes>,
    bytes: usize,
    end: Option<End>,
    /// The connection has been told, and not yet done with it.
    is_wished: bool,
    waker: Waker,
}

/// How a stream ended; quinn-proto forgets it then.
#[derive(Debug, Clone)]
enum End {
    Finished,
    Failed(Error),
}

impl Reading {
    /// Takes what is there; true, and the reader is woken, if nothing more is to be waited for.
    pub(super) fn pull(&mut self, proto: &mut Connection, id: StreamId) -> bool {
        match proto.recv_stream(id).read(true) {
            Ok(mut chunks) => {
                while !self.is_done() {
                    match chunks.next(self.wanted_bytes - self.bytes) {
                        Ok(Some(chunk)) => {
                            self.bytes += chunk.bytes.len();
                            self.slices.push(chunk.bytes);
                        }
                        Ok(None) => self.end = Some(End::Finished),
                        Err(ReadError::Reset(_)) => {
                            self.end = Some(End::Failed(Error::StreamReset));
                        }
                        Err(ReadError::Blocked) => return false,
                    }
                }
            }
            Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => {
                self.end = Some(End::Failed(Error::StreamClosed));
            }
        }
        self.done();
        true
    }

    /// The connection is over.
    pub(super) fn fail(&mut self, error: Error) {
        self.end.get_or_insert(End::Failed(error));
        self.done();
    }

    fn done(&mut self) {
        self.is_wished = false;
        self.waker.wake_by_ref();
    }

    fn is_done(&self) -> bool {
        self.end.is_some()
            || self.bytes >= self.wanted_bytes
            || self.slices.len() >= SLICES_MAX
            || (self.any && self.bytes > 0)
    }

    /// The first `bytes` bytes of what was read, or one slice of at most so many.
    fn take(&mut self, bytes: usize) -> Vec<Bytes> {
        if self.bytes <= bytes && !self.any {
            self.bytes = 0;
            return std::mem::take(&mut self.slices);
        }
        let mut taken = Vec::new();
        let mut missing = bytes.min(self.bytes);
        let mut whole = 0;
        while missing > 0 && (!self.any || taken.is_empty()) {
            let slice = &mut self.slices[whole];
            if slice.len() <= missing {
                taken.push(std::mem::take(slice));
                whole += 1;
            } else {
                taken.push(slice.split_to(missing));
            }
            missing -= taken.last().map_or(0, Bytes::len);
        }
        self.slices.drain(..whole);
        self.bytes -= taken.iter().map(Bytes::len).sum::<usize>();
        taken
    }
}

#[derive(Debug)]
pub(crate) struct RecvStream {
    connection: Arc<Shared>,
    id: StreamId,
    reading: Arc<Mutex<Reading>>,
    is_stopped: bool,
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading")
            .field("wanted_bytes", &self.wanted_bytes)
            .field("bytes", &self.bytes)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl RecvStream {
    pub(super) fn new(connection: Arc<Shared>, id: StreamId) -> Self {
        Self {
            connection,
            id,
            reading: Arc::new(Mutex::new(Reading {
                wanted_bytes: 0,
                any: false,
                slices: Vec::new(),
                bytes: 0,
                end: None,
                is_wished: false,
                waker: Waker::noop().clone(),
            })),
            is_stopped: false,
        }
    }

    pub(crate) async fn read(&mut self, max: usize) -> Result<Option<Bytes>, Error> {
        let mut slices = poll_fn(|cx| self.poll_read(cx, max, true)).await?;
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
        if self.is_stopped {
            return Poll::Ready(Err(Error::StreamClosed));
        }
        let mut reading = self.reading.lock();
        reading.wanted_bytes = wanted_bytes;
        reading.any = any;
        if !reading.is_done() {
            reading.waker.clone_from(cx.waker());
            if reading.is_wished {
                return Poll::Pending;
            }
            reading.is_wished = true;
            drop(reading);
            let wish = Wish::Read(self.id, self.reading.clone());
            self.connection.wish(wish);
            reading = self.reading.lock();
            if !reading.is_done() {
                return Poll::Pending;
            }
        }
        if reading.bytes > 0 || wanted_bytes == 0 {
            return Poll::Ready(Ok(reading.take(wanted_bytes)));
        }
        match &reading.end {
            Some(End::Failed(error)) => Poll::Ready(Err(error.clone())),
            Some(End::Finished) | None => Poll::Ready(Ok(Vec::new())),
        }
    }

    pub(crate) fn stop(&mut self) {
        if !std::mem::replace(&mut self.is_stopped, true) && self.reading.lock().end.is_none() {
            self.connection.wish(Wish::Stop(self.id));
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A write under way: what is left of it, and whom to tell when nothing is.
pub(super) struct Writing {
    rest: Bytes,
    reply: oneshot::Sender<Result<(), Error>>,
}

impl Writing {
    /// Hands over what there is room for; returns what has to wait for more.
    pub(super) fn push(mut self, proto: &mut Connection, id: StreamId) -> Option<Self> {
        if self.reply.is_closed() {
            // Abandoned.
            return None;
        }
        let result = loop {
            // Leaves what was not taken behind in its argument.
            let rest = std::slice::from_mut(&mut self.rest);
            match proto.send_stream(id).write_chunks(rest) {
                Ok(_) if self.rest.is_empty() => break Ok(()),
                Ok(_) => {}
                Err(WriteError::Blocked) => return Some(self),
                Err(WriteError::Stopped(_)) => break Err(Error::StreamStopped),
                Err(WriteError::ClosedStream) => break Err(Error::StreamClosed),
            }
        };
        self.end(result);
        None
    }

    pub(super) fn end(self, result: Result<(), Error>) {
        // The writer may have lost interest.
        let _ = self.reply.send(result);
    }
}

#[derive(Debug)]
pub(crate) struct SendStream {
    connection: Arc<Shared>,
    id: StreamId,
    is_ended: bool,
}

impl SendStream {
    pub(super) fn new(connection: Arc<Shared>, id: StreamId) -> Self {
        Self {
            connection,
            id,
            is_ended: false,
        }
    }

    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        let (reply, written) = oneshot::channel();
        let writing = Writing { rest: bytes, reply };
        self.answer(Wish::Write(self.id, writing), written).await
    }

    /// Leaves a wish and waits for its answer.
    async fn answer(
        &self,
        wish: Wish,
        answer: oneshot::Receiver<Result<(), Error>>,
    ) -> Result<(), Error> {
        self.connection.wish(wish);
        // Nobody answers where another write or reset has taken the place of this one.
        answer.await.unwrap_or(Err(Error::StreamClosed))
    }

    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.is_ended, true) {
            return Err(Error::StreamClosed);
        }
        self.connection.wish(Wish::Finish(self.id));
        Ok(())
    }

    pub(crate) fn reset(&mut self) {
        self.is_ended = true;
        self.connection.wish(Wish::Reset(self.id));
    }

    pub(crate) fn set_rank(&mut self, rank: i32) {
        self.connection.wish(Wish::Rank(self.id, rank));
    }

    pub(crate) async fn delivered(&mut self) -> Result<(), Error> {
        let (reply, delivered) = oneshot::channel();
        self.answer(Wish::Deliver(self.id, reply), delivered).await
    }
}
