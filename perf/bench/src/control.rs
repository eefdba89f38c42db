//! The core of control under load: what a decision costs, and what a membership takes in memory.
//!
//! No sockets and no clock of the core's own: messages go in and answers come out, on one core. Every
//! node is in a task of its image's hot layer, which all have, and in some of many others.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, ToNode};
use pantala_control::{Labels, PathReport};
use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceRun};
use serde_json::json;

use crate::latency::Noise;

/// Tasks of one node: the hot one, and some of its own.
const TASKS_PER_NODE: usize = 5;
/// Pieces of a blob.
const PIECE_COUNT: u32 = 256;
const PIECE_BYTES: u64 = 1 << 20;
/// Nodes to a rack, racks to a zone.
const RACK_NODES: usize = 40;
const ZONE_RACKS: usize = 25;

/// How large a cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct ControlArguments {
    #[arg(long)]
    nodes: usize,
    /// Messages of the steady mix
    #[arg(long, default_value_t = 300_000)]
    messages: usize,
}

fn node(number: usize) -> NodeId {
    let mut bytes = [3; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    // Names are keys: nothing of their order means anything.
    bytes[8..16].copy_from_slice(
        &(number as u64)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes(),
    );
    NodeId::new(bytes)
}

fn number(node: &NodeId) -> usize {
    let bytes = node.as_bytes().first_chunk().map_or([0; 8], |bytes| *bytes);
    u64::from_le_bytes(bytes) as usize
}

fn blob(number: usize) -> BlobDigest {
    let mut bytes = [7; 32];
    let mixed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bytes[..8].copy_from_slice(&mixed.to_le_bytes());
    BlobDigest::new(bytes)
}

/// What one kind of message has cost, in nanoseconds.
#[derive(Default)]
struct Costs(BTreeMap<&'static str, Vec<u32>>);

impl Costs {
    fn summary(&mut self) -> serde_json::Value {
        let kinds = self
            .0
            .iter_mut()
            .map(|(name, samples)| (((*name).to_owned()), summary(samples)));
        serde_json::Value::Object(kinds.collect())
    }
    fn all(&self) -> Vec<u32> {
        self.0.values().flatten().copied().collect()
    }
}

fn summary(samples: &mut [u32]) -> serde_json::Value {
    samples.sort_unstable();
    let at = |share: f64| {
        let index = ((samples.len() as f64 - 1.0) * share).max(0.0) as usize;
        f64::from(samples.get(index).copied().unwrap_or(0)) / 1000.0
    };
    let sum: u64 = samples.iter().map(|&ns| u64::from(ns)).sum();
    json!({
        "count": samples.len(),
        "mean_us": sum as f64 / 1000.0 / samples.len().max(1) as f64,
        "p50_us": at(0.5),
        "p99_us": at(0.99),
        "max_us": at(1.0),
    })
}

/// Memory of this process that is in use.
fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text
        .split(' ')
        .nth(1)
        .context("a short /proc/self/statm")?
        .parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

struct Load {
    core: Core,
    now: Duration,
    noise: Noise,
    node_count: usize,
    task_count: usize,
    /// Of each membership, a parent it was told of, or `u32::MAX`.
    parents: Vec<u32>,
    /// Of each membership, the run last leased.
    leases: Vec<(u32, u32)>,
    costs: Costs,
    out: Vec<(NodeId, ToNode)>,
}

impl Load {
    fn new(node_count: usize) -> Self {
        let config = CoreConfig {
            nodes_max: node_count,
            ..CoreConfig::default()
        };
        Self {
            core: Core::new(config, Duration::ZERO),
            now: Duration::from_secs(60),
            noise: Noise::new(11),
            node_count,
            task_count: (node_count / 500).max(10),
            parents: vec![u32::MAX; node_count * TASKS_PER_NODE],
            leases: vec![(1, 1); node_count * TASKS_PER_NODE],
            costs: Costs::default(),
            out: Vec::new(),
        }
    }

    /// The task of a node's `place`: 0 is the hot one.
    fn task(&self, number: usize, place: usize) -> usize {
        match place {
            0 => 0,
            // Neighbouring places are different tasks.
            _ => {
                1 + (number * 7 + place * (self.task_count / TASKS_PER_NODE))
                    % (self.task_count - 1)
            }
        }
    }
    fn place(&self, number: usize, digest: &BlobDigest) -> Option<usize> {
        (0..TASKS_PER_NODE).find(|&place| blob(self.task(number, place)) == *digest)
    }

    fn send(&mut self, kind: &'static str, number: usize, message: FromNode) {
        let id = node(number);
        let started = Instant::now();
        self.core.handle(self.now, id, message, &mut self.out);
        let took = started.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32;
        self.costs.0.entry(kind).or_default().push(took);
        for (to, message) in std::mem::take(&mut self.out) {
            let to = self::number(&to);
            match message {
                ToNode::Parents { digest, peers } => {
                    if let (Some(place), Some(peer)) = (self.place(to, &digest), peers.first()) {
                        self.parents[to * TASKS_PER_NODE + place] = self::number(&peer.node) as u32;
                    }
                }
                ToNode::Lease { digest, pieces, .. } => {
                    if let Some(place) = self.place(to, &digest) {
                        self.leases[to * TASKS_PER_NODE + place] = (pieces.first, pieces.count);
                    }
                }
                _ => {}
            }
        }
    }

    fn join(&mut self) {
        for number in 0..self.node_count {
            let ip = Ipv4Addr::from(0x0a00_0000 + number as u32);
            let rack = number / RACK_NODES;
            let info = NodeInfo {
                address: SocketAddr::new(IpAddr::V4(ip), 4006),
                labels: Labels {
                    host: format!("node-{number}"),
                    rack: format!("rack-{rack}"),
                    zone: format!("zone-{}", rack / ZONE_RACKS),
                },
                resumed: false,
                ..NodeInfo::default()
            };
            self.core
                .joined(self.now, node(number), info, &mut self.out);
            self.out.clear();
        }
    }

    fn open(&mut self, number: usize, place: usize) {
        let message = FromNode::OpenTask {
            digest: blob(self.task(number, place)),
            size_bytes: u64::from(PIECE_COUNT) * PIECE_BYTES,
            has_source: true,
            held: Vec::new(),
            complete: false,
        };
        self.send("open", number, message);
    }

    /// Everybody wants everything at the same moment, as when a job starts on all nodes.
    fn open_all(&mut self) {
        for place in 0..TASKS_PER_NODE {
            for at in 0..self.node_count {
                // Neighbours in a rack do not come one after the other.
                let number = (at * 7919) % self.node_count;
                self.open(number, place);
            }
        }
    }

    fn ask(&mut self, number: usize, place: usize) {
        let first = self.noise.below(u64::from(PIECE_COUNT)) as u32;
        let message = FromNode::AskLease {
            digest: blob(self.task(number, place)),
            wanted: vec![PieceRun {
                first: 0,
                count: PIECE_COUNT,
            }],
            urgent: Some(PieceIndex(first)),
        };
        self.send("ask_lease", number, message);
    }

    /// One message of the steady mix.
    fn step(&mut self) {
        self.now += Duration::from_micros(20);
        let number = self.noise.below(self.node_count as u64) as usize;
        let place = self.noise.below(TASKS_PER_NODE as u64) as usize;
        let digest = blob(self.task(number, place));
        match self.noise.below(100) {
            0..55 => {
                let first = self.noise.below(u64::from(PIECE_COUNT - 4)) as u32;
                let count = 1 + self.noise.below(4) as u32;
                let message = FromNode::Holding {
                    digest,
                    runs: vec![PieceRun { first, count }],
                    complete: false,
                };
                self.send("holding", number, message);
            }
            55..75 => self.ask(number, place),
            75..90 => {
                let (first, count) = self.leases[number * TASKS_PER_NODE + place];
                let message = FromNode::Fetched {
                    digest,
                    pieces: vec![PieceRun { first, count }],
                };
                self.send("fetched", number, message);
            }
            90..93 => {
                let paths = &self.parents[number * TASKS_PER_NODE..(number + 1) * TASKS_PER_NODE];
                let paths = paths.iter().filter(|&&parent| parent != u32::MAX);
                let reports = paths
                    .map(|&parent| PathReport {
                        node: node(parent as usize),
                        bytes: 1 << 27,
                        busy: Duration::from_secs(2),
                        failures: 0,
                    })
                    .collect();
                self.send("paths", number, FromNode::Paths { reports });
            }
            93..96 => {
                let parent = self.parents[number * TASKS_PER_NODE + place];
                if parent != u32::MAX {
                    let message = FromNode::ParentFailed {
                        digest,
                        node: node(parent as usize),
                    };
                    self.send("parent_failed", number, message);
                }
            }
            _ => {
                self.send("close", number, FromNode::CloseTask { digest });
                self.open(number, place);
            }
        }
        if self.core.next_timeout().is_some_and(|at| at <= self.now) {
            let started = Instant::now();
            self.core.tick(self.now, &mut self.out);
            let took = started.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32;
            self.costs.0.entry("tick").or_default().push(took);
            self.out.clear();
        }
    }
}

/// Measures, and prints one line.
pub(crate) fn run(arguments: &ControlArguments) -> Result<()> {
    ensure!(arguments.nodes >= 100, "too few nodes to say anything");
    let mut load = Load::new(arguments.nodes);
    let before = resident_bytes()?;
    load.join();
    let joined = resident_bytes()?;
    load.open_all();
    for place in 0..TASKS_PER_NODE {
        for number in 0..arguments.nodes.min(2000) {
            load.ask(number, place);
        }
    }
    for _ in 0..arguments.messages {
        load.step();
    }
    // The samples are in memory too.
    let samples: usize = load.costs.0.values().map(Vec::capacity).sum();
    let full = resident_bytes()?.saturating_sub(samples as u64 * 4);
    let memberships = load.core.status().memberships;
    let mut all = load.costs.all();
    let total = summary(&mut all);
    let line = json!({
        "nodes": arguments.nodes,
        "memberships": memberships,
        "node_bytes": (joined - before) as f64 / arguments.nodes as f64,
        "membership_bytes": full.saturating_sub(joined) as f64 / memberships as f64,
        "kinds": load.costs.summary(),
        "all": total,
    });
    println!("{line}");
    Ok(())
}
