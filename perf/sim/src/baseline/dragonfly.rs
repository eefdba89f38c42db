//! Dragonfly 2.x, from its published rules.
//!
//! A scheduler gives each peer up to four parents: out of 15 random peers of the task it drops the peer
//! itself, peers that it has failed with, peers without a free upload slot, bad ones, those without
//! parents of their own, and those that would close a cycle; the rest are scored, 0.6 for load, 0.2 for
//! the same IDC, 0.1 for the location, 0.1 for the type of host. Where nobody is left it tries again
//! every 500 ms, and after four failures the peer goes back to the source. A seed peer fetches from the
//! source when the first peer comes. Pieces are whole, next_pow2(length / 500) within 4 to 64 MiB, and
//! eight are fetched at a time.
//!
//! Not published, and chosen for speed: a parent's new piece is known to its children at once; a child
//! asks the parent from which it waits for least; a child that has lost a parent gets four new ones at
//! once; schedulers answer after a round trip whatever their load.

use std::time::Duration;

use super::engine::{Engine, Happened, seed_machine};
use super::pieces::{Cut, Pieces};
use super::{Input, Outcome, Source};

/// The numbers of the published rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// How many random peers the scheduler looks at.
    pub candidates: usize,
    /// How many parents a peer gets at most.
    pub parents: usize,
    /// How long the scheduler waits before it tries again.
    pub retry: Duration,
    /// After so many failures a peer goes back to the source.
    pub failures_max: u32,
    /// How many pieces a peer fetches at a time.
    pub pieces_at_once: u32,
    /// How many children a peer has at most.
    pub slots: u32,
    /// How many children a seed peer has at most.
    pub seed_slots: u32,
    /// In which order pieces are asked for.
    pub order: Order,
}

/// The order of pieces is not published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The lowest number first.
    Ascending,
    /// Any of those that a parent has: siblings then hold different pieces.
    Random,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            candidates: 15,
            parents: 4,
            retry: Duration::from_millis(500),
            failures_max: 4,
            pieces_at_once: 8,
            slots: 50,
            seed_slots: 300,
            order: Order::Random,
        }
    }
}

const MIB: u64 = 1 << 20;
const PIECE_BYTES_MIN: u64 = 4 * MIB;
const PIECE_BYTES_MAX: u64 = 64 * MIB;
const PIECES_AIM: u64 = 500;

const WEIGHT_LOAD: f64 = 0.6;
const WEIGHT_IDC: f64 = 0.2;
const WEIGHT_LOCATION: f64 = 0.1;
const WEIGHT_HOST: f64 = 0.1;
const HOST_SEED: f64 = 1.0;
const HOST_PEER: f64 = 0.5;

/// A peer with fewer pieces than this is judged by the mean, one with more by the deviation.
const COSTS_FOR_DEVIATION: u32 = 30;
const COSTS_MIN: u32 = 2;
const BAD_MEANS: f64 = 20.0;
const BAD_DEVIATIONS: f64 = 3.0;

/// The length of a piece of a blob.
#[must_use]
pub fn piece_bytes(blob_bytes: u64) -> u64 {
    blob_bytes
        .div_ceil(PIECES_AIM)
        .next_power_of_two()
        .clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not here yet, or without parents and asking again.
    Waiting,
    Downloading,
    /// Fetches from the source itself.
    Source,
    Done,
}

/// What pieces have cost a peer, in seconds: mean and deviation of all but the last.
#[derive(Clone, Debug, Default)]
struct Costs {
    count: u32,
    sum: f64,
    squares: f64,
    last: f64,
}

impl Costs {
    fn add(&mut self, seconds: f64) {
        if self.count > 0 {
            self.sum += self.last;
            self.squares += self.last * self.last;
        }
        self.count += 1;
        self.last = seconds;
    }

    fn is_bad(&self) -> bool {
        if self.count < COSTS_MIN {
            return false;
        }
        let before = f64::from(self.count - 1);
        let mean = self.sum / before;
        if self.count < COSTS_FOR_DEVIATION {
            return self.last > mean * BAD_MEANS;
        }
        let deviation = (self.squares / before - mean * mean).max(0.0).sqrt();
        self.last > mean + BAD_DEVIATIONS * deviation
    }
}

#[derive(Debug)]
struct Peer {
    phase: Phase,
    have: Pieces,
    asked: Pieces,
    /// Parents, and how many pieces this peer waits for from each.
    parents: Vec<(u32, u32)>,
    children: Vec<u32>,
    blocked: Vec<u32>,
    failures: u32,
    costs: Costs,
    slots: u32,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Register(u32),
    Schedule(u32),
}

struct Dragonfly<'a> {
    rules: &'a Rules,
    engine: Engine<Event, u32>,
    cut: Cut,
    peers: Vec<Peer>,
    /// Peers that the scheduler knows.
    known: Vec<u32>,
    seed: u32,
    /// For a search through the parents: when a peer was last seen.
    seen: Vec<u64>,
    search: u64,
}

/// One blob under Dragonfly's rules.
#[must_use]
pub fn run(input: &Input, rules: &Rules) -> Outcome {
    let cut = Cut::new(input.blob_bytes, piece_bytes(input.blob_bytes));
    let seed = input.nodes.len() as u32;
    let peer = |slots| Peer {
        phase: Phase::Waiting,
        have: Pieces::none(cut.pieces),
        asked: Pieces::none(cut.pieces),
        parents: Vec::new(),
        children: Vec::new(),
        blocked: Vec::new(),
        failures: 0,
        costs: Costs::default(),
        slots,
    };
    let mut peers: Vec<Peer> = (0..seed).map(|_| peer(rules.slots)).collect();
    peers.push(peer(rules.seed_slots));
    let mut engine = Engine::new(input, &[seed_machine(input)]);
    for node in engine.shuffled_nodes() {
        // The request to register takes one way here, the answer and the first request the rest.
        engine.at(
            input.nodes[node as usize].arrival + input.message_delay,
            Event::Register(node),
        );
    }
    let seen = vec![0; peers.len()];
    Dragonfly {
        rules,
        engine,
        cut,
        peers,
        known: Vec::new(),
        seed,
        seen,
        search: 0,
    }
    .run()
}

impl Dragonfly<'_> {
    fn run(mut self) -> Outcome {
        while let Some(happened) = self.engine.next() {
            match happened {
                Happened::Timer(Event::Register(node)) => self.register(node),
                Happened::Timer(Event::Schedule(node)) => self.schedule(node),
                Happened::Arrived(transfer) => {
                    let cost = (self.engine.now - transfer.begun).as_secs_f64();
                    self.arrived(transfer.from, transfer.to, transfer.tag, cost);
                }
                Happened::Died(node, lost) => {
                    for transfer in lost {
                        self.peers[transfer.to as usize].asked.remove(transfer.tag);
                    }
                    self.died(node);
                }
            }
        }
        self.engine.outcome("Dragonfly")
    }

    fn register(&mut self, node: u32) {
        if !self.engine.alive(node) {
            return;
        }
        if self.known.is_empty() {
            self.known.push(self.seed);
            self.back_to_source(self.seed);
        }
        self.known.push(node);
        if self.cut.pieces == 0 {
            self.engine.finish(node);
        } else {
            self.schedule(node);
        }
    }

    fn schedule(&mut self, node: u32) {
        if !self.engine.alive(node)
            || matches!(self.peers[node as usize].phase, Phase::Source | Phase::Done)
        {
            return;
        }
        let parents = self.candidates(node);
        if parents.is_empty() {
            let peer = &mut self.peers[node as usize];
            peer.phase = Phase::Waiting;
            peer.failures += 1;
            if peer.failures > self.rules.failures_max {
                self.back_to_source(node);
            } else {
                self.engine
                    .at(self.engine.now + self.rules.retry, Event::Schedule(node));
            }
            return;
        }
        self.leave_parents(node);
        for parent in parents {
            self.peers[parent as usize].children.push(node);
            self.peers[node as usize].parents.push((parent, 0));
        }
        self.peers[node as usize].phase = Phase::Downloading;
        self.ask(node);
    }

    /// The parents that the scheduler would give a peer, best first.
    fn candidates(&mut self, node: u32) -> Vec<u32> {
        let mut drawn: Vec<u32> = Vec::with_capacity(self.rules.candidates);
        let wanted = self.rules.candidates.min(self.known.len());
        while drawn.len() < wanted {
            let candidate = self.engine.rng.pick(&self.known);
            if !drawn.contains(&candidate) {
                drawn.push(candidate);
            }
        }
        let mut scored: Vec<(f64, u32)> = Vec::new();
        for candidate in drawn {
            let (child, parent) = (&self.peers[node as usize], &self.peers[candidate as usize]);
            let mine = child.parents.iter().any(|&(old, _)| old == candidate);
            let rooted =
                !parent.parents.is_empty() || matches!(parent.phase, Phase::Source | Phase::Done);
            let full = !mine && parent.children.len() as u32 >= parent.slots;
            if candidate == node
                || !rooted
                || full
                || child.blocked.contains(&candidate)
                || parent.costs.is_bad()
            {
                continue;
            }
            if !self.descends(candidate, node) {
                scored.push((self.score(node, candidate), candidate));
            }
        }
        scored.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        scored
            .into_iter()
            .map(|(_, candidate)| candidate)
            .take(self.rules.parents)
            .collect()
    }

    fn score(&self, node: u32, candidate: u32) -> f64 {
        let parent = &self.peers[candidate as usize];
        let free = f64::from(parent.slots.saturating_sub(parent.children.len() as u32))
            / f64::from(parent.slots);
        let zone = f64::from(u8::from(self.engine.topology.same_zone(node, candidate)));
        let rack = f64::from(u8::from(self.engine.topology.same_rack(node, candidate)));
        let host = if candidate == self.seed {
            HOST_SEED
        } else {
            HOST_PEER
        };
        // A location is a path: the zone and the rack are its two parts.
        WEIGHT_LOAD * free
            + WEIGHT_IDC * zone
            + WEIGHT_LOCATION * f64::midpoint(zone, rack)
            + WEIGHT_HOST * host
    }

    /// Whether `peer` gets pieces by way of `ancestor`: an edge back would close a cycle.
    fn descends(&mut self, peer: u32, ancestor: u32) -> bool {
        if self.peers[ancestor as usize].children.is_empty() {
            return false;
        }
        self.search += 1;
        let mut open = vec![peer];
        while let Some(at) = open.pop() {
            if at == ancestor {
                return true;
            }
            if std::mem::replace(&mut self.seen[at as usize], self.search) != self.search {
                open.extend(
                    self.peers[at as usize]
                        .parents
                        .iter()
                        .map(|&(parent, _)| parent),
                );
            }
        }
        false
    }

    fn leave_parents(&mut self, node: u32) {
        for (parent, _) in std::mem::take(&mut self.peers[node as usize].parents) {
            self.peers[parent as usize]
                .children
                .retain(|&child| child != node);
        }
    }

    fn back_to_source(&mut self, node: u32) {
        self.leave_parents(node);
        self.peers[node as usize].phase = Phase::Source;
        self.ask(node);
    }

    /// Begins transfers until as many run as may.
    fn ask(&mut self, node: u32) {
        let round_trip = self.engine.delay * 2;
        while self.peers[node as usize].asked.held() < self.rules.pieces_at_once {
            let peer = &self.peers[node as usize];
            let (piece, from) = match peer.phase {
                Phase::Waiting | Phase::Done => return,
                Phase::Source => match peer.have.first_lacking(&peer.asked) {
                    Some(piece) => (piece, Source::Registry),
                    None => return,
                },
                Phase::Downloading => match self.choose(node) {
                    Some((piece, at)) => {
                        let parent = &mut self.peers[node as usize].parents[at];
                        parent.1 += 1;
                        (piece, Source::Peer(parent.0))
                    }
                    None => return,
                },
            };
            self.peers[node as usize].asked.insert(piece);
            self.engine
                .fetch(from, node, self.cut.bytes(piece), round_trip, piece);
        }
    }

    /// A piece that a parent has, and the parent to ask: the one with the fewest requests of this peer.
    fn choose(&mut self, node: u32) -> Option<(u32, usize)> {
        let peer = &self.peers[node as usize];
        let mut words = vec![0u64; self.cut.pieces.div_ceil(u64::BITS) as usize];
        for &(parent, _) in &peer.parents {
            let offered = peer
                .have
                .offered(&peer.asked, &self.peers[parent as usize].have);
            words
                .iter_mut()
                .zip(offered)
                .for_each(|(word, offered)| *word |= offered);
        }
        let offered: u32 = words.iter().map(|word| word.count_ones()).sum();
        if offered == 0 {
            return None;
        }
        let nth = match self.rules.order {
            Order::Ascending => 0,
            Order::Random => self.engine.rng.below(u64::from(offered)) as u32,
        };
        let piece = nth_bit(&words, nth);
        let holders = peer.parents.iter().enumerate();
        let holders =
            holders.filter(|(_, (parent, _))| self.peers[*parent as usize].have.has(piece));
        let (at, _) = holders.min_by_key(|(_, (_, waiting))| *waiting)?;
        Some((piece, at))
    }

    fn arrived(&mut self, from: Source, to: u32, piece: u32, cost: f64) {
        let peer = &mut self.peers[to as usize];
        peer.asked.remove(piece);
        peer.have.insert(piece);
        peer.costs.add(cost);
        if let Source::Peer(from) = from
            && let Some(parent) = peer.parents.iter_mut().find(|(parent, _)| *parent == from)
        {
            parent.1 = parent.1.saturating_sub(1);
        }
        if peer.have.is_full() {
            peer.phase = Phase::Done;
            self.leave_parents(to);
            self.engine.finish(to);
        } else {
            self.ask(to);
        }
        for at in 0..self.peers[to as usize].children.len() {
            self.ask(self.peers[to as usize].children[at]);
        }
    }

    fn died(&mut self, node: u32) {
        self.known.retain(|&known| known != node);
        self.leave_parents(node);
        for child in std::mem::take(&mut self.peers[node as usize].children) {
            let peer = &mut self.peers[child as usize];
            peer.parents.retain(|&(parent, _)| parent != node);
            peer.blocked.push(node);
            self.schedule(child);
        }
    }
}

fn nth_bit(words: &[u64], mut nth: u32) -> u32 {
    for (at, &word) in words.iter().enumerate() {
        if nth >= word.count_ones() {
            nth -= word.count_ones();
            continue;
        }
        let mut rest = word;
        for _ in 0..nth {
            rest &= rest - 1;
        }
        return at as u32 * u64::BITS + rest.trailing_zeros();
    }
    unreachable!("the caller has counted the bits")
}
