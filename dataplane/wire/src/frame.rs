//! Frames: a message behind its length, a 32-bit big-endian number of bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Largest message: the head of a 64 MiB piece (1,024 group digests) and room to spare, and the
/// runs of the most fragmented blob.
pub const FRAME_SIZE_MAX: usize = 256 * 1024;
/// Bytes of the length in front of a message.
pub const HEADER_SIZE: usize = 4;

/// Bytes that are no frame, or no message of the kind expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length in front is above [`FRAME_SIZE_MAX`].
    #[error("a frame of {0} bytes is larger than the {FRAME_SIZE_MAX} allowed")]
    TooLarge(usize),
    /// The bytes are not a message of the kind expected.
    #[error("malformed message: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// `message` as a frame.
///
/// # Panics
/// If the message is larger than [`FRAME_SIZE_MAX`]: no caller builds one, and none could be read.
pub fn encode<M: Message>(message: &M) -> Bytes {
    let len = message.encoded_len();
    assert!(len <= FRAME_SIZE_MAX, "message of {len} bytes");
    let mut out = BytesMut::with_capacity(HEADER_SIZE + len);
    out.put_u32(len as u32);
    message
        .encode(&mut out)
        .expect("the buffer has room for the encoded length");
    out.freeze()
}

/// The length that a frame's header announces.
///
/// # Errors
/// [`FrameError::TooLarge`], before anything of that size is allocated.
pub fn decode_header(header: [u8; HEADER_SIZE]) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(header) as usize;
    if len > FRAME_SIZE_MAX {
        return Err(FrameError::TooLarge(len));
    }
    Ok(len)
}

/// The message in `body`, a frame without its header.
///
/// # Errors
/// [`FrameError::Malformed`] where it is none.
pub fn decode_body<M: Message + Default>(body: Bytes) -> Result<M, FrameError> {
    Ok(M::decode(body)?)
}

/// Takes one whole frame off the front of `buffer`; `None` until it has arrived.
///
/// # Errors
/// As [`decode_header`] and [`decode_body`].
pub fn take<M: Message + Default>(buffer: &mut BytesMut) -> Result<Option<M>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER_SIZE>() else {
        return Ok(None);
    };
    let len = decode_header(*header)?;
    if buffer.len() < HEADER_SIZE + len {
        return Ok(None);
    }
    buffer.advance(HEADER_SIZE);
    decode_body(buffer.split_to(len).freeze()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Have, Request};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_frame_split_anywhere_is_read_whole(runs in proptest::collection::vec(any::<u32>(), 0..50), cut in 0usize..100) {
            let have = Have { blob_size: 7, runs, ..Have::default() };
            let frame = encode(&have);
            let cut = cut.min(frame.len() - 1);
            let mut buffer = BytesMut::from(&frame[..cut]);
            prop_assert_eq!(take::<Have>(&mut buffer), Ok(None));
            buffer.extend_from_slice(&frame[cut..]);
            prop_assert_eq!(take::<Have>(&mut buffer), Ok(Some(have)));
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn garbage_is_an_error_or_a_message_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            if let Ok(Some(_)) = take::<Request>(&mut buffer) {
                prop_assert!(buffer.len() < bytes.len());
            }
        }
    }

    #[test]
    fn a_length_that_lies_is_refused_before_any_allocation() {
        let mut buffer = BytesMut::from(&[0xff, 0xff, 0xff, 0xff, 1][..]);
        assert_eq!(
            take::<Request>(&mut buffer),
            Err(FrameError::TooLarge(u32::MAX as usize))
        );
    }
}
