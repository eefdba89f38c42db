//! What `/status` says of paths and limits.

use std::net::SocketAddr;

use serde::Serialize;

use super::Meter;

/// How the paths are measured, and what else goes through the interfaces.
#[derive(Debug, Clone, Serialize)]
pub struct MeterStatus {
    /// `kernel` or `quic`: whose counts these are.
    counts: &'static str,
    /// Why not the kernel's.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// Carried by the interfaces since the node started.
    interfaces_received_bytes: u64,
    interfaces_sent_bytes: u64,
    /// Sent to peers just now, with all headers.
    own_sent_bytes_per_s: u64,
    /// Sent by everything else on this machine just now.
    others_sent_bytes_per_s: u64,
    /// What this node keeps to; absent where it is not limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    send_limit_bytes_per_s: Option<u64>,
    /// Whether that is because of others.
    yielding: bool,
    steered_by_id: u64,
    steered_by_hash: u64,
    steered_refused: u64,
}

/// What is known of the path of a connection.
#[derive(Debug, Clone, Serialize)]
pub struct PathStatus {
    /// Just now, with the headers of IP and UDP.
    inbound_bytes_per_s: u64,
    outbound_bytes_per_s: u64,
    /// What the path delivers while more is wanted, and how far that may be off.
    #[serde(skip_serializing_if = "Option::is_none")]
    deliverable_in_bytes_per_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deliverable_in_error_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deliverable_out_bytes_per_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deliverable_out_error_ratio: Option<f64>,
    rtt_min_ms: f64,
    loss_ratio: f64,
    silent: bool,
    socket_dropped_bytes: u64,
}

impl Meter {
    /// What is measured and how.
    pub fn status(&self) -> MeterStatus {
        let state = self.state.lock();
        let allowance = &state.allowance;
        let why = self.why.lock().clone();
        MeterStatus {
            counts: if why.is_none() { "kernel" } else { "quic" },
            why,
            interfaces_received_bytes: state.totals.received_bytes,
            interfaces_sent_bytes: state.totals.sent_bytes,
            own_sent_bytes_per_s: allowance.own_bytes_per_s as u64,
            others_sent_bytes_per_s: allowance.others_bytes_per_s as u64,
            send_limit_bytes_per_s: allowance.bytes_per_s.map(|rate| rate as u64),
            yielding: allowance.is_yielding,
            steered_by_id: state.steered.by_id,
            steered_by_hash: state.steered.by_hash,
            steered_refused: state.steered.refused,
        }
    }

    /// What is known of the path to `address`.
    pub fn path_status(&self, address: &SocketAddr) -> Option<PathStatus> {
        let state = self.state.lock();
        let (entry, estimate) = state.of(address, self.now())?;
        let rate = |rate: Option<pantala_meter::core::Rate>| {
            rate.map(|rate| (rate.bytes_per_s as u64, rate.error_ratio))
                .unzip()
        };
        let (deliverable_in_bytes_per_s, deliverable_in_error_ratio) = rate(estimate.inbound);
        let (deliverable_out_bytes_per_s, deliverable_out_error_ratio) = rate(estimate.outbound);
        Some(PathStatus {
            inbound_bytes_per_s: entry.inbound_bytes_per_s as u64,
            outbound_bytes_per_s: entry.outbound_bytes_per_s as u64,
            deliverable_in_bytes_per_s,
            deliverable_in_error_ratio,
            deliverable_out_bytes_per_s,
            deliverable_out_error_ratio,
            rtt_min_ms: estimate.rtt_min.as_secs_f64() * 1000.0,
            loss_ratio: estimate.loss_ratio,
            silent: estimate.is_silent,
            socket_dropped_bytes: estimate.dropped_bytes,
        })
    }
}
