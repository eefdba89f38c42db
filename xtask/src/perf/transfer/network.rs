//! The networks that transfers are measured on.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use clap::ValueEnum;

use crate::rig::Rig;
use crate::rig::machine::{Machine, run};

/// Between the two machines of a veth pair there is a link of this name at either end.
const LINK: &str = "direct";
/// IPv4 and UDP headers.
const HEADER_BYTES: u16 = 28;

/// A kind of network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(in crate::perf) enum NetworkKind {
    /// Loopback with an MTU of 1480: UDP payloads of 1452
    #[value(name = "loopback-1452")]
    Loopback1452,
    /// Loopback with an MTU of 9000
    #[value(name = "loopback-9000")]
    Loopback9000,
    /// Two namespaces, MTU 1500, packets cut by the kernel as for a NIC without offloads
    #[value(name = "veth-1500")]
    Veth1500,
    /// Two namespaces, MTU 9000, packets cut by the kernel as for a NIC without offloads
    #[value(name = "veth-9000")]
    Veth9000,
    /// Two namespaces, MTU 1500, as veth comes: TCP and UDP batches of 64 KiB cross it whole
    #[value(name = "veth-1500-whole")]
    Veth1500Whole,
    /// Two namespaces, MTU 9000, as veth comes: TCP and UDP batches of 64 KiB cross it whole
    #[value(name = "veth-9000-whole")]
    Veth9000Whole,
}

impl NetworkKind {
    /// What is measured where nothing is chosen.
    pub(in crate::perf) const DEFAULT: [Self; 4] = [
        Self::Loopback1452,
        Self::Loopback9000,
        Self::Veth1500,
        Self::Veth9000,
    ];

    pub(in crate::perf) fn name(self) -> &'static str {
        match self {
            Self::Loopback1452 => "loopback-1452",
            Self::Loopback9000 => "loopback-9000",
            Self::Veth1500 => "veth-1500",
            Self::Veth9000 => "veth-9000",
            Self::Veth1500Whole => "veth-1500-whole",
            Self::Veth9000Whole => "veth-9000-whole",
        }
    }

    fn mtu(self) -> u16 {
        match self {
            Self::Loopback1452 => 1480,
            Self::Veth1500 | Self::Veth1500Whole => 1500,
            Self::Loopback9000 | Self::Veth9000 | Self::Veth9000Whole => 9000,
        }
    }

    /// The largest UDP payload, which QUIC stacks must find out and bare UDP is told.
    pub(in crate::perf) fn udp_payload_bytes(self) -> u16 {
        self.mtu() - HEADER_BYTES
    }

    fn is_loopback(self) -> bool {
        matches!(self, Self::Loopback1452 | Self::Loopback9000)
    }

    fn is_cut(self) -> bool {
        matches!(self, Self::Veth1500 | Self::Veth9000)
    }
}

/// Two places and what joins them.
#[derive(Debug)]
pub(in crate::perf) struct Network {
    pub(in crate::perf) kind: NetworkKind,
    pub(in crate::perf) server: Machine,
    pub(in crate::perf) client: Machine,
    /// Where the client reaches the server.
    pub(in crate::perf) address: IpAddr,
}

impl Network {
    pub(in crate::perf) fn create(rig: &Rig, kind: NetworkKind) -> Result<Self> {
        let server = rig.machine(kind.name())?;
        let mtu = kind.mtu().to_string();
        let inside = |machine: &Machine, rest: &[&str]| -> Result<()> {
            run("ip", &[&["-n", machine.namespace()?], rest].concat())
        };
        if kind.is_loopback() {
            inside(&server, &["link", "set", "lo", "mtu", &mtu])?;
            return Ok(Self {
                kind,
                client: server.clone(),
                server,
                address: Ipv4Addr::LOCALHOST.into(),
            });
        }
        let client = rig.machine(kind.name())?;
        let other = client.namespace()?;
        inside(
            &server,
            &[
                "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", other,
            ],
        )?;
        // Namespaces of their own: every pair may have the same addresses.
        let addresses = [Ipv4Addr::new(10, 78, 0, 1), Ipv4Addr::new(10, 78, 0, 2)];
        for (machine, address) in [&server, &client].into_iter().zip(addresses) {
            inside(
                machine,
                &["addr", "add", &format!("{address}/24"), "dev", LINK],
            )?;
            inside(machine, &["link", "set", LINK, "mtu", &mtu])?;
            if kind.is_cut() {
                let namespace = machine.namespace()?;
                run(
                    "ip",
                    &[
                        "netns",
                        "exec",
                        namespace,
                        "ethtool",
                        "-K",
                        LINK,
                        "tso",
                        "off",
                        "tx-udp-segmentation",
                        "off",
                        "gso",
                        "on",
                        "gro",
                        "on",
                    ],
                )?;
            }
            inside(machine, &["link", "set", LINK, "up"])?;
        }
        Ok(Self {
            kind,
            server,
            client,
            address: addresses[0].into(),
        })
    }
}
