//! Both halves of a stream.

use bytes::Bytes;
use quinn::{ReadError, StoppedError, WriteError};

use crate::driver::errors::connection_error;
use crate::driver::setup::CANCELLED;
use crate::error::Error;

#[derive(Debug)]
pub(crate) struct SendStream(pub(super) quinn::SendStream);

impl SendStream {
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.0.write_chunk(bytes).await.map_err(write_error)
    }

    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        self.0.finish().map_err(|_| Error::StreamClosed)
    }

    pub(crate) fn reset(&mut self) {
        // An error means that the stream is over already.
        let _ = self.0.reset(CANCELLED);
    }

    pub(crate) fn set_rank(&mut self, rank: i32) {
        // An error means that the stream is over already.
        let _ = self.0.set_priority(rank);
    }

    pub(crate) async fn delivered(&mut self) -> Result<(), Error> {
        match self.0.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(Error::StreamStopped),
            Err(StoppedError::ConnectionLost(error)) => Err(connection_error(error)),
            Err(StoppedError::ZeroRttRejected) => Err(Error::StreamClosed),
        }
    }
}

#[derive(Debug)]
pub(crate) struct RecvStream {
    quinn: quinn::RecvStream,
    /// What an abandoned [`Self::read_slices`] had got.
    slices: Vec<Bytes>,
}

impl RecvStream {
    pub(super) fn new(quinn: quinn::RecvStream) -> Self {
        Self {
            quinn,
            slices: Vec::new(),
        }
    }

    pub(crate) async fn read(&mut self, max: usize) -> Result<Option<Bytes>, Error> {
        if let Some(first) = self.slices.first_mut() {
            let part = first.split_to(first.len().min(max));
            if first.is_empty() {
                self.slices.remove(0);
            }
            return Ok(Some(part));
        }
        let chunk = self.quinn.read_chunk(max, true).await.map_err(read_error)?;
        Ok(chunk.map(|chunk| chunk.bytes))
    }

    pub(crate) async fn read_slices(&mut self, bytes: usize) -> Result<Vec<Bytes>, Error> {
        let mut missing = bytes.saturating_sub(self.slices.iter().map(Bytes::len).sum());
        while missing > 0 {
            let chunk = self.quinn.read_chunk(missing, true).await;
            let Some(chunk) = chunk.map_err(read_error)? else {
                break;
            };
            missing -= chunk.bytes.len();
            self.slices.push(chunk.bytes);
        }
        Ok(std::mem::take(&mut self.slices))
    }

    pub(crate) fn stop(&mut self) {
        // An error means that the stream is over already.
        let _ = self.quinn.stop(CANCELLED);
    }
}

pub(super) fn read_error(error: ReadError) -> Error {
    match error {
        ReadError::Reset(_) => Error::StreamReset,
        ReadError::ConnectionLost(error) => connection_error(error),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            Error::StreamClosed
        }
    }
}

fn write_error(error: WriteError) -> Error {
    match error {
        WriteError::Stopped(_) => Error::StreamStopped,
        WriteError::ConnectionLost(error) => connection_error(error),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => Error::StreamClosed,
    }
}
