//! A swarm without a scheduler: peers with random neighbours that exchange whole pieces, rarest first.
//! Kraken and BitTorrent are two settings of it.
//!
//! Chosen for speed, where nothing is published: neighbours know at once what a peer has; a request that
//! waits behind another over the same connection is served without a gap; in the endgame a duplicate is
//! withdrawn at once when the piece has come from elsewhere.

mod choking;
mod neighbours;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::engine::{Engine, Happened, TransferId, seed_machine};
use super::pieces::{Cut, Pieces};
use super::{Input, Outcome, Source};

/// What the two settings differ in.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) policy: &'static str,
    pub(super) piece_bytes: u64,
    /// How many neighbours a peer has at most, and how many of them it may have asked itself.
    pub(super) neighbours_max: usize,
    pub(super) initiated_max: usize,
    /// How many peers the tracker names, and how often it is asked for more.
    pub(super) handout: usize,
    pub(super) announce: Duration,
    /// Whether the tracker names those with the whole blob first.
    pub(super) complete_first: bool,
    /// How many requests wait over one connection, and with how few missing pieces the endgame begins.
    pub(super) pipeline: usize,
    pub(super) endgame_pieces: u32,
    /// So many pieces are taken at random before the rarest come first.
    pub(super) random_pieces: u32,
    pub(super) choking: Option<Choking>,
    /// How many machines seed. Only the first fetches from the source; the others matter when warm.
    pub(super) seeds: u32,
    /// Whether the seed must have the whole blob before it gives any of it.
    pub(super) seed_whole_first: bool,
    /// Whether the seeds have the blob at the start.
    pub(super) seed_warm: bool,
    /// What the seed fetches from the source at a time.
    pub(super) seed_pieces_at_once: u32,
}

/// Tit for tat.
#[derive(Clone, Debug)]
pub(super) struct Choking {
    /// How many neighbours are served for what they give, and how many by chance.
    pub(super) regular: usize,
    pub(super) optimistic: usize,
    pub(super) every: Duration,
}

/// One direction of a connection: what one peer asks of the other.
#[derive(Debug, Default)]
struct Lane {
    /// Requests that wait; the first one is under way.
    requests: VecDeque<u32>,
    transfer: Option<TransferId>,
    /// Whether the other side serves this one.
    open: bool,
    /// Bytes that came by this lane since the last choking.
    recent_bytes: u64,
}

/// A connection of two peers. `lanes[i]` brings pieces to `ends[i]`.
#[derive(Debug)]
struct Connection {
    ends: [u32; 2],
    lanes: [Lane; 2],
    closed: bool,
}

#[derive(Debug)]
struct Peer {
    have: Pieces,
    asked: Pieces,
    /// How many neighbours have each piece.
    spread: Vec<u16>,
    connections: Vec<u32>,
    initiated: usize,
    /// Whether the tracker knows it.
    present: bool,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Join(u32),
    Announce(u32),
    Choke(u32),
}

#[derive(Clone, Copy, Debug)]
enum Tag {
    /// From the source to the seed.
    Seed { piece: u32 },
    Lane {
        connection: u32,
        side: u8,
        piece: u32,
    },
}

struct Mesh<'a> {
    rules: &'a Rules,
    engine: Engine<Event, Tag>,
    cut: Cut,
    peers: Vec<Peer>,
    connections: Vec<Connection>,
    /// Peers that the tracker knows, without the seeds.
    known: Vec<u32>,
    /// The seeds: peers behind the nodes. The first is the one that fetches from the source.
    seeds: Range<u32>,
    /// Nodes that wait for a seed that does not give yet.
    held_back: Vec<u32>,
    seed_ready: bool,
}

pub(super) fn run(input: &Input, rules: &Rules) -> Outcome {
    let cut = Cut::new(input.blob_bytes, rules.piece_bytes);
    let first_seed = input.nodes.len() as u32;
    let seeds = first_seed
        ..first_seed
            + if rules.seed_warm {
                rules.seeds.max(1)
            } else {
                1
            };
    let machines = vec![seed_machine(input); seeds.len()];
    let peer = |_| Peer {
        have: Pieces::none(cut.pieces),
        asked: Pieces::none(cut.pieces),
        spread: vec![0; cut.pieces as usize],
        connections: Vec::new(),
        initiated: 0,
        present: false,
    };
    let mut engine = Engine::new(input, &machines);
    for node in engine.shuffled_nodes() {
        engine.at(
            input.nodes[node as usize].arrival + input.message_delay,
            Event::Join(node),
        );
    }
    let mesh = Mesh {
        rules,
        engine,
        cut,
        peers: (0..seeds.end).map(peer).collect(),
        connections: Vec::new(),
        known: Vec::new(),
        seeds,
        held_back: Vec::new(),
        seed_ready: false,
    };
    mesh.run()
}

impl Mesh<'_> {
    fn run(mut self) -> Outcome {
        while let Some(happened) = self.engine.next() {
            match happened {
                Happened::Timer(Event::Join(node)) => self.join(node),
                Happened::Timer(Event::Announce(node)) => self.announce(node),
                Happened::Timer(Event::Choke(node)) => self.choke(node),
                Happened::Arrived(transfer) => match transfer.tag {
                    Tag::Seed { piece } => self.seed_arrived(piece),
                    Tag::Lane {
                        connection,
                        side,
                        piece,
                    } => self.arrived(connection, usize::from(side), piece),
                },
                // The transfers of a dead peer go with its connections.
                Happened::Died(node, _) => self.died(node),
            }
        }
        self.engine.outcome(self.rules.policy)
    }

    fn join(&mut self, node: u32) {
        if !self.engine.alive(node) {
            return;
        }
        if self.cut.pieces == 0 {
            self.engine.finish(node);
            return;
        }
        if !self.peers[self.seeds.start as usize].present {
            self.begin_seeding();
        }
        if self.seed_ready {
            self.enter(node);
        } else {
            self.held_back.push(node);
        }
    }

    fn begin_seeding(&mut self) {
        self.seed_ready = self.rules.seed_warm || !self.rules.seed_whole_first;
        for seed in self.seeds.clone() {
            self.peers[seed as usize].present = true;
            if self.rules.seed_warm {
                self.peers[seed as usize].have.fill();
            }
            if let Some(choking) = &self.rules.choking {
                self.engine
                    .at(self.engine.now + choking.every, Event::Choke(seed));
            }
        }
        self.fetch_for_seed();
    }

    /// The tracker learns of a node. Its answer comes after a round trip, so all that come at once are
    /// in it: without that the first few would close ranks and shut the others out.
    fn enter(&mut self, node: u32) {
        if !self.engine.alive(node) {
            return;
        }
        self.peers[node as usize].present = true;
        self.known.push(node);
        self.engine
            .at(self.engine.now + self.engine.delay, Event::Announce(node));
        if let Some(choking) = &self.rules.choking {
            self.engine
                .at(self.engine.now + choking.every, Event::Choke(node));
        }
    }

    fn fetch_for_seed(&mut self) {
        let round_trip = self.engine.delay * 2;
        loop {
            let seed = &mut self.peers[self.seeds.start as usize];
            if seed.asked.held() >= self.rules.seed_pieces_at_once {
                return;
            }
            let Some(piece) = seed.have.first_lacking(&seed.asked) else {
                return;
            };
            seed.asked.insert(piece);
            self.engine.fetch(
                Source::Registry,
                self.seeds.start,
                self.cut.bytes(piece),
                round_trip,
                Tag::Seed { piece },
            );
        }
    }

    fn seed_arrived(&mut self, piece: u32) {
        self.peers[self.seeds.start as usize].asked.remove(piece);
        self.gained(self.seeds.start, piece);
        self.fetch_for_seed();
        if !self.seed_ready && self.peers[self.seeds.start as usize].have.is_full() {
            self.seed_ready = true;
            for node in std::mem::take(&mut self.held_back) {
                self.enter(node);
            }
        }
    }

    /// The peer at the other end of a connection.
    fn other(&self, connection: u32, peer: u32) -> (usize, u32) {
        let ends = self.connections[connection as usize].ends;
        let side = usize::from(ends[1] == peer);
        (side, ends[1 - side])
    }

    fn arrived(&mut self, connection: u32, side: usize, piece: u32) {
        let to = self.connections[connection as usize].ends[side];
        let lane = &mut self.connections[connection as usize].lanes[side];
        lane.transfer = None;
        lane.requests.pop_front();
        lane.recent_bytes += self.cut.bytes(piece);
        self.begin(connection, side, Duration::ZERO);
        if !self.peers[to as usize].have.has(piece) {
            self.peers[to as usize].asked.remove(piece);
            if self.peers[to as usize].have.missing() <= self.rules.endgame_pieces {
                self.withdraw(to, piece);
            }
            self.gained(to, piece);
        }
        self.request(connection, side);
    }

    /// A peer has a new piece: its neighbours may want it.
    fn gained(&mut self, peer: u32, piece: u32) {
        self.peers[peer as usize].have.insert(piece);
        if self.peers[peer as usize].have.is_full() {
            self.engine.finish(peer);
            self.part_from_complete(peer);
        }
        if self.rules.choking.is_some() {
            self.fill_slots(peer);
        }
        for at in 0..self.peers[peer as usize].connections.len() {
            let connection = self.peers[peer as usize].connections[at];
            let (side, other) = self.other(connection, peer);
            let neighbour = &mut self.peers[other as usize];
            neighbour.spread[piece as usize] += 1;
            if !neighbour.have.has(piece) && !neighbour.asked.has(piece) {
                self.request(connection, 1 - side);
            }
        }
    }

    /// Fills the pipeline of a lane.
    fn request(&mut self, connection: u32, side: usize) {
        loop {
            let at = &self.connections[connection as usize];
            let lane = &at.lanes[side];
            if at.closed || !lane.open || lane.requests.len() >= self.rules.pipeline {
                return;
            }
            let Some(piece) = self.pick(connection, side) else {
                self.lost_interest(connection, side);
                return;
            };
            let at = &mut self.connections[connection as usize];
            self.peers[at.ends[side] as usize].asked.insert(piece);
            at.lanes[side].requests.push_back(piece);
            if at.lanes[side].requests.len() == 1 {
                self.begin(connection, side, self.engine.delay * 2);
            }
        }
    }

    /// Begins the transfer of the request that is first in its lane.
    fn begin(&mut self, connection: u32, side: usize, lead: Duration) {
        let at = &mut self.connections[connection as usize];
        let Some(&piece) = at.lanes[side].requests.front().filter(|_| !at.closed) else {
            return;
        };
        let tag = Tag::Lane {
            connection,
            side: side as u8,
            piece,
        };
        let from = Source::Peer(at.ends[1 - side]);
        at.lanes[side].transfer =
            Some(
                self.engine
                    .fetch(from, at.ends[side], self.cut.bytes(piece), lead, tag),
            );
    }

    /// A rarest piece of those that the other side has and this one wants; in the endgame, one that has
    /// been asked of others already.
    fn pick(&mut self, connection: u32, side: usize) -> Option<u32> {
        let at = &self.connections[connection as usize];
        let (me, other) = (
            &self.peers[at.ends[side] as usize],
            &self.peers[at.ends[1 - side] as usize],
        );
        let mut words: Vec<u64> = me.have.offered(&me.asked, &other.have).collect();
        if words.iter().all(|&word| word == 0) {
            if me.have.missing() > self.rules.endgame_pieces {
                return None;
            }
            words = me
                .have
                .offered(&Pieces::none(self.cut.pieces), &other.have)
                .collect();
            for &piece in &at.lanes[side].requests {
                words[(piece / u64::BITS) as usize] &= !(1 << (piece % u64::BITS));
            }
        }
        // All are equally rare to one that takes its first pieces at random.
        let at_random = me.have.held() < self.rules.random_pieces;
        let rarity = |piece: u32| {
            if at_random {
                0
            } else {
                me.spread[piece as usize]
            }
        };
        let (mut rarest, mut ties) = (u16::MAX, 0u64);
        for piece in bits(&words) {
            let spread = rarity(piece);
            if spread < rarest {
                (rarest, ties) = (spread, 0);
            }
            ties += u64::from(spread == rarest);
        }
        // Among equals by chance, or all neighbours of a seed would take the same ones.
        let nth = self.engine.rng.below(ties) as usize;
        bits(&words)
            .filter(|&piece| rarity(piece) == rarest)
            .nth(nth)
    }

    /// Takes back all other requests for a piece that has come.
    fn withdraw(&mut self, peer: u32, piece: u32) {
        for at in 0..self.peers[peer as usize].connections.len() {
            let connection = self.peers[peer as usize].connections[at];
            let (side, _) = self.other(connection, peer);
            let lane = &mut self.connections[connection as usize].lanes[side];
            let Some(place) = lane.requests.iter().position(|&asked| asked == piece) else {
                continue;
            };
            lane.requests.remove(place);
            if place == 0 {
                if let Some(transfer) = lane.transfer.take() {
                    self.engine.cancel(transfer);
                }
                self.begin(connection, side, Duration::ZERO);
            }
        }
    }
}

/// The pieces of some words, in order.
fn bits(words: &[u64]) -> impl Iterator<Item = u32> + '_ {
    words.iter().enumerate().flat_map(|(at, &word)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(at as u32 * u64::BITS + bit)
        })
    })
}
