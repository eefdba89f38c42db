//! What the node counts, and how it is named outside.
//!
//! The names are listed in `docs/metrics.md`; a test keeps the two in step. Every counter answers
//! one of two questions: where did the bytes come from, and what is slow.

use std::sync::atomic::AtomicU64;

use pantala_wire::NodeId;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Where bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Origin {
    /// The registry, or another source.
    Source,
    /// Another node.
    Peer,
    /// This node's disk.
    Local,
    /// The registry, past the store: the blob could not be stored.
    Passthrough,
}

/// Label: where bytes came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OriginLabel {
    /// The origin.
    pub origin: Origin,
}

/// Label: the outcome of something, as a short word from a closed set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// A word such as `ok`, `timeout`, `refused`.
    pub outcome: &'static str,
}

/// Label: one kind of HTTP request and how it was answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    /// `blob`, `manifest`, `tunnel`, ...
    pub kind: &'static str,
    /// The status, by its first digit: `2xx`, `4xx`, ...
    pub status: &'static str,
}

/// Everything the node counts.
pub struct Metrics {
    registry: Registry,
    /// Blob bytes that arrived from a source or a peer, or were read locally for a client.
    pub blob_received: Family<OriginLabel, Counter>,
    /// Blob bytes sent to clients.
    pub client_sent: Counter,
    /// Blob bytes sent to peers.
    pub peer_sent: Counter,
    /// Manifest and other non-blob bytes from registries.
    pub registry_other: Counter,
    /// Requests of clients.
    pub mirror_requests: Family<RequestLabel, Counter>,
    /// Clients connected.
    pub mirror_connections: Gauge,
    /// Seconds from a client's blob request to its first byte.
    pub first_byte: Histogram,
    /// Answers to "may this caller read this blob": from the cache or from the registry.
    pub verdicts: Family<OutcomeLabel, Counter>,
    /// Requests to parents, by outcome.
    pub peer_requests: Family<OutcomeLabel, Counter>,
    /// Requests of peers for pieces, by outcome.
    pub peer_served: Family<OutcomeLabel, Counter>,
    /// Requests to sources, by outcome.
    pub source_requests: Family<OutcomeLabel, Counter>,
    /// Seconds that a piece took from a parent.
    pub peer_piece: Histogram,
    /// Seconds that a run of pieces took from the source.
    pub source_run: Histogram,
    /// Seconds that a write of groups to the store took, hashing included.
    pub store_write: Histogram,
    /// Blobs whose download is going on.
    pub tasks_active: Gauge,
    /// Downloads that ended, by outcome.
    pub tasks_ended: Family<OutcomeLabel, Counter>,
    /// Peers that sent or vouched for wrong bytes.
    pub liars: Counter,
    /// Pieces that had rotted on disk, or were in doubt after a crash, and were dropped.
    pub pieces_dropped: Counter,
    /// Whether control answers (1) or the node is on its own (0).
    pub control_connected: Gauge,
    /// Connected peers.
    pub peers_connected: Gauge,
    /// Whether the kernel counts the traffic of peers (1) or QUIC does (0).
    pub meter_kernel: Gauge,
    /// Peers that do not answer.
    pub paths_silent: Gauge,
    /// Bytes that arrived and were dropped as the socket's buffer was full.
    pub socket_dropped: Counter,
    /// Batches of datagrams steered to threads, by how.
    pub steered_batches: Family<OutcomeLabel, Counter>,
    /// Bytes a second that everything else on the machine sends.
    pub others_sent_rate: Gauge<f64, AtomicU64>,
    /// Bytes a second that this node keeps to; 0 for no limit.
    pub send_limit_rate: Gauge<f64, AtomicU64>,
    /// Bytes of blobs on disk.
    pub store_used: Gauge<i64, std::sync::atomic::AtomicI64>,
    /// Bytes that blobs may take on disk.
    pub store_limit: Gauge<f64, AtomicU64>,
    /// Images mounted before their data has arrived, and still there.
    pub lazy_mounts: Gauge,
    /// Fills that a reader of a lazy mount waited for, by where the bytes were.
    pub lazy_fills: Family<OutcomeLabel, Counter>,
    /// Seconds that such a fill took.
    pub lazy_fill: Histogram,
}

impl Metrics {
    /// All at zero, registered under their names.
    pub fn new() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let mut metrics = Self {
            registry: Registry::default(),
            blob_received: Family::default(),
            client_sent: Counter::default(),
            peer_sent: Counter::default(),
            registry_other: Counter::default(),
            mirror_requests: Family::default(),
            mirror_connections: Gauge::default(),
            first_byte: seconds(),
            verdicts: Family::default(),
            peer_requests: Family::default(),
            peer_served: Family::default(),
            source_requests: Family::default(),
            peer_piece: seconds(),
            source_run: seconds(),
            store_write: seconds(),
            tasks_active: Gauge::default(),
            tasks_ended: Family::default(),
            liars: Counter::default(),
            pieces_dropped: Counter::default(),
            control_connected: Gauge::default(),
            peers_connected: Gauge::default(),
            meter_kernel: Gauge::default(),
            paths_silent: Gauge::default(),
            socket_dropped: Counter::default(),
            steered_batches: Family::default(),
            others_sent_rate: Gauge::default(),
            send_limit_rate: Gauge::default(),
            store_used: Gauge::default(),
            store_limit: Gauge::default(),
            lazy_mounts: Gauge::default(),
            lazy_fills: Family::default(),
            lazy_fill: Histogram::new(exponential_buckets(0.000_016, 2.0, 22)),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        // Names are given whole, with their unit, so that a search for one finds it here.
        r.register(
            "pantala_blob_received_bytes",
            "Blob bytes by origin",
            self.blob_received.clone(),
        );
        r.register(
            "pantala_client_sent_bytes",
            "Blob bytes sent to clients",
            self.client_sent.clone(),
        );
        r.register(
            "pantala_peer_sent_bytes",
            "Blob bytes sent to peers",
            self.peer_sent.clone(),
        );
        r.register(
            "pantala_registry_other_bytes",
            "Manifest and other bytes from registries",
            self.registry_other.clone(),
        );
        r.register(
            "pantala_mirror_requests",
            "Requests of clients",
            self.mirror_requests.clone(),
        );
        r.register(
            "pantala_mirror_connections",
            "Clients connected",
            self.mirror_connections.clone(),
        );
        r.register(
            "pantala_first_byte_seconds",
            "From a client's blob request to its first byte",
            self.first_byte.clone(),
        );
        r.register(
            "pantala_verdicts",
            "Checks whether a caller may read, by how they ended",
            self.verdicts.clone(),
        );
        r.register(
            "pantala_peer_requests",
            "Requests to parents, by outcome",
            self.peer_requests.clone(),
        );
        r.register(
            "pantala_peer_served",
            "Requests of peers for pieces, by outcome",
            self.peer_served.clone(),
        );
        r.register(
            "pantala_source_requests",
            "Requests to sources, by outcome",
            self.source_requests.clone(),
        );
        r.register(
            "pantala_peer_piece_seconds",
            "Time of a piece from a parent",
            self.peer_piece.clone(),
        );
        r.register(
            "pantala_source_run_seconds",
            "Time of a run of pieces from the source",
            self.source_run.clone(),
        );
        r.register(
            "pantala_store_write_seconds",
            "Time of a write to the store, with hashing",
            self.store_write.clone(),
        );
        r.register(
            "pantala_tasks_active",
            "Downloads going on",
            self.tasks_active.clone(),
        );
        r.register(
            "pantala_tasks_ended",
            "Downloads that ended, by outcome",
            self.tasks_ended.clone(),
        );
        r.register(
            "pantala_liars",
            "Peers found to have sent or vouched for wrong bytes",
            self.liars.clone(),
        );
        r.register(
            "pantala_pieces_dropped",
            "Stored pieces found wrong and dropped",
            self.pieces_dropped.clone(),
        );
        r.register(
            "pantala_control_connected",
            "1 while control answers",
            self.control_connected.clone(),
        );
        r.register(
            "pantala_peers_connected",
            "Connected peers",
            self.peers_connected.clone(),
        );
        r.register(
            "pantala_meter_kernel",
            "1 where the kernel counts the traffic of peers",
            self.meter_kernel.clone(),
        );
        r.register(
            "pantala_paths_silent",
            "Peers that do not answer what they are sent",
            self.paths_silent.clone(),
        );
        r.register(
            "pantala_socket_dropped_bytes",
            "Bytes from peers that a full socket buffer dropped",
            self.socket_dropped.clone(),
        );
        r.register(
            "pantala_steered_batches",
            "Batches of datagrams steered to threads, by how",
            self.steered_batches.clone(),
        );
        r.register(
            "pantala_others_sent_bytes_per_second",
            "Sent by everything else on the machine",
            self.others_sent_rate.clone(),
        );
        r.register(
            "pantala_send_limit_bytes_per_second",
            "What sending keeps to; 0 for no limit",
            self.send_limit_rate.clone(),
        );
        r.register(
            "pantala_store_used_bytes",
            "Bytes of blobs on disk",
            self.store_used.clone(),
        );
        r.register(
            "pantala_store_limit_bytes",
            "Bytes that blobs may take on disk",
            self.store_limit.clone(),
        );
        r.register(
            "pantala_lazy_mounts",
            "Images mounted before their data has arrived",
            self.lazy_mounts.clone(),
        );
        r.register(
            "pantala_lazy_fills",
            "Fills that a reader of a lazy mount waited for, by where the bytes were",
            self.lazy_fills.clone(),
        );
        r.register(
            "pantala_lazy_fill_seconds",
            "How long readers of lazy mounts waited for a fill",
            self.lazy_fill.clone(),
        );
    }

    /// Adds blob bytes that came from `origin`.
    pub fn received(&self, origin: Origin, bytes: u64) {
        self.blob_received
            .get_or_create(&OriginLabel { origin })
            .inc_by(bytes);
    }

    /// Blob bytes that came from `origin` so far.
    pub fn received_bytes(&self, origin: Origin) -> u64 {
        self.blob_received
            .get_or_create(&OriginLabel { origin })
            .get()
    }

    /// All metrics in the text format of Prometheus.
    pub fn text(&self) -> String {
        let mut out = String::new();
        match text::encode(&mut out, &self.registry) {
            Ok(()) => out,
            // Formatting into a String cannot fail; if it ever does, an empty page would hide it.
            Err(error) => format!("# metrics could not be written: {error}\n"),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes received from each peer, for `status`; at most [`PEERS_COUNTED_MAX`] are told apart.
#[derive(Default)]
pub struct ByPeer(parking_lot::Mutex<std::collections::HashMap<NodeId, u64>>);

/// Peers whose bytes are counted one by one: more than a node ever talks to for one blob, and a
/// bound on what a flood of identities can make it remember.
pub const PEERS_COUNTED_MAX: usize = 4096;

impl ByPeer {
    /// Adds `bytes` to what came from `peer`.
    pub fn add(&self, peer: NodeId, bytes: u64) {
        let mut counts = self.0.lock();
        if counts.len() < PEERS_COUNTED_MAX || counts.contains_key(&peer) {
            *counts.entry(peer).or_default() += bytes;
        }
    }

    /// What came from each peer.
    pub fn snapshot(&self) -> std::collections::BTreeMap<NodeId, u64> {
        self.0.lock().iter().map(|(k, v)| (*k, *v)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown_under_its_name() {
        let metrics = Metrics::new();
        metrics.received(Origin::Peer, 7);
        metrics.received(Origin::Peer, 3);
        let text = metrics.text();
        assert!(
            text.contains("pantala_blob_received_bytes_total{origin=\"Peer\"} 10"),
            "{text}"
        );
        assert_eq!(metrics.received_bytes(Origin::Source), 0);
    }
}
