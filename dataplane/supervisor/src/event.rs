//! The messages that the kernel puts into a fanotify group's queue, parsed. Pure.
//!
//! One read yields several events, each `struct fanotify_event_metadata` with records after it:
//!
//! ```text
//!  0  u32 event_len     of this event, records included
//!  4  u8  version       3
//!  5  u8  reserved
//!  6  u16 metadata_len  where the records begin
//!  8  u64 mask
//! 16  i32 descriptor    of the file, opened for the reader of the event; -1 where there is none
//! 20  i32 process
//! ```
//!
//! and a record of type 6: `u8 type, u8 pad, u16 len, u32 pad, u64 offset, u64 count`.

/// Bytes of `struct fanotify_event_metadata`.
pub const METADATA_BYTES: usize = 24;
/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;
/// `FAN_EVENT_INFO_TYPE_RANGE`.
const RANGE_RECORD: u8 = 6;
const RANGE_RECORD_BYTES: usize = 24;
/// Type, padding and length.
const RECORD_HEAD_BYTES: usize = 4;

/// Somebody is about to read a marked file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The file's descriptor; its number names the event in the answer.
    pub descriptor: i32,
    /// First byte of the file that is about to be read.
    pub offset: u64,
    /// So many bytes from there on; all that there are where the kernel did not say.
    pub count: u64,
}

/// What cannot be a message of this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// The length of an event is not one, or it ends outside of what was read.
    Length,
    /// Another version of the layout than this program knows.
    Version(u8),
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Length => f.write_str("an event's length is wrong"),
            Self::Version(version) => write!(f, "events of version {version}, not {VERSION}"),
        }
    }
}

impl std::error::Error for Malformed {}

/// The events in `bytes`, one after the other. After a malformed one nothing more can be found.
pub fn parse(bytes: &[u8]) -> impl Iterator<Item = Result<Event, Malformed>> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        loop {
            let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
            match parse_one(bytes) {
                Ok((event, after)) => {
                    rest = Some(after);
                    // Without a descriptor it tells of something lost, and nobody waits for an answer.
                    if let Some(event) = event {
                        return Some(Ok(event));
                    }
                }
                Err(malformed) => return Some(Err(malformed)),
            }
        }
    })
}

fn parse_one(bytes: &[u8]) -> Result<(Option<Event>, &[u8]), Malformed> {
    let head = bytes
        .first_chunk::<METADATA_BYTES>()
        .ok_or(Malformed::Length)?;
    let event_len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let metadata_len = usize::from(u16::from_ne_bytes([head[6], head[7]]));
    if head[4] != VERSION {
        return Err(Malformed::Version(head[4]));
    }
    let fits = (METADATA_BYTES..=event_len).contains(&metadata_len);
    let (event, after) = bytes
        .split_at_checked(event_len)
        .filter(|_| fits)
        .ok_or(Malformed::Length)?;
    let descriptor = i32::from_ne_bytes([head[16], head[17], head[18], head[19]]);
    if descriptor < 0 {
        return Ok((None, after));
    }
    let (offset, count) = range(&event[metadata_len..]).unwrap_or((0, u64::MAX));
    let event = Event {
        descriptor,
        offset,
        count,
    };
    Ok((Some(event), after))
}

/// Offset and count of the first range record.
fn range(mut records: &[u8]) -> Option<(u64, u64)> {
    while let Some(head) = records.first_chunk::<RECORD_HEAD_BYTES>() {
        let len = usize::from(u16::from_ne_bytes([head[2], head[3]]));
        if len < RECORD_HEAD_BYTES {
            return None;
        }
        let (record, after) = records.split_at_checked(len)?;
        if head[0] == RANGE_RECORD && len >= RANGE_RECORD_BYTES {
            let number = |at: usize| {
                let bytes = record.get(at..at + 8)?.try_into().ok()?;
                Some(u64::from_ne_bytes(bytes))
            };
            return Some((number(8)?, number(16)?));
        }
        records = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(descriptor: i32, range: Option<(u64, u64)>) -> Vec<u8> {
        let len = METADATA_BYTES as u32 + if range.is_some() { 24 } else { 0 };
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend([VERSION, 0]);
        bytes.extend((METADATA_BYTES as u16).to_ne_bytes());
        bytes.extend(0x10_0000_u64.to_ne_bytes());
        bytes.extend(descriptor.to_ne_bytes());
        bytes.extend(77_i32.to_ne_bytes());
        if let Some((offset, count)) = range {
            bytes.extend([RANGE_RECORD, 0]);
            bytes.extend(24_u16.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(count.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn events_come_one_after_the_other_and_lost_ones_are_no_events() {
        let bytes = [
            event(5, Some((4096, 8192))),
            event(-1, None),
            event(6, None),
        ]
        .concat();
        let events: Vec<_> = parse(&bytes).collect();
        let of = |descriptor, offset, count| {
            Ok(Event {
                descriptor,
                offset,
                count,
            })
        };
        assert_eq!(events, [of(5, 4096, 8192), of(6, 0, u64::MAX)]);
    }

    #[test]
    fn a_wrong_length_or_version_ends_the_parse_with_an_error() {
        let good = event(5, Some((0, 1)));
        for (at, value) in [(0, 23), (0, 200), (4, 2), (6, 200), (6, 3)] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let bytes = [good.clone(), bytes].concat();
            let events: Vec<_> = parse(&bytes).collect();
            assert_eq!(events.len(), 2, "byte {at} is {value}");
            assert!(events[0].is_ok() && events[1].is_err());
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_the_parse_ends(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(parse(&bytes).count() <= bytes.len() / METADATA_BYTES + 1);
        }
    }
}
