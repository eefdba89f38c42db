//! The programs in the kernel, and what they have counted.
//!
//! Who loads them needs CAP_BPF and CAP_NET_ADMIN and nothing more; whoever reads the counts needs neither
//! ([`drop_capabilities`]). Loading is refused as a whole or succeeds as a whole.

mod attached;
mod capability;
mod cgroup;
mod interfaces;
mod object;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

pub use attached::{KernelConfig, KernelMeter, Steered};
pub use capability::{Dropped, drop_capabilities};
pub use cgroup::own_cgroup;
pub use interfaces::{InterfaceTotals, Interfaces};
pub use pantala_ebpf_common::{PEERS_MAX, THREADS_MAX, Tally, Traffic};

use pantala_ebpf_common::PeerKey;

use crate::core::Count;

/// Why the kernel does not count for this node. It works without, on QUIC's own counts.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The rights are missing.
    #[error(
        "the kernel does not let this process load programs ({problem}): give the service CAP_BPF and CAP_NET_ADMIN"
    )]
    NotPermitted {
        /// What the kernel said.
        problem: String,
    },
    /// There is no cgroup v2 hierarchy to attach to.
    #[error(
        "no cgroup v2 hierarchy is mounted, so there is nothing to attach the counters to: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)"
    )]
    NoCgroup2,
    /// The own cgroup cannot be found or opened.
    #[error("cannot use {path}: {source}")]
    Cgroup {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses a program or a map: too old, or locked down.
    #[error(
        "the kernel refuses {what}: {problem} (kernel 5.11 or later is needed, and no lockdown of BPF)"
    )]
    Refused {
        /// Which program or map.
        what: &'static str,
        /// What the kernel said.
        problem: String,
    },
    /// A map could not be read or written.
    #[error("cannot {what}: {problem}")]
    Map {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        problem: String,
    },
}

fn key(peer: SocketAddr) -> PeerKey {
    let address = match peer.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    PeerKey::new(address, peer.port())
}

/// What the kernel counted to or from `peer`, with the headers that go over the wire.
pub fn count(peer: SocketAddr, tally: &Tally) -> Count {
    Count {
        payload_bytes: tally.payload_bytes,
        wire_bytes: tally.payload_bytes + tally.datagrams * key(peer).headers_bytes(),
        datagrams: tally.datagrams,
    }
}
