//! What a completion is about, in the 64 bits that the kernel carries along.

/// Kind (8 bits), generation (24), index (32).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Receive {
        socket: u32,
    },
    Send {
        message: u32,
    },
    /// The generation tells operations that used one slot after another apart, for the sake of late cancellations.
    File {
        slot: u32,
        generation: u32,
    },
    Bell,
    /// A cancellation's own completion.
    Cancel,
}

const KIND_SHIFT: u32 = 56;
const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u32 = 0xff_ffff;

impl Tag {
    pub(super) fn encode(self) -> u64 {
        let (kind, generation, index) = match self {
            Self::Receive { socket } => (1, 0, socket),
            Self::Send { message } => (2, 0, message),
            Self::File { slot, generation } => (3, generation & GENERATION_MASK, slot),
            Self::Bell => (4, 0, 0),
            Self::Cancel => (5, 0, 0),
        };
        kind << KIND_SHIFT | u64::from(generation) << GENERATION_SHIFT | u64::from(index)
    }

    pub(super) fn decode(tag: u64) -> Option<Self> {
        let index = tag as u32;
        match tag >> KIND_SHIFT {
            1 => Some(Self::Receive { socket: index }),
            2 => Some(Self::Send { message: index }),
            3 => Some(Self::File {
                slot: index,
                generation: (tag >> GENERATION_SHIFT) as u32 & GENERATION_MASK,
            }),
            4 => Some(Self::Bell),
            5 => Some(Self::Cancel),
            _ => None,
        }
    }

    pub(super) fn next_generation(generation: u32) -> u32 {
        generation.wrapping_add(1) & GENERATION_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_back() {
        for tag in [
            Tag::Receive { socket: u32::MAX },
            Tag::Send { message: 7 },
            Tag::File {
                slot: 3,
                generation: GENERATION_MASK,
            },
            Tag::Bell,
            Tag::Cancel,
        ] {
            assert_eq!(Tag::decode(tag.encode()), Some(tag));
        }
        assert_eq!(Tag::decode(0), None);
        assert_eq!(Tag::next_generation(GENERATION_MASK), 0);
    }
}
