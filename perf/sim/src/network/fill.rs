//! Sharing the links out: progressive filling over the part of the network that a change can reach.
//!
//! Rates are max-min fair when each flow has a bottleneck: a full link on which no other flow is faster.
//! So a change need not touch a flow whose bottleneck it does not touch. The *region* starts with the
//! flows that began and the links that changed, and grows over each link that holds a flow down and that
//! a flow of the region crosses; all flows of a link inside belong to the region. Other links that the
//! region crosses only limit it, with what their remaining flows leave. Where such a link turns out to
//! hold down a flow of the region although others cross it too, it belongs inside, and the filling is
//! done again. When no such link is left, each flow inside and outside has its bottleneck: the answer is
//! the exact one of the whole network.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{HOP_BITS, NO_LINK, Network, RATE_NOISE};

/// A share that has grown by less than this since it was queued is the same share.
const SHARE_NOISE: f64 = 1e-12;

/// The lists of a round of sharing, kept for their memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Filling {
    round: u32,
    /// Flows of the region, links inside it, and all links that it crosses.
    flows: Vec<u32>,
    inside: Vec<u32>,
    crossed: Vec<u32>,
    /// Links by the share that each of their open flows would get. A share is not negative, so its bits
    /// order it.
    shares: BinaryHeap<Reverse<(u64, u32)>>,
    joining: Vec<u32>,
}

impl Network {
    /// Shares out anew what the changes since the last time can reach.
    pub(super) fn share(&mut self) {
        self.rounds += 1;
        let mut filling = std::mem::take(&mut self.filling);
        filling.begin(self);
        loop {
            filling.spread(self);
            filling.prepare(self);
            if filling.fill(self) {
                break;
            }
        }
        filling.settle(self);
        self.filling = filling;
        self.started.clear();
        self.dirty.clear();
        self.urgent = false;
        self.shared_ns = Some(self.now_ns);
    }
}

impl Filling {
    fn begin(&mut self, network: &mut Network) {
        self.flows.clear();
        self.inside.clear();
        self.crossed.clear();
        self.joining.clear();
        if self.round == u32::MAX {
            network.links.iter_mut().for_each(|link| link.round = 0);
            network.flows.iter_mut().for_each(|flow| flow.round = 0);
            self.round = 0;
        }
        self.round += 1;
        for &slot in &network.started {
            let flow = &mut network.flows[slot as usize];
            // A flow that has ended already may have left its slot to another that has no links.
            if flow.sequence != 0 && flow.hops > 0 && flow.round != self.round {
                flow.round = self.round;
                self.flows.push(slot);
            }
        }
        self.joining.extend_from_slice(&network.dirty);
    }

    /// Lets the region grow until no link that holds a flow down crosses its edge.
    fn spread(&mut self, network: &mut Network) {
        let Self {
            round,
            flows,
            inside,
            crossed,
            joining,
            ..
        } = self;
        // Only in the first turn are there flows whose links have not been looked at.
        let mut seen_flows = if crossed.is_empty() { 0 } else { flows.len() };
        loop {
            while let Some(link) = joining.pop() {
                let at = &mut network.links[link as usize];
                if at.round != *round {
                    at.round = *round;
                    at.inside = false;
                    crossed.push(link);
                }
                if at.inside {
                    continue;
                }
                at.inside = true;
                inside.push(link);
                for &entry in &at.flows {
                    let slot = entry >> HOP_BITS;
                    let flow = &mut network.flows[slot as usize];
                    if flow.round != *round {
                        flow.round = *round;
                        flows.push(slot);
                    }
                }
            }
            if seen_flows == flows.len() {
                return;
            }
            for &slot in &flows[seen_flows..] {
                for &link in network.flows[slot as usize].path() {
                    let at = &mut network.links[link as usize];
                    if at.round != *round {
                        at.round = *round;
                        at.inside = false;
                        crossed.push(link);
                        if at.holds > 0 {
                            joining.push(link);
                        }
                    }
                }
            }
            seen_flows = flows.len();
        }
    }

    /// Sets each link's rest and its number of open flows, and queues its share.
    fn prepare(&mut self, network: &mut Network) {
        for &link in &self.crossed {
            let at = &mut network.links[link as usize];
            at.open = 0;
            at.rest = if at.inside {
                at.capacity
            } else {
                at.capacity - at.load
            };
        }
        for &slot in &self.flows {
            let flow = &mut network.flows[slot as usize];
            flow.next_bottleneck = NO_LINK;
            for hop in 0..flow.hops as usize {
                let at = &mut network.links[flow.links[hop] as usize];
                at.open += 1;
                if !at.inside {
                    at.rest += flow.rate;
                }
            }
        }
        self.shares.clear();
        for &link in &self.crossed {
            let at = &mut network.links[link as usize];
            at.outsiders = at.open as usize != at.flows.len();
            if !at.outsiders {
                // The exact number, without what adding and taking away has rounded off.
                at.rest = at.capacity;
            }
            if at.open > 0 {
                self.shares
                    .push(Reverse((share(at.rest, at.open).to_bits(), link)));
            }
        }
    }

    /// Raises all open flows together and stops those on each link as it fills. False: links that hold
    /// flows of the region down have flows outside it, and now wait to join.
    fn fill(&mut self, network: &mut Network) -> bool {
        while let Some(Reverse((queued, link))) = self.shares.pop() {
            let at = &mut network.links[link as usize];
            if at.open == 0 {
                continue;
            }
            let level = share(at.rest, at.open);
            // Shares only grow while flows stop at lower ones, so a queued share is at most too low.
            if level > f64::from_bits(queued) * (1.0 + SHARE_NOISE) {
                self.shares.push(Reverse((level.to_bits(), link)));
                continue;
            }
            if at.outsiders {
                self.joining.push(link);
            }
            let entries = std::mem::take(&mut at.flows);
            for &entry in &entries {
                let flow = &mut network.flows[(entry >> HOP_BITS) as usize];
                if flow.round != self.round || flow.next_bottleneck != NO_LINK {
                    continue;
                }
                flow.next_bottleneck = link;
                flow.next_rate = level;
                for hop in 0..flow.hops as usize {
                    let crossed = &mut network.links[flow.links[hop] as usize];
                    crossed.rest -= level;
                    crossed.open -= 1;
                }
            }
            network.links[link as usize].flows = entries;
        }
        self.joining.is_empty()
    }

    /// Gives the flows their new rates, and the links their loads.
    fn settle(&mut self, network: &mut Network) {
        let now_ns = network.now_ns;
        for &link in &self.crossed {
            let at = &mut network.links[link as usize];
            at.settle(now_ns);
            at.load = (at.capacity - at.rest).clamp(0.0, at.capacity);
        }
        for &slot in &self.flows {
            let flow = &mut network.flows[slot as usize];
            if flow.bottleneck != flow.next_bottleneck {
                if flow.bottleneck != NO_LINK {
                    network.links[flow.bottleneck as usize].holds -= 1;
                }
                network.links[flow.next_bottleneck as usize].holds += 1;
                flow.bottleneck = flow.next_bottleneck;
            }
            if (flow.next_rate - flow.rate).abs() > flow.rate * RATE_NOISE {
                flow.run_at(now_ns, flow.next_rate);
                network.queue(slot);
            }
        }
    }
}

fn share(rest: f64, open: u32) -> f64 {
    // Rounding may leave a full link a hair below zero.
    rest.max(0.0) / f64::from(open)
}
