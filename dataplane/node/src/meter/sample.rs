//! One look at all paths and interfaces.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use pantala_meter::core::{
    Allowance, Count, HostReading, Path, PathEstimate, QuicView, Reading, Scavenger,
};
use pantala_meter::kernel::{InterfaceTotals, Interfaces, Steered, count};
use pantala_quic::PathStats;
use pantala_wire::NodeId;

use super::Meter;
use crate::metrics::{Metrics, OutcomeLabel};
use crate::peer::Peers;

/// A path is wanted all the time if requests were under way for this part of it: between two requests there is
/// always a moment.
const WANTED_RATIO: f64 = 0.9;
/// What the newest rate weighs in what is shown: about a second's worth.
const SHOWN_WEIGHT: f64 = 0.2;

/// One path and what it was at the last look.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) node: NodeId,
    path: Path,
    last: Option<Reading>,
    busy: Duration,
    pub(super) inbound_bytes_per_s: f64,
    pub(super) outbound_bytes_per_s: f64,
}

/// All that is known.
#[derive(Debug)]
pub(super) struct State {
    /// By where the other end is: the kernel counts by that, and two connections with it are one path.
    pub(super) paths: HashMap<SocketAddr, Entry>,
    interfaces: Interfaces,
    scavenger: Scavenger,
    pub(super) allowance: Allowance,
    pub(super) totals: InterfaceTotals,
    /// Sent to all peers, those that are gone included.
    own: Count,
    pub(super) steered: Steered,
    dropped_bytes: u64,
    interfaces_failed: bool,
}

impl State {
    pub(super) fn new(interfaces: Interfaces, scavenger: Scavenger) -> Self {
        Self {
            paths: HashMap::new(),
            interfaces,
            scavenger,
            allowance: Allowance::default(),
            totals: InterfaceTotals::default(),
            own: Count::default(),
            steered: Steered::default(),
            dropped_bytes: 0,
            interfaces_failed: false,
        }
    }

    pub(super) fn estimate(&self, node: &NodeId, now: Duration) -> Option<PathEstimate> {
        let entry = self.paths.values().find(|entry| entry.node == *node)?;
        Some(entry.path.estimate(now))
    }

    pub(super) fn of(&self, address: &SocketAddr, now: Duration) -> Option<(&Entry, PathEstimate)> {
        let entry = self.paths.get(address)?;
        Some((entry, entry.path.estimate(now)))
    }
}

impl Entry {
    fn new(node: NodeId) -> Self {
        Self {
            node,
            path: Path::default(),
            last: None,
            busy: Duration::ZERO,
            inbound_bytes_per_s: 0.0,
            outbound_bytes_per_s: 0.0,
        }
    }

    /// Takes a reading; what more was sent since the one before.
    fn take(&mut self, mut reading: Reading, busy: Duration) -> Count {
        let last = self.last.unwrap_or(Reading {
            at: reading.at,
            ..Reading::default()
        });
        let took = reading.at.saturating_sub(last.at);
        let was_busy = busy.saturating_sub(self.busy);
        self.busy = busy;
        reading.is_wanted = !took.is_zero() && was_busy >= took.mul_f64(WANTED_RATIO);
        self.path.take(&reading);
        let more = |now: &Count, before: &Count| Count {
            payload_bytes: now.payload_bytes.saturating_sub(before.payload_bytes),
            wire_bytes: now.wire_bytes.saturating_sub(before.wire_bytes),
            datagrams: now.datagrams.saturating_sub(before.datagrams),
        };
        let (sent, received) = (
            more(&reading.sent, &last.sent),
            more(&reading.received, &last.received),
        );
        if !took.is_zero() {
            let show = |shown: &mut f64, bytes: u64| {
                *shown += (bytes as f64 / took.as_secs_f64() - *shown) * SHOWN_WEIGHT;
            };
            show(&mut self.inbound_bytes_per_s, received.wire_bytes);
            show(&mut self.outbound_bytes_per_s, sent.wire_bytes);
        }
        self.last = Some(reading);
        sent
    }
}

/// QUIC's view of all connections with one address as one path.
fn joined(stats: &[PathStats]) -> (QuicView, Count, Count) {
    let mut view = QuicView::default();
    let (mut received, mut sent) = (Count::default(), Count::default());
    let mut widest = 0;
    for one in stats {
        view.cwnd_bytes += one.cwnd;
        view.sent_packets += one.sent_packets;
        view.lost_packets += one.lost_packets;
        view.received_bytes += one.received_bytes;
        if one.cwnd >= widest {
            widest = one.cwnd;
            view.rtt = one.rtt;
        }
        received.payload_bytes += one.received_bytes;
        received.datagrams += one.received_datagrams;
        sent.payload_bytes += one.sent_bytes;
        sent.datagrams += one.sent_datagrams;
    }
    (view, received, sent)
}

impl Meter {
    /// Looks at everything once.
    pub(super) fn sample(&self, peers: &Peers, metrics: &Metrics) {
        let mut by_address: HashMap<SocketAddr, (NodeId, Vec<PathStats>)> = HashMap::new();
        for (node, address, stats) in peers.links() {
            let entry = by_address.entry(address);
            entry.or_insert((node, Vec::new())).1.push(stats);
        }
        let mut state = self.state.lock();
        state
            .paths
            .retain(|address, _| by_address.contains_key(address));
        for (address, (node, stats)) in by_address {
            let (quic, received, sent) = joined(&stats);
            let reading = self.reading(address, quic, received, sent);
            let busy = peers.paths().busy_in_all(&node);
            let entry = state
                .paths
                .entry(address)
                .or_insert_with(|| Entry::new(node));
            let more = entry.take(reading, busy);
            state.own.payload_bytes += more.payload_bytes;
            state.own.wire_bytes += more.wire_bytes;
            state.own.datagrams += more.datagrams;
        }
        self.look_at_host(&mut state);
        self.report(&mut state, metrics);
        let limit = state.allowance.bytes_per_s;
        drop(state);
        self.paces.lock().all.set(limit);
    }

    /// The kernel's counts where there are any, else QUIC's with the headers that they leave out.
    fn reading(
        &self,
        address: SocketAddr,
        quic: QuicView,
        received: Count,
        sent: Count,
    ) -> Reading {
        let kernel = self.kernel.lock();
        let counted = kernel.as_ref().map(|kernel| kernel.traffic(address));
        drop(kernel);
        let headers: u64 = if address.is_ipv4() { 28 } else { 48 };
        let with_headers = |count: Count| Count {
            wire_bytes: count.payload_bytes + count.datagrams * headers,
            ..count
        };
        let reading = Reading {
            at: self.now(),
            quic,
            ..Reading::default()
        };
        match counted {
            Some(Ok(traffic)) => {
                let traffic = traffic.unwrap_or_default();
                Reading {
                    received: count(address, &traffic.received),
                    sent: count(address, &traffic.sent),
                    is_kernel: true,
                    ..reading
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%address, %error, "this time by QUIC's counts");
                Reading {
                    received: with_headers(received),
                    sent: with_headers(sent),
                    ..reading
                }
            }
            None => Reading {
                received: with_headers(received),
                sent: with_headers(sent),
                ..reading
            },
        }
    }

    fn look_at_host(&self, state: &mut State) {
        match state.interfaces.read() {
            Ok(totals) => {
                state.totals = totals;
                state.interfaces_failed = false;
                let reading = HostReading {
                    at: self.now(),
                    interface_bytes: totals.sent_bytes,
                    own: state.own,
                };
                state.allowance = state.scavenger.take(&reading);
            }
            // What is allowed stays as it was. Said once, as it would be true ten times a second.
            Err(error) if !state.interfaces_failed => {
                tracing::warn!(%error, "the totals of the interfaces cannot be read");
                state.interfaces_failed = true;
            }
            Err(_) => {}
        }
    }

    fn report(&self, state: &mut State, metrics: &Metrics) {
        let now = self.now();
        let (mut silent, mut dropped) = (0, 0);
        for entry in state.paths.values() {
            let estimate = entry.path.estimate(now);
            silent += i64::from(estimate.is_silent);
            dropped += estimate.dropped_bytes;
        }
        metrics.paths_silent.set(silent);
        // Paths that are gone take theirs with them, and what comes and goes is no loss.
        metrics
            .socket_dropped
            .inc_by(dropped.saturating_sub(state.dropped_bytes));
        state.dropped_bytes = state.dropped_bytes.max(dropped);
        let allowance = &state.allowance;
        metrics.others_sent_rate.set(allowance.others_bytes_per_s);
        metrics
            .send_limit_rate
            .set(allowance.bytes_per_s.unwrap_or(0.0));
        let steered = self.kernel.lock().as_ref().map(|kernel| kernel.steered());
        let Some(Ok(steered)) = steered else { return };
        for (outcome, now, before) in [
            ("by_id", steered.by_id, state.steered.by_id),
            ("by_hash", steered.by_hash, state.steered.by_hash),
            ("refused", steered.refused, state.steered.refused),
        ] {
            metrics
                .steered_batches
                .get_or_create(&OutcomeLabel { outcome })
                .inc_by(now.saturating_sub(before));
        }
        state.steered = steered;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_connections_with_one_address_are_one_path() {
        let stats = |cwnd, rtt_ms| PathStats {
            cwnd,
            rtt: Duration::from_millis(rtt_ms),
            sent_bytes: 10,
            sent_datagrams: 1,
            ..PathStats::default()
        };
        let (view, _, sent) = joined(&[stats(100, 3), stats(900, 7), stats(200, 5)]);
        assert_eq!(view.cwnd_bytes, 1200);
        assert_eq!(view.rtt, Duration::from_millis(7), "of the widest");
        assert_eq!((sent.payload_bytes, sent.datagrams), (30, 3));
    }

    #[test]
    fn a_path_is_wanted_only_if_requests_were_under_way_all_the_time() {
        let mut entry = Entry::new(NodeId::new([1; 32]));
        let mut wanted = Vec::new();
        let mut busy_ms = 0;
        for (tick, ms) in [0, 100, 95, 50, 0, 100].into_iter().enumerate() {
            busy_ms += ms;
            let at = Duration::from_millis(100 * (tick as u64 + 1));
            let reading = Reading {
                at,
                ..Reading::default()
            };
            entry.take(reading, Duration::from_millis(busy_ms));
            wanted.push(entry.last.expect("taken").is_wanted);
        }
        assert_eq!(wanted, [false, true, true, false, false, true]);
    }
}
