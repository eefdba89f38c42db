//! What no policy can beat: the least time in which a blob can reach all nodes, from link capacities.
//!
//! Each part counts bytes over a cut of the network, so it holds whatever the policy does. With `B` the
//! blob, `N` the nodes that live, `T` the time at which the last of them has the blob, and `S(T)` what the
//! registry can have sent by then:
//!
//! - `S(T)`: all of the blob leaves the registry at least once, `B <= R * (T - first arrival)`. Where only
//!   `c` copies may leave it, `S(T) = min(c * B, R * (T - first arrival))`.
//! - Downlink: `B <= d_i * (T - a_i)` for each node `i` that arrives at `a_i`.
//! - Uploads: each node receives `B`, and what it receives somebody sends:
//!   `N * B <= S(T) + sum of u_i * max(T - a_i, 0)`.
//! - A group (a rack or a zone) of `n` nodes with `in` and `out` to the rest: at least one copy comes in,
//!   `B <= in * T`; `n * B <= min(in * T, S(T) + uploads outside) + uploads inside`; and for the rest
//!   `(N - n) * B <= S(T) + uploads outside + min(out * T, uploads inside)`.
//! - All groups of one kind: each takes at least one copy from outside itself, so
//!   `groups * B <= S(T) + sum of min(out * T, uploads inside)`.
//!
//! Machines that a policy brings along count as if they stood in every group at once, except that each
//! group must still take its one copy in, unless they have the blob at the start.
//!
//! The least `T` that satisfies a part is found by bisection, as each right side only grows with `T`. The
//! bound is the largest of them. It knows no latency, no piece size and no rule that a byte must have
//! arrived before it is sent on; and an uplink that is degraded in mid-transfer counts with its full
//! rate, one of a node that dies until the end. So it is never too high, and may be out of reach.

use std::time::Duration;

use crate::baseline::{Boundary, Fault, Input};

/// What may be used beside the nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Supply {
    /// How many copies may leave the registry: 1 where each byte may leave it once, infinite where it
    /// does not matter.
    pub copies_max: f64,
    /// What machines that are no nodes, such as seeds and origins, send, in bytes per second.
    pub more_up_bytes_per_s: f64,
    /// Whether such machines have the blob at the start: then it need not leave the registry.
    pub warm: bool,
}

impl Supply {
    /// The nodes themselves, and one copy from the registry.
    pub const ONE_COPY: Self = Self {
        copies_max: 1.0,
        more_up_bytes_per_s: 0.0,
        warm: false,
    };
    /// The nodes themselves, and as much from the registry as its link gives.
    pub const REGISTRY: Self = Self {
        copies_max: f64::INFINITY,
        more_up_bytes_per_s: 0.0,
        warm: false,
    };
}

/// The parts of the bound, in seconds from the start of the simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bound {
    /// The blob must leave the registry once.
    pub registry_s: f64,
    /// The slowest downlink, with its arrival.
    pub downlink_s: f64,
    /// All nodes' copies must be sent by somebody.
    pub upload_s: f64,
    /// The tightest rack, or all racks together.
    pub rack_s: f64,
    /// The tightest zone, or all zones together.
    pub zone_s: f64,
}

impl Bound {
    /// The largest part.
    #[must_use]
    pub fn makespan(&self) -> Duration {
        let parts = [
            self.registry_s,
            self.downlink_s,
            self.upload_s,
            self.rack_s,
            self.zone_s,
        ];
        let largest = parts.into_iter().fold(0.0, f64::max);
        Duration::try_from_secs_f64(largest).unwrap_or(Duration::MAX)
    }
}

/// The least time until all nodes that live have the blob.
#[must_use]
pub fn makespan(input: &Input, supply: Supply) -> Bound {
    let cluster = Cluster::new(input, supply);
    let blob = input.blob_bytes as f64;
    if cluster.living.nodes == 0.0 || blob == 0.0 {
        return Bound::default();
    }
    let registry = |at: f64| input.registry_bytes_per_s * (at - cluster.first_s).max(0.0);
    let living = input
        .nodes
        .iter()
        .enumerate()
        .filter(|&(node, _)| !cluster.dead[node]);
    let downlinks =
        living.map(|(_, node)| node.arrival.as_secs_f64() + blob / node.down_bytes_per_s);
    let all = &cluster.living;
    Bound {
        registry_s: if supply.warm {
            0.0
        } else {
            earliest(blob, registry)
        },
        downlink_s: downlinks.fold(0.0, f64::max),
        upload_s: earliest(all.nodes * blob, |at| {
            cluster.outer(at) + all.uploads.by(at)
        }),
        rack_s: cluster.groups(&input.racks, |node| input.nodes[node].rack),
        zone_s: cluster.groups(&input.zones, |node| input.nodes[node].zone),
    }
}

/// The least number of bytes between peers of different groups when one copy leaves the registry: each
/// group takes the blob in once, and the registry brings one of these copies.
#[must_use]
pub fn crossing_bytes_min(input: &Input, group_of: impl Fn(usize) -> u32) -> u64 {
    let dead = dead(input);
    let mut groups: Vec<u32> = (0..input.nodes.len())
        .filter(|&node| !dead[node])
        .map(group_of)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    (groups.len() as u64).saturating_sub(1) * input.blob_bytes
}

/// Uplinks by arrival, so that what they can have sent by an instant is found by one search.
#[derive(Debug, Default)]
struct Uploads {
    arrivals: Vec<f64>,
    /// Sums over all before: the rates, and each rate times its arrival.
    rates: Vec<f64>,
    offsets: Vec<f64>,
}

impl Uploads {
    fn new(mut uplinks: Vec<(f64, f64)>) -> Self {
        uplinks.sort_by(|one, other| one.0.total_cmp(&other.0));
        let mut uploads = Self {
            rates: vec![0.0],
            offsets: vec![0.0],
            ..Self::default()
        };
        let (mut rates, mut offsets) = (0.0, 0.0);
        for (arrival, rate) in uplinks {
            rates += rate;
            offsets += rate * arrival;
            uploads.arrivals.push(arrival);
            uploads.rates.push(rates);
            uploads.offsets.push(offsets);
        }
        uploads
    }

    fn by(&self, at: f64) -> f64 {
        let here = self.arrivals.partition_point(|&arrival| arrival < at);
        self.rates[here] * at - self.offsets[here]
    }

    fn first(&self) -> f64 {
        self.arrivals.first().copied().unwrap_or(0.0)
    }
}

/// Nodes that live, counted, and what they and the dying can send.
struct Group {
    nodes: f64,
    uploads: Uploads,
}

struct Cluster<'a> {
    input: &'a Input,
    supply: Supply,
    dead: Vec<bool>,
    first_s: f64,
    living: Group,
}

impl<'a> Cluster<'a> {
    fn new(input: &'a Input, supply: Supply) -> Self {
        let dead = dead(input);
        let living = group(input, &dead, 0..input.nodes.len());
        Self {
            input,
            supply,
            first_s: living.uploads.first(),
            living,
            dead,
        }
    }

    /// What can have come by an instant from the registry.
    fn registry(&self, at: f64) -> f64 {
        let copies = self.supply.copies_max * self.input.blob_bytes as f64;
        (self.input.registry_bytes_per_s * (at - self.first_s).max(0.0)).min(copies)
    }

    /// The same from the machines that are no nodes.
    fn more(&self, at: f64) -> f64 {
        self.supply.more_up_bytes_per_s * (at - self.first_s).max(0.0)
    }

    /// All that can have come from outside of the nodes.
    fn outer(&self, at: f64) -> f64 {
        self.registry(at) + self.more(at)
    }

    fn groups(&self, boundaries: &[Boundary], group_of: impl Fn(usize) -> u32) -> f64 {
        let mut members: Vec<(u32, usize)> = (0..self.input.nodes.len())
            .map(|node| (group_of(node), node))
            .collect();
        members.sort_unstable();
        let blob = self.input.blob_bytes as f64;
        let free = Boundary {
            in_bytes_per_s: f64::INFINITY,
            out_bytes_per_s: f64::INFINITY,
        };
        let groups: Vec<(Boundary, Group)> = members
            .chunk_by(|one, other| one.0 == other.0)
            .map(|chunk| {
                let boundary = boundaries.get(chunk[0].0 as usize).copied().unwrap_or(free);
                (
                    boundary,
                    group(self.input, &self.dead, chunk.iter().map(|&(_, node)| node)),
                )
            })
            .collect();
        let mut latest: f64 = 0.0;
        for (boundary, group) in groups.iter().filter(|(_, group)| group.nodes > 0.0) {
            let inside = |at: f64| group.uploads.by(at);
            let outside = |at: f64| self.registry(at) + self.living.uploads.by(at) - inside(at);
            let inward = |at: f64| limit(boundary.in_bytes_per_s, at - group.uploads.first());
            if !self.supply.warm {
                latest = latest.max(earliest(blob, inward));
            }
            latest = latest.max(earliest(group.nodes * blob, |at| {
                inward(at).min(outside(at)) + inside(at) + self.more(at)
            }));
        }
        for (boundary, group) in &groups {
            let rest = (self.living.nodes - group.nodes) * blob;
            let sent = |at: f64| {
                let inside = group.uploads.by(at);
                let outward =
                    limit(boundary.out_bytes_per_s, at - group.uploads.first()).min(inside);
                self.outer(at) + self.living.uploads.by(at) - inside + outward
            };
            latest = latest.max(earliest(rest, sent));
        }
        let wanting = groups.iter().filter(|(_, group)| group.nodes > 0.0).count() as f64;
        let sent = |at: f64| {
            let outward = groups.iter().map(|(boundary, group)| {
                limit(boundary.out_bytes_per_s, at - group.uploads.first())
                    .min(group.uploads.by(at))
            });
            self.outer(at) + outward.sum::<f64>()
        };
        latest.max(earliest(wanting * blob, sent))
    }
}

fn dead(input: &Input) -> Vec<bool> {
    let mut dead = vec![false; input.nodes.len()];
    for fault in &input.faults {
        if let Fault::Died { node, .. } = *fault {
            dead[node as usize] = true;
        }
    }
    dead
}

fn group(input: &Input, dead: &[bool], members: impl Iterator<Item = usize> + Clone) -> Group {
    let uplink = |node: usize| {
        (
            input.nodes[node].arrival.as_secs_f64(),
            input.nodes[node].up_bytes_per_s,
        )
    };
    Group {
        nodes: members.clone().filter(|&node| !dead[node]).count() as f64,
        uploads: Uploads::new(members.map(uplink).collect()),
    }
}

/// What a link has carried at most after some seconds. Before it began: nothing, even an infinite one.
fn limit(bytes_per_s: f64, seconds: f64) -> f64 {
    if seconds <= 0.0 {
        0.0
    } else {
        bytes_per_s * seconds
    }
}

/// Bisection halves an interval of doubles no further than this.
const HALVINGS: u32 = 60;
/// Past this nothing arrives: a link is down. In seconds, some 30 years.
const NEVER_S: f64 = 1e9;

/// The first instant at which a supply that never shrinks has reached the need, in seconds, from below.
fn earliest(need_bytes: f64, supply: impl Fn(f64) -> f64) -> f64 {
    if need_bytes <= 0.0 {
        return 0.0;
    }
    let mut high = 1.0;
    while supply(high) < need_bytes {
        high *= 2.0;
        if high > NEVER_S {
            return f64::INFINITY;
        }
    }
    let mut low = 0.0;
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if supply(middle) < need_bytes {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOB: u64 = 1000;

    fn input(nodes: usize) -> Input {
        Input::uniform(nodes, BLOB, 1000.0, 100.0)
    }

    fn near(actual: f64, expected: f64) {
        assert!(
            (actual - expected).abs() < 1e-6 * expected.max(1.0),
            "{actual} is not {expected}"
        );
    }

    #[test]
    fn equal_nodes_are_bound_by_their_downlinks() {
        let bound = makespan(&input(50), Supply::ONE_COPY);
        near(bound.registry_s, 1.0);
        near(bound.downlink_s, 10.0);
        // 49 copies from 50 uplinks of a tenth of a copy each.
        near(bound.upload_s, 9.8);
        assert_eq!(bound.makespan(), Duration::from_secs(10));
    }

    #[test]
    fn the_slow_uplinks_of_many_bound_all() {
        let mut input = input(10);
        input
            .nodes
            .iter_mut()
            .skip(1)
            .for_each(|node| node.up_bytes_per_s = 10.0);
        // 9 copies, from 100 + 9 * 10.
        near(makespan(&input, Supply::ONE_COPY).upload_s, 9000.0 / 190.0);
        // The registry may send all the time: 10 copies from 1000 + 190.
        near(
            makespan(&input, Supply::REGISTRY).upload_s,
            10_000.0 / 1190.0,
        );
    }

    #[test]
    fn a_late_node_cannot_help_before_it_comes() {
        let mut input = input(2);
        input.nodes[1].arrival = Duration::from_secs(100);
        let bound = makespan(&input, Supply::ONE_COPY);
        near(bound.downlink_s, 110.0);
        near(bound.upload_s, 10.0);
        let both = Supply {
            more_up_bytes_per_s: 0.0,
            ..Supply::ONE_COPY
        };
        input.nodes[0].up_bytes_per_s = 0.0;
        near(makespan(&input, both).upload_s, 110.0);
    }

    #[test]
    fn a_rack_behind_a_thin_link_is_bound_by_it() {
        let mut input = input(10);
        input
            .nodes
            .iter_mut()
            .skip(5)
            .for_each(|node| node.rack = 1);
        let free = Boundary {
            in_bytes_per_s: f64::INFINITY,
            out_bytes_per_s: f64::INFINITY,
        };
        input.racks = vec![
            free,
            Boundary {
                in_bytes_per_s: 20.0,
                ..free
            },
        ];
        near(makespan(&input, Supply::ONE_COPY).rack_s, 50.0);
        assert_eq!(
            crossing_bytes_min(&input, |node| input.nodes[node].rack),
            BLOB
        );
        // What comes out is thin: the one copy that enters this rack from the registry, or from the other.
        input.racks = vec![
            Boundary {
                out_bytes_per_s: 5.0,
                ..free
            };
            2
        ];
        near(makespan(&input, Supply::ONE_COPY).rack_s, 100.0);
    }

    #[test]
    fn the_dead_need_nothing() {
        let mut input = input(2);
        input.nodes[1].down_bytes_per_s = 1.0;
        near(makespan(&input, Supply::ONE_COPY).downlink_s, 1000.0);
        input.faults = vec![Fault::Died {
            at: Duration::ZERO,
            node: 1,
        }];
        near(makespan(&input, Supply::ONE_COPY).downlink_s, 10.0);
    }

    #[test]
    fn a_link_that_is_down_takes_for_ever() {
        let mut input = input(2);
        input.registry_bytes_per_s = 0.0;
        assert_eq!(makespan(&input, Supply::ONE_COPY).makespan(), Duration::MAX);
        let warm = Supply {
            more_up_bytes_per_s: 1000.0,
            warm: true,
            ..Supply::ONE_COPY
        };
        near(makespan(&input, warm).makespan().as_secs_f64(), 10.0);
    }
}
