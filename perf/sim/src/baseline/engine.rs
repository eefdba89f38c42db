//! Virtual time for the policies: timers, transfers over the network, faults, and the accounts of both.
//!
//! A policy calls [`Engine::next`] until that gives nothing, and in between schedules timers and begins
//! transfers. The engine ends when each node has finished or died, or at the time limit.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::{Fault, Input, NodeInput, Outcome, Source, Topology};
use crate::network::{FlowId, Network};
use crate::rng::Rng;

/// A transfer that a policy has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TransferId {
    slot: u32,
    generation: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer<T> {
    pub(super) from: Source,
    pub(super) to: u32,
    pub(super) bytes: u64,
    pub(super) begun: Duration,
    pub(super) tag: T,
}

/// What a policy reacts to.
#[derive(Debug)]
pub(super) enum Happened<E, T> {
    Timer(E),
    Arrived(Transfer<T>),
    /// A peer is gone, and these transfers from and to it with it.
    Died(u32, Vec<Transfer<T>>),
}

#[derive(Debug)]
enum Entry<E> {
    Timer(E),
    Start(TransferId),
    Fault(Fault),
}

#[derive(Debug)]
struct Slot<T> {
    transfer: Option<Transfer<T>>,
    generation: u32,
    flow: Option<FlowId>,
}

#[derive(Debug)]
pub(super) struct Engine<E, T> {
    pub(super) now: Duration,
    pub(super) rng: Rng,
    pub(super) topology: Topology,
    pub(super) delay: Duration,
    until: Duration,
    network: Network,
    up_bytes_per_s: Vec<f64>,
    /// Instants and the index of what happens then; the index also orders what shares an instant.
    timers: BinaryHeap<Reverse<(Duration, u64)>>,
    /// What happens at them, from index `entries_gone` on.
    entries: VecDeque<Option<Entry<E>>>,
    entries_gone: u64,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Transfers by the slot of their flow.
    of_flow: Vec<u32>,
    arrived: VecDeque<TransferId>,
    buffer: Vec<FlowId>,
    alive: Vec<bool>,
    finished: Vec<Option<Duration>>,
    waiting: usize,
    rack_crossing_bytes: u64,
    zone_crossing_bytes: u64,
    transfers: u64,
}

impl<E, T: Copy> Engine<E, T> {
    /// The peers are the nodes of the input, and behind them `more`.
    pub(super) fn new(input: &Input, more: &[NodeInput]) -> Self {
        let mut network = Network::new(input.step);
        let topology = Topology::new(input, more, &mut network);
        network.watch(topology.registry(), input.peak_window);
        let mut engine = Self {
            now: Duration::ZERO,
            rng: Rng::new(input.seed),
            delay: input.message_delay,
            until: input.until,
            network,
            up_bytes_per_s: input.nodes.iter().map(|node| node.up_bytes_per_s).collect(),
            topology,
            timers: BinaryHeap::new(),
            entries: VecDeque::new(),
            entries_gone: 0,
            slots: Vec::new(),
            free: Vec::new(),
            of_flow: Vec::new(),
            arrived: VecDeque::new(),
            buffer: Vec::new(),
            alive: vec![true; input.nodes.len() + more.len()],
            finished: vec![None; input.nodes.len()],
            waiting: input.nodes.len(),
            rack_crossing_bytes: 0,
            zone_crossing_bytes: 0,
            transfers: 0,
        };
        for &fault in &input.faults {
            let (Fault::Died { at, .. } | Fault::Slowed { at, .. }) = fault;
            engine.push(at, Entry::Fault(fault));
        }
        engine
    }

    /// The nodes in a random order: nobody is first because of its number.
    pub(super) fn shuffled_nodes(&mut self) -> Vec<u32> {
        let mut nodes: Vec<u32> = (0..self.finished.len() as u32).collect();
        shuffle(&mut self.rng, &mut nodes);
        nodes
    }

    pub(super) fn alive(&self, peer: u32) -> bool {
        self.alive[peer as usize]
    }

    pub(super) fn at(&mut self, at: Duration, event: E) {
        self.push(at.max(self.now), Entry::Timer(event));
    }

    /// Begins a transfer whose last byte arrives `lead` later than the network alone would have it.
    pub(super) fn fetch(
        &mut self,
        from: Source,
        to: u32,
        bytes: u64,
        lead: Duration,
        tag: T,
    ) -> TransferId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                transfer: None,
                generation: 0,
                flow: None,
            });
            self.slots.len() as u32 - 1
        });
        let into = &mut self.slots[slot as usize];
        into.generation += 1;
        into.transfer = Some(Transfer {
            from,
            to,
            bytes,
            begun: self.now,
            tag,
        });
        let id = TransferId {
            slot,
            generation: into.generation,
        };
        self.transfers += 1;
        if lead.is_zero() {
            self.start(id);
        } else {
            self.push(self.now + lead, Entry::Start(id));
        }
        id
    }

    /// Ends a transfer early; what has arrived of it is lost but counted.
    pub(super) fn cancel(&mut self, id: TransferId) {
        if self.slots[id.slot as usize].generation == id.generation {
            self.drop_transfer(id.slot);
        }
    }

    pub(super) fn finish(&mut self, node: u32) {
        if let Some(finished) = self
            .finished
            .get_mut(node as usize)
            .filter(|finished| finished.is_none())
        {
            *finished = Some(self.now);
            self.waiting -= 1;
        }
    }

    pub(super) fn next(&mut self) -> Option<Happened<E, T>> {
        loop {
            if let Some(id) = self.arrived.pop_front() {
                if let Some(transfer) = self.take(id) {
                    return Some(Happened::Arrived(transfer));
                }
                continue;
            }
            if self.waiting == 0 {
                return None;
            }
            let timer = self.timers.peek().map(|&Reverse((at, _))| at);
            let network = self.network.next_event();
            let next = [timer, network].into_iter().flatten().min()?;
            if next > self.until {
                return None;
            }
            self.now = next;
            // What starts now is to be shared out with all else that starts now, so timers go first.
            if timer != Some(next) {
                let mut buffer = std::mem::take(&mut self.buffer);
                self.network.advance(next, &mut buffer);
                buffer.drain(..).for_each(|flow| self.arrival(flow));
                self.buffer = buffer;
                continue;
            }
            match self.pop() {
                Entry::Timer(event) => return Some(Happened::Timer(event)),
                Entry::Start(id) => self.start(id),
                Entry::Fault(Fault::Slowed {
                    node, up_factor, ..
                }) => {
                    let bytes_per_s = self.up_bytes_per_s[node as usize] * up_factor;
                    self.network
                        .set_capacity(self.now, self.topology.up(node), bytes_per_s);
                }
                Entry::Fault(Fault::Died { node, .. }) => {
                    if std::mem::replace(&mut self.alive[node as usize], false) {
                        return Some(Happened::Died(node, self.bury(node)));
                    }
                }
            }
        }
    }

    pub(super) fn outcome(mut self, policy: &'static str) -> Outcome {
        let registry = self.topology.registry();
        let registry_bytes = self.network.carried_bytes(registry).round() as u64;
        let registry_peak_bytes_per_s = self.network.peak_bytes_per_s(registry);
        for slot in 0..self.slots.len() {
            self.drop_transfer(slot as u32);
        }
        let died = |node: usize| !self.alive[node] && self.finished[node].is_none();
        Outcome {
            policy,
            died: (0..self.finished.len()).map(died).collect(),
            registry_bytes,
            registry_peak_bytes_per_s,
            rack_crossing_bytes: self.rack_crossing_bytes,
            zone_crossing_bytes: self.zone_crossing_bytes,
            transfers: self.transfers,
            finished: self.finished,
        }
    }

    fn push(&mut self, at: Duration, entry: Entry<E>) {
        let index = self.entries_gone + self.entries.len() as u64;
        self.timers.push(Reverse((at, index)));
        self.entries.push_back(Some(entry));
    }

    fn pop(&mut self) -> Entry<E> {
        let Reverse((_, index)) = self.timers.pop().expect("a timer was seen");
        let entry = self.entries[(index - self.entries_gone) as usize]
            .take()
            .expect("a timer comes once");
        while self.entries.front().is_some_and(Option::is_none) {
            self.entries.pop_front();
            self.entries_gone += 1;
        }
        entry
    }

    fn start(&mut self, id: TransferId) {
        let slot = &mut self.slots[id.slot as usize];
        let Some(transfer) = slot.transfer.filter(|_| slot.generation == id.generation) else {
            return;
        };
        let path = self.topology.path(transfer.from, transfer.to);
        let flow = self.network.start(self.now, path.links(), transfer.bytes);
        slot.flow = Some(flow);
        if self.of_flow.len() <= flow.slot() {
            self.of_flow.resize(flow.slot() + 1, 0);
        }
        self.of_flow[flow.slot()] = id.slot;
    }

    /// A flow has ended. Which transfer it was is found now: its slot goes to the next flow that starts.
    fn arrival(&mut self, flow: FlowId) {
        let slot = self.of_flow[flow.slot()];
        let at = &mut self.slots[slot as usize];
        at.flow = None;
        self.arrived.push_back(TransferId {
            slot,
            generation: at.generation,
        });
        if let Some(transfer) = at.transfer {
            self.account(&transfer, transfer.bytes);
        }
    }

    /// The transfer of an arrival, if nobody has cancelled it at the very instant.
    fn take(&mut self, id: TransferId) -> Option<Transfer<T>> {
        let at = &mut self.slots[id.slot as usize];
        let transfer = if at.generation == id.generation {
            at.transfer.take()
        } else {
            None
        };
        self.free.extend(transfer.is_some().then_some(id.slot));
        transfer
    }

    fn drop_transfer(&mut self, slot: u32) -> Option<Transfer<T>> {
        let at = &mut self.slots[slot as usize];
        let transfer = at.transfer.take()?;
        if let Some(flow) = at.flow.take() {
            let delivered = self.network.cancel(self.now, flow);
            self.account(&transfer, delivered);
        }
        self.free.push(slot);
        Some(transfer)
    }

    fn account(&mut self, transfer: &Transfer<T>, bytes: u64) {
        if let Source::Peer(from) = transfer.from {
            self.rack_crossing_bytes += if self.topology.same_rack(from, transfer.to) {
                0
            } else {
                bytes
            };
            self.zone_crossing_bytes += if self.topology.same_zone(from, transfer.to) {
                0
            } else {
                bytes
            };
        }
    }

    fn bury(&mut self, node: u32) -> Vec<Transfer<T>> {
        if self.finished[node as usize].is_none() {
            self.waiting -= 1;
        }
        let touches =
            |transfer: &Transfer<T>| transfer.to == node || transfer.from == Source::Peer(node);
        let slots = 0..self.slots.len() as u32;
        let lost: Vec<u32> = slots
            .filter(|&slot| {
                self.slots[slot as usize]
                    .transfer
                    .as_ref()
                    .is_some_and(touches)
            })
            .collect();
        lost.into_iter()
            .filter_map(|slot| self.drop_transfer(slot))
            .collect()
    }
}

pub(super) fn shuffle<V>(rng: &mut Rng, list: &mut [V]) {
    for end in (1..list.len()).rev() {
        list.swap(end, rng.below(end as u64 + 1) as usize);
    }
}

/// A machine that a policy brings along to seed the others: as fast as the fastest node, in the first
/// node's zone, in no rack with a limit. Where it stands and how fast it is is not published; this is a
/// good place and a good machine.
pub(super) fn seed_machine(input: &Input) -> NodeInput {
    let fastest = |rate: fn(&NodeInput) -> f64| input.nodes.iter().map(rate).fold(0.0, f64::max);
    NodeInput {
        up_bytes_per_s: fastest(|node| node.up_bytes_per_s),
        down_bytes_per_s: fastest(|node| node.down_bytes_per_s),
        rack: u32::MAX,
        zone: input.nodes.first().map_or(0, |node| node.zone),
        arrival: Duration::ZERO,
    }
}
