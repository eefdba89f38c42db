//! The layout of what the kernel programs write and the meter reads.
//!
//! Both sides are built by different compilers, so each type here is `repr(C)`, has no hidden padding, and
//! turns itself into plain integers for the side that may not trust its memory to be a struct.

#![no_std]
#![forbid(unsafe_code)]

/// Peers counted at a time. A node talks to at most a few hundred; the rest is room for strangers that send
/// to its port, which push only each other out. 64 bytes a peer and processor: 8 MiB on 128 processors.
pub const PEERS_MAX: u32 = 1024;
/// Sockets in a group, and so threads that datagrams are steered to.
pub const THREADS_MAX: u32 = 8;
/// Bytes of the headers that every datagram carries: UDP's 8, and 20 of IPv4 or 40 of IPv6.
pub const V4_HEADERS_BYTES: u64 = 28;
/// The same for IPv6.
pub const V6_HEADERS_BYTES: u64 = 48;

/// The other end: its address and UDP port.
///
/// Aligned to 4: the programs build it on the kernel's stack out of 32-bit loads, and hash maps compare every
/// byte of it, so that it must have none that is not written.
#[repr(C, align(4))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// In network order; an IPv4 address as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
    /// In host order.
    pub port: u16,
    /// 18 bytes are not a multiple of 4: two that are always zero.
    pub padding: u16,
}

/// Bytes of a [`PeerKey`].
pub const KEY_BYTES: usize = size_of::<PeerKey>();

impl PeerKey {
    /// As the map holds it.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        let mut address = [0; 16];
        let mut at = 0;
        while at < 16 {
            address[at] = bytes[at];
            at += 1;
        }
        Self {
            address,
            port: u16::from_ne_bytes([bytes[16], bytes[17]]),
            padding: 0,
        }
    }

    /// As the map holds it.
    pub const fn to_bytes(self) -> [u8; KEY_BYTES] {
        let mut bytes = [0; KEY_BYTES];
        let mut at = 0;
        while at < 16 {
            bytes[at] = self.address[at];
            at += 1;
        }
        let port = self.port.to_ne_bytes();
        bytes[16] = port[0];
        bytes[17] = port[1];
        bytes
    }

    /// Bytes of headers of each datagram to or from this peer.
    pub const fn headers_bytes(&self) -> u64 {
        let a = &self.address;
        let mut at = 0;
        while at < 10 {
            if a[at] != 0 {
                return V6_HEADERS_BYTES;
            }
            at += 1;
        }
        if a[10] == 0xff && a[11] == 0xff {
            V4_HEADERS_BYTES
        } else {
            V6_HEADERS_BYTES
        }
    }
}

/// What went one way.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// UDP payload. What went over the wire is this and the headers of each datagram.
    pub payload_bytes: u64,
    /// Packets as the kernel handles them: a batch that is cut later (GSO), or was merged before (GRO), is one.
    pub batches: u64,
    /// Datagrams in those batches.
    pub datagrams: u64,
    /// When the last one passed, on the monotonic clock, to the tick of the kernel (1 to 10 ms): the exact time
    /// would cost as much as all the rest.
    pub last_seen_ns: u64,
}

/// What went both ways between this node and a peer: one cache line.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// From the peer.
    pub received: Tally,
    /// To the peer.
    pub sent: Tally,
}

/// Integers in a [`Traffic`].
pub const TRAFFIC_WORDS: usize = 8;

impl Traffic {
    /// As the map holds it.
    pub const fn from_words(words: [u64; TRAFFIC_WORDS]) -> Self {
        let [a, b, c, d, e, f, g, h] = words;
        Self {
            received: Tally {
                payload_bytes: a,
                batches: b,
                datagrams: c,
                last_seen_ns: d,
            },
            sent: Tally {
                payload_bytes: e,
                batches: f,
                datagrams: g,
                last_seen_ns: h,
            },
        }
    }
}

/// Indexes into the programs' settings.
pub mod setting {
    /// The node's own UDP port: nothing else is counted. 0 until it is known.
    pub const OWN_PORT: u32 = 0;
    /// Threads that datagrams are steered to.
    pub const THREADS: u32 = 1;
    /// How many settings there are.
    pub const COUNT: u32 = 2;
}

/// Indexes into the counts of what was steered how.
pub mod steered {
    /// To the thread that the connection ID names.
    pub const BY_ID: u32 = 0;
    /// By the kernel's hash: the packets that open a connection carry an ID that the client made up.
    pub const BY_HASH: u32 = 1;
    /// The thread's socket was not to be had, so the kernel's hash decided.
    pub const REFUSED: u32 = 2;
    /// How many counts there are.
    pub const COUNT: u32 = 3;
}

const _: () = assert!(KEY_BYTES == 20 && size_of::<Traffic>() == TRAFFIC_WORDS * 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_the_map_and_knows_its_headers() {
        let mut address = [0; 16];
        address[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 7]);
        let v4 = PeerKey {
            address,
            port: 65003,
            padding: 0,
        };
        assert_eq!(PeerKey::from_bytes(v4.to_bytes()), v4);
        assert_eq!(v4.headers_bytes(), V4_HEADERS_BYTES);
        address[0] = 0xfd;
        assert_eq!(PeerKey { address, ..v4 }.headers_bytes(), V6_HEADERS_BYTES);
        let loopback = PeerKey {
            address: core::array::from_fn(|at| u8::from(at == 15)),
            ..v4
        };
        assert_eq!(loopback.headers_bytes(), V6_HEADERS_BYTES);
    }

    #[test]
    fn traffic_is_read_in_the_order_it_is_written() {
        let traffic = Traffic::from_words([1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(traffic.received.payload_bytes, 1);
        assert_eq!(traffic.received.last_seen_ns, 4);
        assert_eq!(traffic.sent.payload_bytes, 5);
        assert_eq!(traffic.sent.datagrams, 7);
    }
}
