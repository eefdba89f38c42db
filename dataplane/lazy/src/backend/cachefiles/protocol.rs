//! What the kernel says on `/dev/cachefiles` in on-demand mode, and what is said to it.
//!
//! Pure functions. The kernel writes the messages, but no length is believed before it was checked, and a message that
//! makes no sense is an error of that message alone.
//!
//! The names and layouts are those of `include/uapi/linux/cachefiles.h`; numbers are in the machine's byte order.

/// No message is longer (`CACHEFILES_MSG_MAX_SIZE`).
pub(crate) const MESSAGE_BYTES_MAX: usize = 1024;
/// Writes to a cache file must begin at a multiple of this and come from memory aligned to it, as they are direct I/O.
pub(crate) const BLOCK_BYTES: u64 = 4096;

const HEAD_BYTES: usize = 16;
const OPEN_HEAD_BYTES: usize = 16;
const READ_BYTES: usize = 16;

/// One message of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// Its number, which the answer must bear.
    pub(crate) id: u32,
    /// The cache file that it is about.
    pub(crate) object: u32,
    /// What it wants.
    pub(crate) what: Request,
}

/// What a message wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// A cache file is opened; to be answered with [`copen`].
    Open {
        /// The number of the descriptor that the kernel has opened for us, to write into the cache file.
        descriptor: u32,
        /// The name of the file: what stood in the mount's options. `None` where the message does not hold one.
        key: Option<Vec<u8>>,
    },
    /// A cache file is done with; no answer.
    Close,
    /// Bytes are wanted; to be answered by writing them and completing the message.
    Read {
        /// The first byte.
        offset: u64,
        /// How many; zero or far too many, if the kernel says so.
        size_bytes: u64,
    },
}

/// Why a message cannot be understood. None of them holds a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    /// Less than a head, or less than it says.
    #[error("a message of {bytes} bytes that says it has {said}")]
    Length {
        /// What came.
        bytes: usize,
        /// What it says.
        said: usize,
    },
    /// An operation of a later kernel.
    #[error("message {id} asks for the unknown operation {opcode}")]
    Unknown {
        /// The message.
        id: u32,
        /// The operation.
        opcode: u32,
    },
    /// The operation is known and its fields are not all there.
    #[error("message {id} of operation {opcode} is cut short")]
    Short {
        /// The message.
        id: u32,
        /// The operation.
        opcode: u32,
    },
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

impl Message {
    /// Reads one message.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let said = u32_at(bytes, 8).unwrap_or(0) as usize;
        let length = ProtocolError::Length {
            bytes: bytes.len(),
            said,
        };
        let head = || Some((u32_at(bytes, 0)?, u32_at(bytes, 4)?, u32_at(bytes, 12)?));
        let (id, opcode, object) = head().ok_or(length)?;
        if said != bytes.len() {
            return Err(length);
        }
        let body = &bytes[HEAD_BYTES..];
        let short = ProtocolError::Short { id, opcode };
        let what = match opcode {
            0 => Request::open(body).ok_or(short)?,
            1 => Request::Close,
            2 if body.len() >= READ_BYTES => Request::Read {
                offset: u64_at(body, 0).ok_or(short)?,
                size_bytes: u64_at(body, 8).ok_or(short)?,
            },
            2 => return Err(short),
            _ => return Err(ProtocolError::Unknown { id, opcode }),
        };
        Ok(Self { id, object, what })
    }
}

impl Request {
    fn open(body: &[u8]) -> Option<Self> {
        let volume_bytes = u32_at(body, 0)? as usize;
        let key_bytes = u32_at(body, 4)? as usize;
        let descriptor = u32_at(body, 8)?;
        let names = body.get(OPEN_HEAD_BYTES..)?;
        // From here on there is a descriptor, which is ours to close: what else is wrong must not lose it.
        let key = || {
            let end = volume_bytes.checked_add(key_bytes)?;
            names.get(volume_bytes..end)
        };
        Some(Self::Open {
            descriptor,
            key: key().map(<[u8]>::to_vec),
        })
    }
}

/// The answer to an opened file: its length, or a refusal with an error number.
pub(crate) fn copen(id: u32, size_bytes: Result<u64, i32>) -> String {
    match size_bytes.and_then(|size| i64::try_from(size).map_err(|_| ERANGE)) {
        Ok(size) => format!("copen {id},{size}"),
        Err(errno) => format!("copen {id},{}", -errno.clamp(1, 4095)),
    }
}

const ERANGE: i32 = 34;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(id: u32, opcode: u32, object: u32, body: &[u8]) -> Vec<u8> {
        let len = (HEAD_BYTES + body.len()) as u32;
        let mut bytes = [id, opcode, len, object].map(u32::to_ne_bytes).concat();
        bytes.extend_from_slice(body);
        bytes
    }

    fn open_body(volume_bytes: u32, key_bytes: u32, names: &[u8]) -> Vec<u8> {
        let mut body = [volume_bytes, key_bytes, 9, 0]
            .map(u32::to_ne_bytes)
            .concat();
        body.extend_from_slice(names);
        body
    }

    #[test]
    fn messages_are_read_as_the_kernel_writes_them() {
        let names = b"erofs,pantala\0meta";
        let open = message(1, 0, 2, &open_body(14, 4, names));
        assert_eq!(
            Message::parse(&open).unwrap().what,
            Request::Open {
                descriptor: 9,
                key: Some(b"meta".to_vec()),
            }
        );
        let read = message(3, 2, 2, &[4096u64, 8192].map(u64::to_ne_bytes).concat());
        assert_eq!(
            Message::parse(&read).unwrap(),
            Message {
                id: 3,
                object: 2,
                what: Request::Read {
                    offset: 4096,
                    size_bytes: 8192,
                },
            }
        );
        let close = message(4, 1, 2, &[]);
        assert_eq!(Message::parse(&close).unwrap().what, Request::Close);
    }

    #[test]
    fn an_opened_file_without_a_name_keeps_its_descriptor() {
        for (volume_bytes, key_bytes) in [(0, 40), (40, 0), (u32::MAX, u32::MAX), (5, u32::MAX)] {
            let open = message(1, 0, 2, &open_body(volume_bytes, key_bytes, b"erofs"));
            assert_eq!(
                Message::parse(&open).unwrap().what,
                Request::Open {
                    descriptor: 9,
                    key: None,
                }
            );
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error_and_no_panic() {
        assert!(matches!(
            Message::parse(&message(7, 3, 1, &[])),
            Err(ProtocolError::Unknown { id: 7, opcode: 3 })
        ));
        assert!(matches!(
            Message::parse(&message(7, 2, 1, &[0; 15])),
            Err(ProtocolError::Short { id: 7, opcode: 2 })
        ));
        let mut lies = message(7, 1, 1, &[]);
        lies[8] = 200;
        assert!(matches!(
            Message::parse(&lies),
            Err(ProtocolError::Length { .. })
        ));
        assert!(Message::parse(&[]).is_err());
    }

    #[test]
    fn answers_are_written_as_the_kernel_reads_them() {
        assert_eq!(copen(5, Ok(1 << 40)), "copen 5,1099511627776");
        assert_eq!(copen(5, Err(2)), "copen 5,-2");
        assert_eq!(copen(5, Ok(u64::MAX)), "copen 5,-34");
        // Zero would say that the file is empty.
        assert_eq!(copen(5, Err(0)), "copen 5,-1");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Message::parse(&bytes);
            if let Some(head) = bytes.first_chunk::<4>() {
                let opcode = u32::from_ne_bytes(*head) % 4;
                let _ = Message::parse(&message(1, opcode, 2, &bytes[4..]));
            }
        }
    }
}
