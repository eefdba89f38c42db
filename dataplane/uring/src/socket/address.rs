//! Socket addresses as the kernel lays them out, written and read without a cast.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// Room for a `sockaddr_in6` (28 bytes), and a multiple of 16.
pub(crate) const NAME_BYTES: usize = 32;
const V4_BYTES: usize = size_of::<libc::sockaddr_in>();
const V6_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// Writes `address` in the family of the socket, if it has a form in it. Returns its length in bytes.
pub(crate) fn encode(
    address: SocketAddr,
    socket_is_v6: bool,
    name: &mut [u8; NAME_BYTES],
) -> libc::socklen_t {
    let (ip, flow, scope) = match address {
        SocketAddr::V4(v4) => (IpAddr::V4(*v4.ip()), 0, 0),
        SocketAddr::V6(v6) => (IpAddr::V6(*v6.ip()), v6.flowinfo(), v6.scope_id()),
    };
    let ip = match (ip, socket_is_v6) {
        (IpAddr::V4(v4), true) => IpAddr::V6(v4.to_ipv6_mapped()),
        (ip, true) => ip,
        (ip, false) => ip.to_canonical(),
    };
    name[2..4].copy_from_slice(&address.port().to_be_bytes());
    match ip {
        IpAddr::V4(v4) => {
            name[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&v4.octets());
            name[8..V4_BYTES].fill(0);
            V4_BYTES as libc::socklen_t
        }
        IpAddr::V6(v6) => {
            name[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&flow.to_ne_bytes());
            name[8..24].copy_from_slice(&v6.octets());
            name[24..28].copy_from_slice(&scope.to_ne_bytes());
            V6_BYTES as libc::socklen_t
        }
    }
}

/// The address that the kernel wrote, if it is one of IPv4 or IPv6.
pub(crate) fn decode(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(name.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = name.get(4..8)?.try_into().ok()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(octets), port).into())
        }
        libc::AF_INET6 => {
            let flow = u32::from_ne_bytes(name.get(4..8)?.try_into().ok()?);
            let octets: [u8; 16] = name.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(name.get(24..28)?.try_into().ok()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, flow, scope).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_as_the_socket_shows_it() {
        let mut name = [0xff; NAME_BYTES];
        for (given, socket_is_v6, shown) in [
            ("10.1.2.3:4433", false, "10.1.2.3:4433"),
            ("10.1.2.3:4433", true, "[::ffff:10.1.2.3]:4433"),
            ("[::ffff:10.1.2.3]:4433", false, "10.1.2.3:4433"),
            ("[fe80::1%7]:80", true, "[fe80::1%7]:80"),
            ("[2001:db8::9]:65535", true, "[2001:db8::9]:65535"),
        ] {
            let bytes = encode(given.parse().unwrap(), socket_is_v6, &mut name) as usize;
            assert_eq!(
                decode(&name[..bytes]),
                Some(shown.parse().unwrap()),
                "{given}"
            );
        }
    }

    #[test]
    fn what_is_no_address_is_none() {
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&[0; 28]), None);
        let mut name = [0; NAME_BYTES];
        encode("[::1]:1".parse().unwrap(), true, &mut name);
        for bytes in 0..28 {
            assert_eq!(decode(&name[..bytes]), None);
        }
    }
}
