//! What others do, from their published rules, over the same [`crate::network`] as Pantala's own cores.
//!
//! Each policy takes one [`Input`] and gives one [`Outcome`]; the same input gives the same outcome. The
//! rules are re-implemented from what their projects have published. Where a rule is not published, the
//! choice here is the one that makes the policy faster, and a comment says so: messages cost no bytes and
//! nodes no CPU, a dead peer is noticed at once, and what a peer holds is known to its neighbours at once.
//! So a policy does here at least as well as in the field.

pub mod bittorrent;
pub mod dragonfly;
mod engine;
pub mod kraken;
mod mesh;
mod pieces;
pub mod registry_only;
mod topology;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use topology::{Path, Source, Topology};

const BITS_PER_BYTE: f64 = 8.0;
const BITS_PER_GBIT: f64 = 1e9;

/// What a rate in Gbit/s is in bytes per second.
#[must_use]
pub fn gbit_per_s(gbit: f64) -> f64 {
    gbit * BITS_PER_GBIT / BITS_PER_BYTE
}

/// A node that wants the blob.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInput {
    /// What it sends at most, in bytes per second.
    pub up_bytes_per_s: f64,
    /// What it receives at most, in bytes per second.
    pub down_bytes_per_s: f64,
    /// Its rack: an index of [`Input::racks`]. A rack that is not listed there has no limit.
    pub rack: u32,
    /// Its zone: an index of [`Input::zones`], as for racks.
    pub zone: u32,
    /// When it begins to want the blob.
    pub arrival: Duration,
}

/// The links of a rack or a zone to all that is outside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Boundary {
    /// What comes in at most, in bytes per second. An infinite one is no link.
    pub in_bytes_per_s: f64,
    /// What goes out at most, in bytes per second. An infinite one is no link.
    pub out_bytes_per_s: f64,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// A node is gone, with all that it holds.
    Died {
        /// When.
        at: Duration,
        /// An index of [`Input::nodes`].
        node: u32,
    },
    /// A node sends only this part of what it could at the start.
    Slowed {
        /// When.
        at: Duration,
        /// An index of [`Input::nodes`].
        node: u32,
        /// From zero to one; one heals it.
        up_factor: f64,
    },
}

/// One blob for many nodes: all that a policy is judged on.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// The size of the blob.
    pub blob_bytes: u64,
    /// What the registry sends at most, in bytes per second.
    pub registry_bytes_per_s: f64,
    /// The nodes that want it.
    pub nodes: Vec<NodeInput>,
    /// Limits of the racks, by number.
    pub racks: Vec<Boundary>,
    /// Limits of the zones, by number.
    pub zones: Vec<Boundary>,
    /// How long a message takes, one way.
    pub message_delay: Duration,
    /// The seed of all that is random.
    pub seed: u64,
    /// How often the network shares rates out anew at most; see [`crate::network::Network::new`].
    pub step: Duration,
    /// When the simulation ends, whoever has not finished.
    pub until: Duration,
    /// The width of the windows over which the registry's peak is measured.
    pub peak_window: Duration,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

/// A simulation ends after this much virtual time: past it a policy hangs, however slow the links.
const UNTIL: Duration = Duration::from_secs(24 * 3600);

/// The step for a few hundred nodes: a thousandth of the shortest transfer that is looked at.
const STEP: Duration = Duration::from_millis(1);

impl Input {
    /// Equal nodes, in one rack, that all come at once: the shape of the published benchmark.
    #[must_use]
    pub fn uniform(
        nodes: usize,
        blob_bytes: u64,
        registry_bytes_per_s: f64,
        node_bytes_per_s: f64,
    ) -> Self {
        let node = NodeInput {
            up_bytes_per_s: node_bytes_per_s,
            down_bytes_per_s: node_bytes_per_s,
            rack: 0,
            zone: 0,
            arrival: Duration::ZERO,
        };
        Self {
            blob_bytes,
            registry_bytes_per_s,
            nodes: vec![node; nodes],
            racks: Vec::new(),
            zones: Vec::new(),
            message_delay: Duration::from_micros(500),
            seed: 1,
            step: STEP,
            until: UNTIL,
            peak_window: Duration::from_secs(1),
            faults: Vec::new(),
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The name of the policy.
    pub policy: &'static str,
    /// When each node had the whole blob, since the start of the simulation; none for one that died
    /// first or that did not finish.
    pub finished: Vec<Option<Duration>>,
    /// Which nodes died before they finished.
    pub died: Vec<bool>,
    /// Bytes that left the registry.
    pub registry_bytes: u64,
    /// The highest mean rate out of the registry over one window, in bytes per second.
    pub registry_peak_bytes_per_s: f64,
    /// Bytes between peers of different racks. What comes from the registry does not count.
    pub rack_crossing_bytes: u64,
    /// Bytes between peers of different zones, as for racks.
    pub zone_crossing_bytes: u64,
    /// How many transfers were begun: the work of the simulation.
    pub transfers: u64,
}

impl Outcome {
    /// When the last node that lives had finished; none when one did not.
    #[must_use]
    pub fn makespan(&self) -> Option<Duration> {
        let living = self
            .finished
            .iter()
            .zip(&self.died)
            .filter(|(_, died)| !**died);
        living
            .map(|(finished, _)| *finished)
            .try_fold(Duration::ZERO, |latest, finished| {
                Some(latest.max(finished?))
            })
    }

    /// The instant by which this part of the finished nodes had finished, from 0 to 1, by nearest rank;
    /// none when no node has finished.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let mut finished: Vec<Duration> = self.finished.iter().flatten().copied().collect();
        finished.sort_unstable();
        let rank = (part * finished.len() as f64).ceil() as usize;
        finished
            .get(rank.clamp(1, finished.len().max(1)) - 1)
            .copied()
    }

    /// How many times the blob left the registry.
    #[must_use]
    pub fn copies(&self, blob_bytes: u64) -> f64 {
        self.registry_bytes as f64 / blob_bytes.max(1) as f64
    }
}
