//! What came of a run.

use std::time::Duration;

use super::{Counts, World};
use crate::check::Violation;
use crate::scenario::Habit;

/// Of those who are stuck, so many are named.
const STUCK_SHOWN_MAX: usize = 5;

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// The rule that was broken, if any was.
    pub violation: Option<Violation>,
    /// How long each pull took that a node lived to see the end of, in seconds, ascending.
    pub pulls_s: Vec<f64>,
    /// From the first pull's start to the last one's end, in seconds.
    pub makespan_s: f64,
    /// Pulls that ended with an error.
    pub failed: Vec<String>,
    /// Bytes that left the registry, in units of what was pulled, each blob counted once.
    pub copies: f64,
    /// The same in bytes.
    pub registry_bytes: f64,
    /// The highest rate of the registry over a tenth of a second, in bytes per second.
    pub registry_peak_bytes_per_s: f64,
    /// Bytes that crossed from rack to rack.
    pub rack_bytes: f64,
    /// Bytes that crossed from zone to zone.
    pub zone_bytes: f64,
    /// Events and finished flows.
    pub steps: u64,
    /// Inputs of downloads.
    pub inputs: u64,
    /// Messages to control.
    pub control_messages: u64,
    /// Pieces that came from peers, and from the registry.
    pub pieces: (u64, u64),
    /// Fetches from the registry without a lease.
    pub alone_fetches: u64,
    /// Second copies of requests.
    pub hedges: u64,
    /// Leases, and answers that there is none.
    pub leases: (u64, u64),
    /// Requests that a parent refused.
    pub refusals: u64,
    /// Bytes that arrived for nothing.
    pub wasted_bytes: u64,
    /// Pieces from peers and from the source in each step of the first ones.
    pub timeline: Vec<(u32, u32)>,
    /// Real time.
    pub took: Duration,
}

impl Report {
    /// The pull at `part` of all, by their time.
    pub fn quantile_s(&self, part: f64) -> f64 {
        let last = self.pulls_s.len().saturating_sub(1);
        let at = (part * last as f64).ceil() as usize;
        self.pulls_s.get(at).copied().unwrap_or(f64::NAN)
    }
}

impl World {
    /// Whether everything has ended as it must.
    pub(super) fn check_end(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let mut stuck = Vec::new();
        let mut failed = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            for state in &node.pulls {
                let blob = state.pull.blob;
                if state.done.is_none() {
                    let held = node.stores.get(&blob).map_or(0, |s| s.held.len());
                    stuck.push(format!("node {number} holds {held} pieces of blob {blob}"));
                }
                if let Some(why) = &state.failed
                    && node.habit == Habit::Honest
                    && node.has_source
                {
                    failed.push(format!("node {number}, blob {blob}: {why}"));
                }
            }
        }
        if let Some(text) = shown(&stuck) {
            self.breaks(Violation::new("ends", format!("not ended: {text}")));
        }
        if let Some(text) = shown(&failed) {
            self.breaks(Violation::new("finishes", format!("failed: {text}")));
        }
    }

    pub(super) fn report(self, took: Duration) -> Report {
        let mut pulls_s = Vec::new();
        let mut failed = Vec::new();
        let (mut first, mut last) = (Duration::MAX, Duration::ZERO);
        let mut wanted = vec![false; self.layouts.len()];
        for node in &self.nodes {
            for state in &node.pulls {
                wanted[state.pull.blob as usize] = true;
                let (Some(started), Some(done)) = (state.started, state.done) else {
                    continue;
                };
                if let Some(why) = &state.failed {
                    failed.push(why.clone());
                    continue;
                }
                first = first.min(started);
                last = last.max(done);
                pulls_s.push((done - started).as_secs_f64());
            }
        }
        pulls_s.sort_by(f64::total_cmp);
        let unique: u64 = self
            .layouts
            .iter()
            .zip(&wanted)
            .filter(|(_, wanted)| **wanted)
            .map(|(layout, _)| layout.blob_size())
            .sum();
        let registry_bytes = self.net.carried_bytes(self.topology.registry());
        let (rack_bytes, zone_bytes) = self.topology.crossed_bytes(&self.net);
        let Counts {
            steps,
            inputs,
            control_messages,
            pieces_from_peers,
            pieces_from_source,
            alone_fetches,
            wasted_bytes,
            hedges,
            refusals,
            leases,
            lease_waits,
            timeline,
            ..
        } = self.counts;
        Report {
            violation: self.broken,
            makespan_s: last.saturating_sub(first).as_secs_f64(),
            pulls_s,
            failed,
            copies: registry_bytes / unique.max(1) as f64,
            registry_bytes,
            registry_peak_bytes_per_s: self.net.peak_bytes_per_s(self.topology.registry()),
            rack_bytes,
            zone_bytes,
            steps,
            inputs,
            control_messages,
            pieces: (pieces_from_peers, pieces_from_source),
            alone_fetches,
            hedges,
            leases: (leases, lease_waits),
            refusals,
            wasted_bytes,
            timeline,
            took,
        }
    }
}

fn shown(texts: &[String]) -> Option<String> {
    let first = texts.iter().take(STUCK_SHOWN_MAX).cloned();
    let more = texts.len().saturating_sub(STUCK_SHOWN_MAX);
    match (texts.len(), more) {
        (0, _) => None,
        (_, 0) => Some(first.collect::<Vec<_>>().join("; ")),
        (_, more) => Some(format!(
            "{} and {more} more",
            first.collect::<Vec<_>>().join("; ")
        )),
    }
}
