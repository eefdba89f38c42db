//! One request and its answer: frames, then raw bytes, on a bidirectional stream.

use bytes::{Buf, Bytes, BytesMut};
use pantala_wire::Priority;
use pantala_wire::frame::{self, FRAME_SIZE_MAX, HEADER_SIZE};
use prost::Message;

use crate::connection::Connection;
use crate::driver;
use crate::error::Error;

/// The driver's number for `priority`: there, the larger overtakes the smaller.
fn rank(priority: Priority) -> i32 {
    -(priority as i32)
}

/// What this side says on a stream.
///
/// A stream that is dropped before [`Self::finish`] is reset, so that a task that fails halfway never
/// looks, to the peer, like a short but complete answer.
#[derive(Debug)]
pub struct SendStream {
    driver: driver::SendStream,
    priority: Priority,
    open: bool,
    /// Keeps the connection open for as long as somebody uses the stream.
    connection: Connection,
}

impl SendStream {
    pub(crate) fn new(
        driver: driver::SendStream,
        connection: Connection,
        priority: Priority,
    ) -> Self {
        let mut stream = Self {
            driver,
            priority,
            open: true,
            connection,
        };
        stream.set_priority(priority);
        stream
    }

    /// Writes `message` as a frame.
    ///
    /// # Errors
    /// [`Error::MessageTooLarge`], and as [`Self::write_bytes`].
    pub async fn write_frame<M: Message>(&mut self, message: &M) -> Result<(), Error> {
        let length = message.encoded_len();
        if length > FRAME_SIZE_MAX {
            return Err(Error::MessageTooLarge(length));
        }
        self.write_bytes(frame::encode(message)).await
    }

    /// Writes `bytes`, which are held, not copied, until the peer has acknowledged them; waits while the
    /// connection's send window is full.
    ///
    /// # Errors
    /// [`Error::StreamStopped`] where the peer wants no more; any of a lost connection.
    pub async fn write_bytes(&mut self, bytes: Bytes) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let _room = self.connection.link().make_room(self.priority);
        self.driver.write(bytes).await
    }

    /// Ends the stream: the peer sees its end after everything written before.
    ///
    /// # Errors
    /// [`Error::StreamClosed`] where it ended before.
    pub fn finish(&mut self) -> Result<(), Error> {
        if !std::mem::replace(&mut self.open, false) {
            return Err(Error::StreamClosed);
        }
        self.driver.finish()
    }

    /// Cuts the stream: the peer sees [`Error::StreamReset`], and what is under way is dropped.
    pub fn reset(&mut self) {
        if std::mem::replace(&mut self.open, false) {
            self.driver.reset();
        }
    }

    /// Lets what is written on this stream, also before, overtake streams that are less urgent.
    pub fn set_priority(&mut self, priority: Priority) {
        self.priority = priority;
        self.driver.set_rank(rank(priority));
    }

    /// Waits until the peer stops listening, or has everything after [`Self::finish`].
    ///
    /// # Errors
    /// [`Error::StreamStopped`] where the peer stopped before it had everything; any of a lost connection.
    pub async fn delivered(&mut self) -> Result<(), Error> {
        self.driver.delivered().await
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.reset();
    }
}

/// What the peer says on a stream.
///
/// Who no longer reads drops the stream or calls [`Self::stop`]: bytes that nobody reads hold back the
/// whole connection (see [`crate::Limits::stream_receive_window_bytes`]).
#[derive(Debug)]
pub struct RecvStream {
    driver: driver::RecvStream,
    /// The start of a frame whose rest has not arrived; kept here so that a read may be abandoned.
    partial: BytesMut,
    /// Keeps the connection open for as long as somebody uses the stream.
    _connection: Connection,
}

impl RecvStream {
    pub(crate) fn new(driver: driver::RecvStream, connection: Connection) -> Self {
        Self {
            driver,
            partial: BytesMut::new(),
            _connection: connection,
        }
    }

    /// Reads one frame and nothing behind it; `None` where the stream ended before it.
    ///
    /// May be abandoned (in a `select!`) and called again. Memory grows with the bytes that arrive, not
    /// with the length that the frame claims.
    ///
    /// # Errors
    /// [`Error::Frame`] for a length or message that is not allowed, [`Error::Truncated`] where the stream
    /// ends inside a frame, [`Error::StreamReset`], any of a lost connection.
    pub async fn read_frame<M: Message + Default>(&mut self) -> Result<Option<M>, Error> {
        loop {
            let missing = match self.partial.first_chunk::<HEADER_SIZE>() {
                None => HEADER_SIZE - self.partial.len(),
                Some(header) => {
                    let whole = HEADER_SIZE + frame::decode_header(*header)?;
                    whole.saturating_sub(self.partial.len())
                }
            };
            if missing == 0 {
                return Ok(frame::take(&mut self.partial)?);
            }
            match self.driver.read(missing).await? {
                Some(chunk) => self.partial.extend_from_slice(&chunk),
                None if self.partial.is_empty() => return Ok(None),
                None => return Err(Error::Truncated(missing)),
            }
        }
    }

    /// Reads between one and `max` bytes, without a copy; `None` at the stream's end.
    ///
    /// What is returned shares a receive buffer with its neighbours: copy out what is to be kept for long.
    ///
    /// # Errors
    /// [`Error::StreamReset`], any of a lost connection.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, Error> {
        if !self.partial.is_empty() {
            let length = self.partial.len().min(max);
            return Ok(Some(self.partial.split_to(length).freeze()));
        }
        self.driver.read(max).await
    }

    /// Waits until `bytes` bytes are here, or the stream ends, and returns them in the parts in which
    /// they were decrypted, without a copy; nothing at the stream's end.
    ///
    /// May be abandoned and called again: what had come until then is returned first. The parts share
    /// receive buffers with their neighbours: copy out what is to be kept for long.
    ///
    /// # Errors
    /// [`Error::StreamReset`], any of a lost connection.
    pub async fn read_slices(&mut self, bytes: usize) -> Result<Vec<Bytes>, Error> {
        if !self.partial.is_empty() {
            let length = self.partial.len().min(bytes);
            return Ok(vec![self.partial.split_to(length).freeze()]);
        }
        self.driver.read_slices(bytes).await
    }

    /// Fills `target`.
    ///
    /// # Errors
    /// [`Error::Truncated`] where the stream ends before; and as [`Self::read_chunk`].
    pub async fn read_exact_into(&mut self, target: &mut [u8]) -> Result<(), Error> {
        let mut rest = target;
        while !rest.is_empty() {
            let Some(mut chunk) = self.read_chunk(rest.len()).await? else {
                return Err(Error::Truncated(rest.len()));
            };
            let (filled, tail) = rest.split_at_mut(chunk.len());
            chunk.copy_to_slice(filled);
            rest = tail;
        }
        Ok(())
    }

    /// Tells the peer to send no more; what has arrived is dropped.
    pub fn stop(&mut self) {
        self.driver.stop();
    }
}
