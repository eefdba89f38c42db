//! Which links lie between two peers.

use super::{Boundary, Input, NodeInput};
use crate::network::{LinkId, Network, PATH_LINKS_MAX};

/// Where a transfer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The registry, outside of all racks and zones.
    Registry,
    /// A peer, by number.
    Peer(u32),
}

/// The links that a transfer crosses.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    links: [LinkId; PATH_LINKS_MAX],
    length: usize,
}

impl Path {
    /// The links, from the source on.
    #[must_use]
    pub fn links(&self) -> &[LinkId] {
        &self.links[..self.length]
    }

    fn push(&mut self, link: Option<LinkId>) {
        if let Some(link) = link {
            self.links[self.length] = link;
            self.length += 1;
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Doors {
    inward: Option<LinkId>,
    outward: Option<LinkId>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    up: LinkId,
    down: LinkId,
    rack: u32,
    zone: u32,
}

/// The links of the registry, of the peers, and of their racks and zones.
#[derive(Clone, Debug)]
pub struct Topology {
    registry: LinkId,
    places: Vec<Place>,
    racks: Vec<Doors>,
    zones: Vec<Doors>,
}

impl Topology {
    /// Adds the links of an input to the network: one peer for each node, and behind them one for each
    /// of `more`, the seeds and origins that a policy brings along.
    pub fn new(input: &Input, more: &[NodeInput], network: &mut Network) -> Self {
        let registry = network.add_link(input.registry_bytes_per_s);
        let mut place = |node: &NodeInput| Place {
            up: network.add_link(node.up_bytes_per_s),
            down: network.add_link(node.down_bytes_per_s),
            rack: node.rack,
            zone: node.zone,
        };
        let places = input.nodes.iter().chain(more).map(&mut place).collect();
        let mut doors = |boundary: &Boundary| Doors {
            inward: boundary
                .in_bytes_per_s
                .is_finite()
                .then(|| network.add_link(boundary.in_bytes_per_s)),
            outward: boundary
                .out_bytes_per_s
                .is_finite()
                .then(|| network.add_link(boundary.out_bytes_per_s)),
        };
        let racks = input.racks.iter().map(&mut doors).collect();
        let zones = input.zones.iter().map(&mut doors).collect();
        Self {
            registry,
            places,
            racks,
            zones,
        }
    }

    /// The link out of the registry.
    #[must_use]
    pub fn registry(&self) -> LinkId {
        self.registry
    }

    /// The uplink of a peer.
    #[must_use]
    pub fn up(&self, peer: u32) -> LinkId {
        self.places[peer as usize].up
    }

    /// The links from a source to a peer.
    #[must_use]
    pub fn path(&self, from: Source, to: u32) -> Path {
        let to = &self.places[to as usize];
        let mut path = Path {
            links: [to.down; PATH_LINKS_MAX],
            length: 0,
        };
        let (rack, zone) = match from {
            Source::Registry => {
                path.push(Some(self.registry));
                (true, true)
            }
            Source::Peer(from) => {
                let from = &self.places[from as usize];
                path.push(Some(from.up));
                let (rack, zone) = (from.rack != to.rack, from.zone != to.zone);
                if rack {
                    path.push(
                        self.racks
                            .get(from.rack as usize)
                            .and_then(|doors| doors.outward),
                    );
                }
                if zone {
                    path.push(
                        self.zones
                            .get(from.zone as usize)
                            .and_then(|doors| doors.outward),
                    );
                }
                (rack, zone)
            }
        };
        if zone {
            path.push(
                self.zones
                    .get(to.zone as usize)
                    .and_then(|doors| doors.inward),
            );
        }
        if rack {
            path.push(
                self.racks
                    .get(to.rack as usize)
                    .and_then(|doors| doors.inward),
            );
        }
        path.push(Some(to.down));
        path
    }

    /// Whether two peers share a rack.
    #[must_use]
    pub fn same_rack(&self, one: u32, other: u32) -> bool {
        self.places[one as usize].rack == self.places[other as usize].rack
    }

    /// Whether two peers share a zone.
    #[must_use]
    pub fn same_zone(&self, one: u32, other: u32) -> bool {
        self.places[one as usize].zone == self.places[other as usize].zone
    }
}
