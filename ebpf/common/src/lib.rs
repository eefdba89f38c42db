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
/// Words and not bytes: the programs copy them one by one out of a packet. A loop over bytes would be refused to
/// those who load them without CAP_PERFMON. Hash maps compare every byte, so that there is none that is not written.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The words of the address as they lie in a packet; an IPv4 address is the last, after `::ffff`.
    pub address: [u32; 4],
    /// In host order, in a word of its own: there is no padding.
    pub port: u32,
}

/// Integers in a [`PeerKey`].
pub const KEY_WORDS: usize = 5;
/// The third word of an IPv4 address that is written as one of IPv6.
pub const V4_MAPPED: u32 = 0xffff_u32.to_be();

impl PeerKey {
    /// Of an address in network order.
    pub const fn new(address: [u8; 16], port: u16) -> Self {
        let mut words = [0; 4];
        let mut at = 0;
        while at < 4 {
            let from = at * 4;
            words[at] = u32::from_ne_bytes([
                address[from],
                address[from + 1],
                address[from + 2],
                address[from + 3],
            ]);
            at += 1;
        }
        Self {
            address: words,
            port: port as u32,
        }
    }

    /// As the map holds it.
    pub const fn to_words(self) -> [u32; KEY_WORDS] {
        let [a, b, c, d] = self.address;
        [a, b, c, d, self.port]
    }

    /// Bytes of headers of each datagram to or from this peer.
    pub const fn headers_bytes(&self) -> u64 {
        match self.address {
            [0, 0, V4_MAPPED, _] => V4_HEADERS_BYTES,
            _ => V6_HEADERS_BYTES,
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

/// Sockets whose traffic is counted: those of a group, and room for as many that are closed soon.
pub const SOCKETS_MAX: u32 = 2 * THREADS_MAX;

/// Indexes into the programs' settings.
pub mod setting {
    /// The port of the sockets that are counted, by which most of the other traffic is told apart at once. 0 until
    /// it is known.
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

const _: () = assert!(size_of::<PeerKey>() == KEY_WORDS * 4);
const _: () = assert!(size_of::<Traffic>() == TRAFFIC_WORDS * 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_knows_its_headers() {
        let mut address = [0; 16];
        address[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 7]);
        let v4 = PeerKey::new(address, 65003);
        let last = u32::from_ne_bytes([10, 0, 0, 7]);
        assert_eq!(v4.to_words(), [0, 0, V4_MAPPED, last, 65003]);
        assert_eq!(v4.headers_bytes(), V4_HEADERS_BYTES);
        address[0] = 0xfd;
        assert_eq!(PeerKey::new(address, 1).headers_bytes(), V6_HEADERS_BYTES);
        let loopback = core::array::from_fn(|at| u8::from(at == 15));
        assert_eq!(PeerKey::new(loopback, 1).headers_bytes(), V6_HEADERS_BYTES);
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
