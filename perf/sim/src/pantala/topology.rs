//! The links of a cluster, and which of them a flow takes.

use std::time::Duration;

use crate::network::{LinkId, Network};
use crate::scenario::{BYTES_PER_MBIT, Scenario};

/// The links of one node.
#[derive(Debug, Clone, Copy)]
struct Ports {
    up: LinkId,
    down: LinkId,
    rack: u32,
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    up: LinkId,
    down: LinkId,
}

/// Where everything stands.
#[derive(Debug)]
pub struct Topology {
    nodes: Vec<Ports>,
    racks: Vec<Pair>,
    /// The zone of each rack.
    zone_of: Vec<u32>,
    zones: Vec<Pair>,
    registry: LinkId,
}

impl Topology {
    /// Lays the scenario's links.
    pub fn new(scenario: &Scenario, network: &mut Network) -> Self {
        let registry = network.add_link(scenario.registry.mbit * BYTES_PER_MBIT);
        let mut topology = Self {
            nodes: Vec::new(),
            racks: Vec::new(),
            zone_of: Vec::new(),
            zones: Vec::new(),
            registry,
        };
        let pair = |network: &mut Network, mbit: f64| Pair {
            up: network.add_link(mbit * BYTES_PER_MBIT),
            down: network.add_link(mbit * BYTES_PER_MBIT),
        };
        let rack_count = scenario
            .racks
            .as_ref()
            .map_or(0, |racks| scenario.node_count().div_ceil(racks.nodes));
        if let Some(racks) = &scenario.racks {
            for rack in 0..rack_count {
                topology.racks.push(pair(network, racks.mbit));
                topology
                    .zone_of
                    .push(rack.checked_div(racks.per_zone).unwrap_or(0));
            }
            let zone_count = topology.zone_of.last().map_or(0, |zone| zone + 1);
            if racks.zone_mbit > 0.0 && racks.per_zone > 0 {
                for _ in 0..zone_count {
                    topology.zones.push(pair(network, racks.zone_mbit));
                }
            }
        }
        let mut index = 0;
        for group in &scenario.groups {
            for _ in 0..group.count {
                let rack = match &scenario.racks {
                    Some(racks) if racks.mixed => index % rack_count,
                    Some(racks) => index / racks.nodes,
                    None => 0,
                };
                topology.nodes.push(Ports {
                    up: network.add_link(group.up_mbit * BYTES_PER_MBIT),
                    down: network.add_link(group.down_mbit * BYTES_PER_MBIT),
                    rack,
                });
                index += 1;
            }
        }
        topology
    }

    /// The rack of a node; 0 where there are none.
    pub fn rack(&self, node: u32) -> u32 {
        self.nodes[node as usize].rack
    }
    /// The zone of a node; 0 where there are none.
    pub fn zone(&self, node: u32) -> u32 {
        self.zone_of
            .get(self.rack(node) as usize)
            .copied()
            .unwrap_or(0)
    }
    /// Whether there are racks to speak of.
    pub fn has_racks(&self) -> bool {
        !self.racks.is_empty()
    }
    /// The uplink of a node.
    pub fn uplink(&self, node: u32) -> LinkId {
        self.nodes[node as usize].up
    }
    /// The registry's uplink.
    pub fn registry(&self) -> LinkId {
        self.registry
    }

    /// From one node to another.
    pub fn path(&self, from: u32, to: u32) -> Vec<LinkId> {
        let (a, b) = (self.nodes[from as usize], self.nodes[to as usize]);
        let mut path = vec![a.up, b.down];
        if self.has_racks() && a.rack != b.rack {
            path.push(self.racks[a.rack as usize].up);
            path.push(self.racks[b.rack as usize].down);
            let (from, to) = (self.zone(from), self.zone(to));
            if !self.zones.is_empty() && from != to {
                path.push(self.zones[from as usize].up);
                path.push(self.zones[to as usize].down);
            }
        }
        path
    }

    /// From the registry, which stands outside of all zones, to a node.
    pub fn path_from_registry(&self, to: u32) -> Vec<LinkId> {
        let ports = self.nodes[to as usize];
        let mut path = vec![self.registry, ports.down];
        if self.has_racks() {
            path.push(self.racks[ports.rack as usize].down);
            if !self.zones.is_empty() {
                path.push(self.zones[self.zone(to) as usize].down);
            }
        }
        path
    }

    /// Bytes that have left racks, or zones, for others.
    pub fn crossed_bytes(&self, network: &Network) -> (f64, f64) {
        let sum = |pairs: &[Pair]| pairs.iter().map(|p| network.carried_bytes(p.up)).sum();
        (sum(&self.racks), sum(&self.zones))
    }

    /// A node's links carry so much from now on.
    pub fn slow_down(
        &self,
        network: &mut Network,
        now: Duration,
        node: u32,
        up_mbit: f64,
        down_mbit: f64,
    ) {
        let ports = self.nodes[node as usize];
        network.set_capacity(now, ports.up, up_mbit * BYTES_PER_MBIT);
        network.set_capacity(now, ports.down, down_mbit * BYTES_PER_MBIT);
    }
}
