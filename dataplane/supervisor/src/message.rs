//! What daemon and supervisor say to each other: packets of a unix socket, little-endian. Pure.
//!
//! A connection begins with a [`Request`]. All but [`Request::Subscribe`] are answered by one [`Reply`]
//! each, as many as the daemon likes. After `Subscribe` the supervisor sends packets of [`Fault`]s and the
//! daemon packets of [`Answer`]s, neither waiting for the other.

use crate::fanotify::Verdict;

/// Both sides are installed together, but the supervisor outlives an upgrade: it is asked for its
/// version before anything else.
pub const VERSION: u32 = 1;
/// The longest packet: a note with its name.
pub const PACKET_BYTES_MAX: usize = 64 << 10;
/// The longest name of what is kept: a path.
pub const NAME_BYTES_MAX: usize = 4096;
/// The longest note: a record of a mount with a credential.
pub const NOTE_BYTES_MAX: usize = 48 << 10;
/// Faults or answers in one packet.
pub const BATCH_MAX: usize = 512;

/// Names one life of a fanotify group, whoever holds it.
pub type Instance = [u8; 16];

/// What a daemon asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Who is there, and a copy of the group's descriptor.
    Hello,
    /// Hold this group, whose descriptor comes along, in place of the one that was made at the start:
    /// the supervisor before this one has died.
    Adopt {
        /// Which group.
        instance: Instance,
    },
    /// Keep this under its name, in place of what was there; with a descriptor where one comes along.
    Keep {
        /// Its name.
        name: String,
        /// What the daemon has to know of it.
        note: Vec<u8>,
    },
    /// Let go of this.
    Forget {
        /// Its name.
        name: String,
    },
    /// What is kept, in the order of names: the first after `name`.
    After {
        /// A name, or nothing for the first.
        name: String,
    },
    /// From now on this connection carries faults and answers; one before it ends.
    Subscribe,
}

/// What the supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Hello`], with the group's descriptor.
    Welcome {
        /// Of the protocol.
        version: u32,
        /// Which group.
        instance: Instance,
    },
    /// It is done.
    Done,
    /// To [`Request::After`], with the descriptor if there is one.
    Kept {
        /// Its name.
        name: String,
        /// The note.
        note: Vec<u8>,
    },
    /// There is no more.
    Nothing,
    /// It is not done; why.
    Refused(String),
}

/// A read that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Names it in the answer.
    pub number: i32,
    /// Device number of the file's file system.
    pub device: u64,
    /// The file there.
    pub inode: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; more than the file has where the kernel did not say.
    pub count: u64,
}

/// What becomes of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Which.
    pub number: i32,
    /// How it ends.
    pub verdict: Verdict,
}

const FAULT_BYTES: usize = 36;
const ANSWER_BYTES: usize = 5;

/// A packet that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a packet that is none of the protocol's")
    }
}

impl std::error::Error for Malformed {}

fn named(kind: u8, name: &str, note: &[u8]) -> Vec<u8> {
    let mut packet = vec![kind];
    packet.extend((name.len() as u32).to_le_bytes());
    packet.extend(name.as_bytes());
    packet.extend(note);
    packet
}

fn parse_named(rest: &[u8]) -> Result<(String, Vec<u8>), Malformed> {
    let (len, rest) = rest.split_first_chunk().ok_or(Malformed)?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > NAME_BYTES_MAX {
        return Err(Malformed);
    }
    let (name, note) = rest.split_at_checked(len).ok_or(Malformed)?;
    if note.len() > NOTE_BYTES_MAX {
        return Err(Malformed);
    }
    let name = std::str::from_utf8(name).map_err(|_| Malformed)?;
    Ok((name.to_owned(), note.to_vec()))
}

impl Request {
    /// As a packet.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello => vec![1],
            Self::Adopt { instance } => [&[2], instance.as_slice()].concat(),
            Self::Keep { name, note } => named(3, name, note),
            Self::Forget { name } => named(4, name, &[]),
            Self::After { name } => named(5, name, &[]),
            Self::Subscribe => vec![6],
        }
    }

    /// Of a packet.
    ///
    /// # Errors
    /// Where it is none.
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        let (kind, rest) = packet.split_first().ok_or(Malformed)?;
        match (kind, rest.len()) {
            (1, 0) => Ok(Self::Hello),
            (2, _) => Ok(Self::Adopt {
                instance: rest.try_into().map_err(|_| Malformed)?,
            }),
            (3, _) => parse_named(rest).map(|(name, note)| Self::Keep { name, note }),
            (4, _) => parse_named(rest).map(|(name, _)| Self::Forget { name }),
            (5, _) => parse_named(rest).map(|(name, _)| Self::After { name }),
            (6, 0) => Ok(Self::Subscribe),
            _ => Err(Malformed),
        }
    }
}

impl Reply {
    /// As a packet.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome { version, instance } => {
                [&[1], version.to_le_bytes().as_slice(), instance].concat()
            }
            Self::Done => vec![2],
            Self::Kept { name, note } => named(3, name, note),
            Self::Nothing => vec![4],
            Self::Refused(why) => [&[5], why.as_bytes()].concat(),
        }
    }

    /// Of a packet.
    ///
    /// # Errors
    /// Where it is none.
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        let (kind, rest) = packet.split_first().ok_or(Malformed)?;
        match (kind, rest.len()) {
            (1, _) => {
                let (version, instance) = rest.split_first_chunk().ok_or(Malformed)?;
                Ok(Self::Welcome {
                    version: u32::from_le_bytes(*version),
                    instance: instance.try_into().map_err(|_| Malformed)?,
                })
            }
            (2, 0) => Ok(Self::Done),
            (3, _) => parse_named(rest).map(|(name, note)| Self::Kept { name, note }),
            (4, 0) => Ok(Self::Nothing),
            (5, _) => Ok(Self::Refused(String::from_utf8_lossy(rest).into_owned())),
            _ => Err(Malformed),
        }
    }
}

/// A packet of faults, at most [`BATCH_MAX`].
pub fn encode_faults(faults: &[Fault]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(faults.len() * FAULT_BYTES);
    for fault in faults {
        packet.extend(fault.number.to_le_bytes());
        for number in [fault.device, fault.inode, fault.offset, fault.count] {
            packet.extend(number.to_le_bytes());
        }
    }
    packet
}

/// The faults of a packet.
///
/// # Errors
/// Where it is none.
pub fn parse_faults(packet: &[u8]) -> Result<Vec<Fault>, Malformed> {
    let (faults, []) = packet.as_chunks::<FAULT_BYTES>() else {
        return Err(Malformed);
    };
    let parsed = faults.iter().map(|bytes| {
        let (number, rest) = bytes.split_first_chunk().ok_or(Malformed)?;
        let (&[device, inode, offset, count], []) = rest.as_chunks::<8>() else {
            return Err(Malformed);
        };
        Ok(Fault {
            number: i32::from_le_bytes(*number),
            device: u64::from_le_bytes(device),
            inode: u64::from_le_bytes(inode),
            offset: u64::from_le_bytes(offset),
            count: u64::from_le_bytes(count),
        })
    });
    parsed.collect()
}

/// A packet of answers, at most [`BATCH_MAX`].
pub fn encode_answers(answers: &[Answer]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(answers.len() * ANSWER_BYTES);
    for answer in answers {
        packet.extend(answer.number.to_le_bytes());
        packet.push(u8::from(answer.verdict == Verdict::Allow));
    }
    packet
}

/// The answers of a packet.
///
/// # Errors
/// Where it is none.
pub fn parse_answers(packet: &[u8]) -> Result<Vec<Answer>, Malformed> {
    let (answers, []) = packet.as_chunks::<ANSWER_BYTES>() else {
        return Err(Malformed);
    };
    let parsed = answers.iter().map(|[a, b, c, d, verdict]| {
        let verdict = match verdict {
            0 => Verdict::Deny,
            1 => Verdict::Allow,
            _ => return Err(Malformed),
        };
        Ok(Answer {
            number: i32::from_le_bytes([*a, *b, *c, *d]),
            verdict,
        })
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_and_replies_come_back_as_they_were(
            name in ".{0,60}",
            note in proptest::collection::vec(any::<u8>(), 0..300),
            instance in any::<Instance>(),
            version: u32,
        ) {
            let requests = [
                Request::Hello,
                Request::Adopt { instance },
                Request::Keep { name: name.clone(), note: note.clone() },
                Request::Forget { name: name.clone() },
                Request::After { name: name.clone() },
                Request::Subscribe,
            ];
            for request in requests {
                prop_assert_eq!(Request::parse(&request.encode()), Ok(request));
            }
            let replies = [
                Reply::Welcome { version, instance },
                Reply::Done,
                Reply::Kept { name: name.clone(), note },
                Reply::Nothing,
                Reply::Refused(name),
            ];
            for reply in replies {
                prop_assert_eq!(Reply::parse(&reply.encode()), Ok(reply));
            }
        }

        #[test]
        fn faults_and_answers_come_back_as_they_were(
            numbers in proptest::collection::vec(any::<(i32, u64, u64, u64, u64, bool)>(), 0..40),
        ) {
            let faults: Vec<Fault> = numbers.iter().map(|&(number, device, inode, offset, count, _)| {
                Fault { number, device, inode, offset, count }
            }).collect();
            prop_assert_eq!(parse_faults(&encode_faults(&faults)), Ok(faults));
            let answers: Vec<Answer> = numbers.iter().map(|&(number, .., allow)| Answer {
                number,
                verdict: if allow { Verdict::Allow } else { Verdict::Deny },
            }).collect();
            prop_assert_eq!(parse_answers(&encode_answers(&answers)), Ok(answers));
        }

        #[test]
        fn hostile_packets_are_errors_or_small(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Request::Keep { name, note }) = Request::parse(&packet) {
                prop_assert!(name.len() + note.len() < packet.len());
            }
            let _ = Reply::parse(&packet);
            if let Ok(faults) = parse_faults(&packet) {
                prop_assert_eq!(faults.len() * FAULT_BYTES, packet.len());
            }
            let _ = parse_answers(&packet);
        }
    }
}
