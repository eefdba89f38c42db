//! The few messages of the FUSE protocol that a folder of read-only files needs.
//!
//! Pure functions: a request's bytes go in, a reply's bytes come out. Numbers are in the machine's byte order, as the
//! protocol has them. The kernel writes the requests, but a length is believed only after it was checked: a request that
//! makes no sense is an error of that request and never of the session.
//!
//! The names and layouts are those of `include/uapi/linux/fuse.h`, protocol 7.31; all later kernels speak it.

/// Smallest buffer that the kernel accepts for reading a request (`FUSE_MIN_READ_BUFFER`). As nothing is ever written to
/// these files, no request is larger.
pub(crate) const REQUEST_BYTES_MAX: usize = 8192;
/// The folder itself (`FUSE_ROOT_ID`); file N is node N + 2.
pub(crate) const ROOT: u64 = 1;
/// Largest read: 256 pages, the most the kernel takes.
pub(crate) const READ_BYTES_MAX: u32 = 256 * 4096;

/// What a reply begins with: its length, an error and the request's number.
pub(crate) const REPLY_HEAD_BYTES: usize = 16;

const MAJOR: u32 = 7;
const MINOR: u32 = 31;
const REQUEST_HEAD_BYTES: usize = 40;
/// Reads of one file may be under way at once.
const ASYNC_READ: u32 = 1;
/// `max_pages` of the reply to INIT counts.
const MAX_PAGES: u32 = 1 << 22;
/// Keep what is cached of the file when it is opened again: its bytes never change.
const KEEP_CACHE: u32 = 1 << 1;
/// Names and attributes never change while the mount lives.
const VALID_SECS: u64 = 86_400;

const MODE_DIR: u32 = 0o040_500;
const MODE_FILE: u32 = 0o100_400;

/// The error numbers of replies (`asm-generic/errno.h`).
pub(crate) mod errno {
    /// No such file.
    pub(crate) const ENOENT: i32 = 2;
    /// What a reader gets whose bytes could not be had.
    pub(crate) const EIO: i32 = 5;
    /// The request makes no sense.
    pub(crate) const EINVAL: i32 = 22;
    /// Not spoken here; the kernel does without.
    pub(crate) const ENOSYS: i32 = 38;
    /// The kernel's protocol is too old.
    pub(crate) const EPROTO: i32 = 71;
}

/// One request of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// Its number, which the reply must bear.
    pub(crate) unique: u64,
    /// The file or folder that it is about.
    pub(crate) node: u64,
    /// What is asked.
    pub(crate) what: Operation,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// The first request of a session.
    Init {
        /// Protocol of the kernel.
        major: u32,
        /// Protocol of the kernel.
        minor: u32,
        /// How far it would read ahead.
        max_readahead: u32,
        /// What it can do.
        flags: u32,
    },
    /// The node with this number as its name, if the name is a number.
    Lookup(Option<u64>),
    /// Size and mode.
    GetAttr,
    /// Opens a file.
    Open,
    /// Bytes of a file.
    Read {
        /// The first byte.
        offset: u64,
        /// How many.
        size_bytes: u32,
    },
    /// Figures of the file system.
    StatFs,
    /// A file, a folder or the session is closed; only a reply is wanted.
    Close,
    /// News that want no reply: nodes forgotten, a reader that was interrupted. A read under way ends in bounded time
    /// by itself, and others may wait for the same page.
    Notice,
    /// Nothing that we speak.
    Unknown(u32),
}

/// Why a request cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    /// Not even a head: there is no number to reply to.
    #[error("a request of {0} bytes, less than its head has")]
    NoHead(usize),
    /// The head is there, the rest is not as the operation has it.
    #[error("request {unique} of operation {opcode} has {bytes} bytes and says {said}")]
    Malformed {
        /// The number to reply to.
        unique: u64,
        /// The operation.
        opcode: u32,
        /// How many bytes came.
        bytes: usize,
        /// How many it says it has.
        said: usize,
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

impl Request {
    /// Reads one request.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let head = || {
            let said = u32_at(bytes, 0)?;
            let opcode = u32_at(bytes, 4)?;
            let unique = u64_at(bytes, 8)?;
            let node = u64_at(bytes, 16)?;
            (bytes.len() >= REQUEST_HEAD_BYTES).then_some((said, opcode, unique, node))
        };
        let (said, opcode, unique, node) = head().ok_or(ProtocolError::NoHead(bytes.len()))?;
        let malformed = ProtocolError::Malformed {
            unique,
            opcode,
            bytes: bytes.len(),
            said: said as usize,
        };
        if said as usize != bytes.len() {
            return Err(malformed);
        }
        let what = Operation::parse(opcode, &bytes[REQUEST_HEAD_BYTES..]).ok_or(malformed)?;
        Ok(Self { unique, node, what })
    }
}

impl Operation {
    fn parse(opcode: u32, body: &[u8]) -> Option<Self> {
        Some(match opcode {
            1 => Self::Lookup(number(body.strip_suffix(&[0])?)),
            2 | 36 | 42 => Self::Notice,
            3 => Self::GetAttr,
            14 => Self::Open,
            15 => Self::Read {
                offset: u64_at(body, 8)?,
                size_bytes: u32_at(body, 16)?,
            },
            17 => Self::StatFs,
            18 | 29 | 38 => Self::Close,
            26 => Self::Init {
                major: u32_at(body, 0)?,
                minor: u32_at(body, 4)?,
                max_readahead: u32_at(body, 8)?,
                flags: u32_at(body, 12)?,
            },
            other => Self::Unknown(other),
        })
    }
}

/// A file's name is its number, written in one way only.
fn number(name: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(name).ok()?;
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// A reply under way.
#[derive(Debug)]
struct Reply(Vec<u8>);

impl Reply {
    fn to(unique: u64, error: i32) -> Self {
        let mut bytes = Vec::with_capacity(REPLY_HEAD_BYTES + 128);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&(-error).to_ne_bytes());
        bytes.extend_from_slice(&unique.to_ne_bytes());
        Self(bytes)
    }

    fn u64s(mut self, values: &[u64]) -> Self {
        for value in values {
            self.0.extend_from_slice(&value.to_ne_bytes());
        }
        self
    }

    fn u32s(mut self, values: &[u32]) -> Self {
        for value in values {
            self.0.extend_from_slice(&value.to_ne_bytes());
        }
        self
    }

    /// `struct fuse_attr`
    fn attributes(self, node: u64, size_bytes: u64) -> Self {
        let (mode, links) = if node == ROOT {
            (MODE_DIR, 2)
        } else {
            (MODE_FILE, 1)
        };
        self.u64s(&[node, size_bytes, size_bytes.div_ceil(512), 0, 0, 0])
            // Nanoseconds of the three times; mode, links, owner, group, device, block size, flags.
            .u32s(&[0, 0, 0, mode, links, 0, 0, 0, 4096, 0])
    }

    fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// The reply that says `error`.
pub(crate) fn refusal(unique: u64, error: i32) -> Vec<u8> {
    Reply::to(unique, error).finish()
}

/// The head of a reply to a read, which `data_bytes` of data follow.
pub(crate) fn read_head(unique: u64, data_bytes: u32) -> [u8; REPLY_HEAD_BYTES] {
    let mut head = [0; REPLY_HEAD_BYTES];
    head[..4].copy_from_slice(&(REPLY_HEAD_BYTES as u32 + data_bytes).to_ne_bytes());
    head[8..].copy_from_slice(&unique.to_ne_bytes());
    head
}

/// What is to be done about a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send this.
    Reply(Vec<u8>),
    /// Send bytes of a device: exactly as many as are asked for, or an error.
    Read {
        /// Which device.
        device: usize,
        /// The first byte.
        offset: u64,
        /// How many, at least 1 and at most [`READ_BYTES_MAX`]; all of them lie inside the device.
        size_bytes: u32,
    },
    /// Nothing.
    Nothing,
}

/// Decides about a request to a folder of files of these sizes, of which `in_flight_max` reads may be under way.
pub(crate) fn decide(request: &Request, sizes: &[u64], in_flight_max: u16) -> Step {
    let unique = request.unique;
    let device = |node: u64| {
        let index = usize::try_from(node.checked_sub(ROOT + 1)?).ok()?;
        Some((index, *sizes.get(index)?))
    };
    let reply = match request.what {
        Operation::Init {
            major,
            minor,
            max_readahead,
            flags,
        } => init(unique, (major, minor), max_readahead, flags, in_flight_max),
        Operation::Lookup(name) => {
            let found = name.and_then(|index| device(index.checked_add(ROOT + 1)?));
            match found {
                Some((index, size_bytes)) if request.node == ROOT => {
                    let node = index as u64 + ROOT + 1;
                    Reply::to(unique, 0)
                        .u64s(&[node, 0, VALID_SECS, VALID_SECS, 0])
                        .attributes(node, size_bytes)
                        .finish()
                }
                _ => refusal(unique, errno::ENOENT),
            }
        }
        Operation::GetAttr => {
            let size_bytes = match device(request.node) {
                Some((_, size_bytes)) => size_bytes,
                None if request.node == ROOT => 0,
                None => return Step::Reply(refusal(unique, errno::ENOENT)),
            };
            Reply::to(unique, 0)
                .u64s(&[VALID_SECS, 0])
                .attributes(request.node, size_bytes)
                .finish()
        }
        Operation::Open if device(request.node).is_some() => Reply::to(unique, 0)
            .u64s(&[0])
            .u32s(&[KEEP_CACHE, 0])
            .finish(),
        Operation::Open => refusal(unique, errno::ENOENT),
        Operation::Read { offset, size_bytes } => match device(request.node) {
            Some((index, device_bytes)) => {
                return read(unique, index, device_bytes, offset, size_bytes);
            }
            None => refusal(unique, errno::ENOENT),
        },
        // Blocks, free, available, files, free files; block size, length of names, fragment size, padding, spare.
        Operation::StatFs => Reply::to(unique, 0)
            .u64s(&[0, 0, 0, sizes.len() as u64, 0])
            .u32s(&[4096, 20, 4096, 0, 0, 0, 0, 0, 0, 0])
            .finish(),
        Operation::Close => refusal(unique, 0),
        Operation::Notice => return Step::Nothing,
        Operation::Unknown(_) => refusal(unique, errno::ENOSYS),
    };
    Step::Reply(reply)
}

fn init(
    unique: u64,
    (major, minor): (u32, u32),
    max_readahead: u32,
    flags: u32,
    in_flight_max: u16,
) -> Vec<u8> {
    if (major, minor) < (MAJOR, MINOR) {
        return refusal(unique, errno::EPROTO);
    }
    let readahead = max_readahead.min(READ_BYTES_MAX);
    let background = u32::from_ne_bytes(pair(in_flight_max, in_flight_max));
    let pages = u32::from_ne_bytes(pair((READ_BYTES_MAX / 4096) as u16, 0));
    Reply::to(unique, 0)
        .u32s(&[MAJOR, MINOR, readahead, flags & (ASYNC_READ | MAX_PAGES)])
        // Then the largest write, of which there are none, and the grain of times.
        .u32s(&[background, 4096, 1, pages])
        .u32s(&[0; 8])
        .finish()
}

fn pair(first: u16, second: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
}

/// A reply shorter than the read means "the file ends here" to the kernel, which then shows zeros: only a read past the
/// end of the device may be cut.
fn read(unique: u64, device: usize, device_bytes: u64, offset: u64, size_bytes: u32) -> Step {
    if size_bytes > READ_BYTES_MAX {
        return Step::Reply(refusal(unique, errno::EINVAL));
    }
    let left = device_bytes.saturating_sub(offset);
    let size_bytes = u64::from(size_bytes).min(left) as u32;
    if size_bytes == 0 {
        return Step::Reply(refusal(unique, 0));
    }
    Step::Read {
        device,
        offset,
        size_bytes,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&((REQUEST_HEAD_BYTES + body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&opcode.to_ne_bytes());
        bytes.extend_from_slice(&7u64.to_ne_bytes());
        bytes.extend_from_slice(&node.to_ne_bytes());
        bytes.resize(REQUEST_HEAD_BYTES, 0);
        bytes.extend_from_slice(body);
        bytes
    }

    fn read_body(offset: u64, size_bytes: u32) -> Vec<u8> {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&offset.to_ne_bytes());
        body[16..20].copy_from_slice(&size_bytes.to_ne_bytes());
        body
    }

    fn step(bytes: &[u8], sizes: &[u64]) -> Step {
        decide(&Request::parse(bytes).unwrap(), sizes, 64)
    }

    #[test]
    fn replies_have_the_kernels_lengths() {
        let sizes = [10_000];
        for (opcode, node, body, len) in [
            (
                26,
                0,
                [7u32, 40, 1 << 20, !0].map(u32::to_ne_bytes).concat(),
                80,
            ),
            (1, ROOT, b"0\0".to_vec(), 16 + 128),
            (3, 2, vec![0; 16], 16 + 104),
            (14, 2, vec![0; 8], 16 + 16),
            (17, ROOT, vec![], 16 + 80),
            (18, 2, vec![0; 24], 16),
            (9999, 2, vec![], 16),
        ] {
            let Step::Reply(reply) = step(&request(opcode, node, &body), &sizes) else {
                panic!("operation {opcode} wants a reply");
            };
            assert_eq!(reply.len(), len, "operation {opcode}");
            assert_eq!(u32_at(&reply, 0), Some(len as u32));
            assert_eq!(u64_at(&reply, 8), Some(7));
        }
    }

    #[test]
    fn only_a_read_past_the_end_is_cut() {
        let ask = |offset, bytes| step(&request(15, 2, &read_body(offset, bytes)), &[10_000]);
        let read = |offset, size_bytes| Step::Read {
            device: 0,
            offset,
            size_bytes,
        };
        assert_eq!(ask(0, 4096), read(0, 4096));
        assert_eq!(ask(8192, 4096), read(8192, 1808));
        assert_eq!(ask(10_000, 4096), Step::Reply(refusal(7, 0)));
        assert_eq!(ask(u64::MAX, 4096), Step::Reply(refusal(7, 0)));
        assert_eq!(ask(0, u32::MAX), Step::Reply(refusal(7, errno::EINVAL)));
    }

    #[test]
    fn names_are_numbers_written_in_one_way() {
        let sizes = [1, 2];
        let found = |name: &[u8]| match step(&request(1, ROOT, name), &sizes) {
            Step::Reply(reply) => u32_at(&reply, 4) == Some(0),
            _ => false,
        };
        assert!(found(b"1\0"));
        for name in [
            &b"2\0"[..],
            b"01\0",
            b"+1\0",
            b"x\0",
            b"\0",
            b"18446744073709551615\0",
        ] {
            assert!(!found(name), "{name:?}");
        }
    }

    #[test]
    fn a_request_that_lies_about_its_length_is_refused_by_its_number() {
        let mut bytes = request(3, 2, &[0; 16]);
        bytes[0] = 200;
        assert!(matches!(
            Request::parse(&bytes),
            Err(ProtocolError::Malformed { unique: 7, .. })
        ));
        assert!(matches!(
            Request::parse(&bytes[..39]),
            Err(ProtocolError::NoHead(39))
        ));
    }

    proptest! {
        #[test]
        fn a_read_lies_inside_its_device_whatever_is_asked(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            offset: u64, size_bytes: u32, size in 0u64..1 << 40,
        ) {
            if let Ok(request) = Request::parse(&bytes) {
                decide(&request, &[size], 64);
            }
            let asked = Request::parse(&request(15, 2, &read_body(offset, size_bytes))).unwrap();
            if let Step::Read { offset, size_bytes, .. } = decide(&asked, &[size], 64) {
                prop_assert!(size_bytes > 0 && size_bytes <= READ_BYTES_MAX);
                prop_assert!(offset + u64::from(size_bytes) <= size);
            }
        }
    }
}
