//! Control messages: what goes along with a datagram besides its bytes. Written and read without a cast.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HEADER_BYTES: usize = size_of::<libc::cmsghdr>();
// A length of eight bytes, the level, the type.
const _: () = assert!(HEADER_BYTES == 16);
/// Segment size (24), ECN (24) and the larger packet info (40).
const SEND_BYTES: usize = 88;
/// What arrives is the same; the rest is room for what else somebody may have switched on.
pub(crate) const RECEIVE_BYTES: usize = 128;

const fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(size_of::<usize>())
}

/// The control messages of a datagram to send.
#[derive(Debug)]
#[repr(C, align(8))]
pub(crate) struct Control {
    bytes: [u8; SEND_BYTES],
    len: usize,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            bytes: [0; SEND_BYTES],
            len: 0,
        }
    }
}

impl Control {
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// Each kind at most once: there is room for one of each.
    fn push<const N: usize>(&mut self, level: i32, kind: i32, value: [u8; N]) {
        let end = self.len + HEADER_BYTES + aligned(N);
        let message = &mut self.bytes[self.len..end];
        message[..8].copy_from_slice(&(HEADER_BYTES + N).to_ne_bytes());
        message[8..12].copy_from_slice(&level.to_ne_bytes());
        message[12..16].copy_from_slice(&kind.to_ne_bytes());
        message[16..16 + N].copy_from_slice(&value);
        message[16 + N..].fill(0);
        self.len = end;
    }

    pub(crate) fn set_ecn(&mut self, route_is_v4: bool, ecn: u8) {
        let value = i32::from(ecn & 0b11).to_ne_bytes();
        if route_is_v4 {
            self.push(libc::IPPROTO_IP, libc::IP_TOS, value);
        } else {
            self.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, value);
        }
    }

    pub(crate) fn set_source_v4(&mut self, ip: Ipv4Addr) {
        // in_pktinfo: interface (any), source, destination (ignored).
        let mut value = [0; 12];
        value[4..8].copy_from_slice(&ip.octets());
        self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, value);
    }

    pub(crate) fn set_source_v6(&mut self, ip: Ipv6Addr) {
        // in6_pktinfo: source, interface (any).
        let mut value = [0; 20];
        value[..16].copy_from_slice(&ip.octets());
        self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, value);
    }

    pub(crate) fn set_segment_bytes(&mut self, bytes: u16) {
        self.push(libc::SOL_UDP, libc::UDP_SEGMENT, bytes.to_ne_bytes());
    }
}

/// What came along with a datagram.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) ecn: u8,
    pub(crate) local_ip: Option<IpAddr>,
    pub(crate) segment_bytes: Option<usize>,
}

/// Reads what the kernel wrote. What is unknown or cut off is left out.
pub(crate) fn decode(mut control: &[u8]) -> Arrived {
    let mut arrived = Arrived::default();
    while let Some(header) = control.first_chunk::<16>() {
        let field = |at: usize| i32::from_ne_bytes(std::array::from_fn(|i| header[at + i]));
        let bytes = usize::from_ne_bytes(std::array::from_fn(|i| header[i]));
        let Some(value) = control.get(HEADER_BYTES..bytes) else {
            break;
        };
        match (field(8), field(12)) {
            // One byte for IPv4, an int for IPv6.
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                arrived.ecn = value.first().map_or(0, |tos| tos & 0b11);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                arrived.ecn = int(value).map_or(0, |class| (class & 0b11) as u8);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // The third field is the address in the packet's header; the second is the local one.
                arrived.local_ip = value
                    .get(4..)
                    .and_then(|rest| rest.first_chunk::<4>())
                    .map(|octets| IpAddr::from(*octets));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                arrived.local_ip = value
                    .first_chunk::<16>()
                    .map(|octets| IpAddr::from(*octets));
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                arrived.segment_bytes = int(value).and_then(|size| usize::try_from(size).ok());
            }
            _ => {}
        }
        control = control.get(aligned(bytes)..).unwrap_or_default();
    }
    arrived
}

fn int(value: &[u8]) -> Option<i32> {
    value.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_fits_and_is_read_back() {
        let mut control = Control::default();
        control.push(libc::SOL_UDP, libc::UDP_GRO, 1452i32.to_ne_bytes());
        control.set_ecn(false, 2);
        control.set_source_v6(Ipv6Addr::LOCALHOST);
        assert_eq!(control.len, SEND_BYTES);
        assert_eq!(
            decode(control.as_mut_slice()),
            Arrived {
                ecn: 2,
                local_ip: Some(Ipv6Addr::LOCALHOST.into()),
                segment_bytes: Some(1452),
            }
        );
        control.clear();
        control.push(libc::IPPROTO_IP, libc::IP_TOS, [0b1111_1101]);
        control.set_source_v4(Ipv4Addr::new(10, 0, 0, 7));
        let arrived = decode(control.as_mut_slice());
        assert_eq!(arrived.ecn, 1);
        assert_eq!(arrived.local_ip, Some(IpAddr::from([10, 0, 0, 7])));
    }

    #[test]
    fn no_bytes_make_it_fail() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut bytes = [0; RECEIVE_BYTES];
        for _ in 0..20_000 {
            for byte in &mut bytes {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Mostly small numbers, which are the ones that mean something.
                *byte = if state & 7 == 0 {
                    (state >> 32) as u8 % 44
                } else {
                    0
                };
            }
            decode(&bytes[..(state >> 40) as usize % RECEIVE_BYTES]);
        }
    }

    #[test]
    fn cut_off_or_senseless_messages_are_left_out() {
        let mut control = Control::default();
        control.set_source_v6(Ipv6Addr::LOCALHOST);
        let whole = control.as_mut_slice().to_vec();
        for bytes in 0..HEADER_BYTES + 20 {
            assert_eq!(decode(&whole[..bytes]), Arrived::default(), "{bytes}");
        }
        for length in [0, 1, 15, 41, usize::MAX] {
            let mut wrong = whole.clone();
            wrong[..8].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(decode(&wrong), Arrived::default(), "{length}");
        }
        // An empty message of a known kind says nothing, and those after it count.
        let mut control = Control::default();
        control.push(libc::SOL_UDP, libc::UDP_GRO, []);
        control.set_ecn(true, 3);
        assert_eq!(
            decode(control.as_mut_slice()),
            Arrived {
                ecn: 3,
                ..Arrived::default()
            }
        );
    }
}
