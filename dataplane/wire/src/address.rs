//! Which addresses a registry, or anything else that is fetched from, may have.
//!
//! Anybody who can name an upstream, or answer for one with a redirect or a DNS record, chooses
//! where a node connects to. Registries do live on loopback and private addresses, so those stay
//! open; what no registry ever has is refused. The rule is here because the mirror (which upstreams
//! it serves) and the source (where it connects to) must not differ in it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4 addresses of cloud metadata and host-agent services outside of 169.254/16.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];

/// IPv6 addresses of cloud metadata services outside of fe80::/10.
const METADATA_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
];

/// Whether no origin may have this address: link-local, cloud metadata, unspecified, multicast,
/// broadcast, or one of these inside an IPv6 address that carries an IPv4 one.
pub fn address_is_forbidden(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4_is_forbidden(v4),
        IpAddr::V6(v6) => {
            let link_local = v6.segments()[0] & 0xffc0 == 0xfe80;
            let site_local = v6.segments()[0] & 0xffc0 == 0xfec0;
            v6.is_unspecified()
                || v6.is_multicast()
                || link_local
                || site_local
                || METADATA_V6.contains(&v6)
                || embedded_v4(v6).is_some_and(v4_is_forbidden)
        }
    }
}

fn v4_is_forbidden(v4: Ipv4Addr) -> bool {
    // All of 0/8 means "this network": Linux connects 0.x to nothing good, 0.0.0.0 to itself.
    v4.octets()[0] == 0
        || v4.is_link_local()
        || v4.is_multicast()
        || v4.is_broadcast()
        || METADATA_V4.contains(&v4)
}

/// The IPv4 address inside an IPv4-mapped, IPv4-compatible, NAT64 or 6to4 address.
fn embedded_v4(v6: Ipv6Addr) -> Option<Ipv4Addr> {
    let s = v6.segments();
    let from = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    match s {
        // ::1 has the form of a compatible address, but is loopback.
        [0, 0, 0, 0, 0, 0, 0, 1] => None,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => Some(from(high, low)),
        [0x64, 0xff9b, _, _, _, _, high, low] => Some(from(high, low)),
        [0x2002, high, low, ..] => Some(from(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_no_registry_has_are_forbidden() {
        for text in [
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "239.255.255.255",
            "255.255.255.255",
            "::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "::ffff:169.254.169.254",
            "::ffff:100.100.100.200",
            "::ffff:0.0.0.0",
            "::169.254.169.254",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::169.254.169.254",
            "2002:a9fe:a9fe::1",
        ] {
            assert!(address_is_forbidden(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn loopback_private_and_public_addresses_are_allowed() {
        for text in [
            "127.0.0.1",
            "127.5.5.5",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "100.100.100.201",
            "1.1.1.1",
            "::1",
            "fd00::1",
            "2001:db8::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::8.8.8.8",
        ] {
            assert!(!address_is_forbidden(text.parse().unwrap()), "{text}");
        }
    }
}
