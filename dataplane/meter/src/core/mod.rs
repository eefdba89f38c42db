//! What decides: estimates of paths, and how much to send beside others. State machines that are given the
//! time and the counts.

mod flow;
mod pace;
mod path;
mod scavenger;

use std::time::Duration;

pub use flow::{Demand, Flow, Rate};
pub use pace::{Pace, Turn};
pub use path::{Path, PathEstimate, Reading};
pub use scavenger::{Allowance, HostReading, Scavenger, ScavengerConfig};

/// What went one way, summed up since the path began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// UDP payload.
    pub payload_bytes: u64,
    /// Payload and the headers of IP and UDP of each datagram.
    pub wire_bytes: u64,
    /// Datagrams.
    pub datagrams: u64,
}

/// What QUIC knows of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuicView {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Congestion window.
    pub cwnd_bytes: u64,
    /// Packets sent since the path began.
    pub sent_packets: u64,
    /// Those of them found lost.
    pub lost_packets: u64,
    /// UDP payload that reached the process.
    pub received_bytes: u64,
}
