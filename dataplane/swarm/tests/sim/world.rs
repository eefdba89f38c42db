//! The event queue, the links, the source and the toy control.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use pantala_swarm::{
    Action, Author, Candidate, Download, DownloadConfig, Failure, Gone, Input, ReaderId, Recheck,
    RequestId, State,
};
use pantala_wire::{ByteRange, PieceIndex, PieceLayout, PieceRun, PieceSet, Priority};

use super::nodes::{Node, Stored, node_id, node_index};
use super::queue::{Event, Queued};
use super::rng::Rng;
use super::scenario::{Habit, Scenario, SourceFault};

mod answers;
mod shell;

const PIECE: u64 = 1 << 20;
const READER: ReaderId = ReaderId(7);
/// More events than any scenario needs: above it, something spins.
const EVENTS_MAX: u64 = 300_000;
/// Virtual time after which a run that has not ended hangs.
const TIME_MAX: Duration = Duration::from_secs(400);
/// Steps in which a piece arrives, of 4 groups each.
const STEPS: u32 = 4;

#[derive(Default)]
struct Control {
    up: bool,
    members: BTreeSet<usize>,
    holders: BTreeMap<u32, BTreeSet<usize>>,
    leases: BTreeMap<u32, (usize, Duration)>,
}

pub struct Report {
    pub actions_hash: u64,
    pub completed_count: usize,
    pub failed: Vec<(usize, String)>,
    /// Pieces that left the source, in all.
    pub source_pieces: u32,
    pub alone_fetches: u32,
    pub blames: u32,
    pub hedges: u32,
    pub ended_at: Duration,
}

pub struct World {
    scenario: Scenario,
    now: Duration,
    seq: u64,
    events: BinaryHeap<Reverse<Queued>>,
    rng: Rng,
    nodes: Vec<Node>,
    control: Control,
    source_reads: Vec<u32>,
    next_token: u64,
    hasher: DefaultHasher,
    alone_fetches: u32,
    blames: u32,
    hedges: u32,
    /// Chooses when to check what is expensive to check.
    rng_checks: Rng,
    /// Fills `Report::actions_hash`.
    pub hash_actions: bool,
    /// Prints all inputs and actions.
    pub trace: bool,
}

fn runs_of(pieces: &[u32]) -> Vec<PieceRun> {
    pieces
        .iter()
        .map(|&first| PieceRun { first, count: 1 })
        .collect()
}

impl World {
    pub fn new(scenario: Scenario) -> Self {
        let mut world = Self {
            now: Duration::ZERO,
            seq: 0,
            events: BinaryHeap::new(),
            rng: Rng::new(scenario.seed.rotate_left(17)),
            nodes: Vec::new(),
            control: Control {
                up: true,
                ..Control::default()
            },
            source_reads: vec![0; scenario.piece_count as usize],
            next_token: 0,
            hasher: DefaultHasher::new(),
            alone_fetches: 0,
            blames: 0,
            hedges: 0,
            rng_checks: Rng::new(scenario.seed),
            hash_actions: false,
            trace: false,
            scenario,
        };
        for index in 0..world.scenario.nodes.len() {
            let store = vec![None; world.scenario.piece_count as usize];
            let node = world.fresh_node(index, 0, store);
            world.nodes.push(node);
            let plan = world.scenario.nodes[index].clone();
            world.at(plan.joins_at, Event::Join { node: index });
            if let Some(after) = plan.leaves_after {
                world.at(plan.joins_at + after, Event::Leave { node: index });
            }
            if let Some((at, silent)) = plan.crashes_at {
                world.at(
                    plan.joins_at + at,
                    Event::Crash {
                        node: index,
                        silent,
                    },
                );
            }
            if let Some(at) = plan.loses_at {
                world.at(plan.joins_at + at, Event::Lose { node: index });
            }
        }
        for (from, until, noticed) in world.scenario.control_down.clone() {
            world.at(from, Event::ControlDown { noticed });
            if until < Duration::MAX {
                world.at(until, Event::ControlUp);
            }
        }
        world
    }

    fn fresh_node(&self, index: usize, epoch: u32, store: Vec<Option<Stored>>) -> Node {
        let piece_count = self.scenario.piece_count;
        let layout = PieceLayout::new(u64::from(piece_count) * PIECE).unwrap();
        let mut held = PieceSet::empty(piece_count);
        for piece in 0..piece_count {
            if store[piece as usize].is_some() {
                held.insert(PieceIndex(piece));
            }
        }
        let config = DownloadConfig::default();
        let seed = self.scenario.seed ^ index as u64;
        let mut core = Download::new(config.clone(), layout, held, seed, self.now);
        for (piece, stored) in store.iter().enumerate() {
            if let Some(stored) = stored {
                core.set_author(PieceIndex(piece as u32), stored.author);
            }
        }
        Node {
            alive: false,
            epoch,
            core,
            config,
            store,
            live: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            offered: BTreeMap::new(),
            blamed: BTreeSet::new(),
            children: BTreeMap::new(),
            leases: BTreeMap::new(),
            asked_at: None,
            tick_at: None,
            reader_at: None,
            completed: false,
            active_uploads: 0,
            rechecking: BTreeSet::new(),
            verifying: false,
        }
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.seq += 1;
        let seq = self.seq;
        self.events.push(Reverse(Queued { at, seq, event }));
    }
    fn after(&mut self, delay: Duration, event: Event) {
        self.at(self.now + delay, event);
    }
    fn delay(&mut self) -> Duration {
        self.rng.ms(0, self.scenario.delay_ms_max)
    }
    fn deliver(&mut self, node: usize, delay: Duration, input: Input) {
        let epoch = self.nodes[node].epoch;
        self.after(delay, Event::Deliver { node, epoch, input });
    }
    fn current(&self, node: usize, epoch: u32) -> bool {
        self.nodes[node].alive && self.nodes[node].epoch == epoch
    }

    /// Runs to the end and checks how it ended.
    pub fn run(mut self) -> Report {
        let mut count = 0;
        while let Some(Reverse(queued)) = self.events.pop() {
            assert!(queued.at >= self.now);
            self.now = queued.at;
            count += 1;
            assert!(count < EVENTS_MAX, "it spins");
            assert!(self.now < TIME_MAX, "it hangs");
            self.step(queued.event);
        }
        self.check_end()
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Tick { node, epoch } => {
                if self.current(node, epoch) && self.nodes[node].tick_at == Some(self.now) {
                    self.nodes[node].tick_at = None;
                    self.input(node, Input::Tick);
                }
            }
            Event::Join { node } => self.join(node),
            Event::Leave { node } => {
                if self.nodes[node].alive {
                    self.nodes[node].reader_at = None;
                    self.input(node, Input::Unwant { reader: READER });
                    self.input(node, Input::FetchAllEnd);
                }
            }
            Event::Crash { node, silent } => self.crash(node, silent),
            Event::Lose { node } => self.lose(node),
            Event::Deliver { node, epoch, input } => {
                if self.current(node, epoch) {
                    self.deliver_now(node, input);
                }
            }
            Event::Subscribe {
                child,
                epoch,
                parent,
                token,
            } => {
                self.subscribe_arrived(child, epoch, parent, token);
            }
            Event::Have {
                child,
                token,
                parent,
                pieces,
                complete,
            } => {
                if self.nodes[child].subscriptions.get(&parent) == Some(&token) {
                    let offered = self.nodes[child].offered.entry(parent).or_default();
                    offered.extend(&pieces);
                    if complete {
                        offered.extend(0..self.scenario.piece_count);
                    }
                    let runs = runs_of(&pieces);
                    let parent = node_id(parent);
                    self.input(
                        child,
                        Input::Have {
                            parent,
                            runs,
                            complete,
                        },
                    );
                }
            }
            Event::Gone {
                child,
                token,
                parent,
                reason,
            } => {
                if self.nodes[child].subscriptions.get(&parent) == Some(&token) {
                    self.nodes[child].subscriptions.remove(&parent);
                    self.nodes[child].offered.remove(&parent);
                    let parent = node_id(parent);
                    self.input(child, Input::ParentGone { parent, reason });
                }
            }
            Event::PeerStep {
                child,
                epoch,
                parent,
                request,
                piece,
                step,
            } => {
                if self.current(child, epoch) {
                    self.peer_step(child, parent, request, piece, step);
                } else {
                    self.upload_ended(parent, step);
                }
            }
            Event::SourceStep {
                node,
                epoch,
                request,
                run,
                piece,
                step,
            } => {
                if self.current(node, epoch) && self.nodes[node].live.contains_key(&request) {
                    self.source_step(node, request, run, piece, step);
                }
            }
            Event::Recheck { node, epoch, piece } => {
                if self.current(node, epoch) && self.nodes[node].rechecking.remove(&piece) {
                    self.recheck(node, piece);
                }
            }
            Event::Asked {
                node,
                epoch,
                wanted,
            } => self.control_asked(node, epoch, &wanted),
            Event::Returned { node, pieces } => {
                for piece in pieces.range() {
                    if self.control.leases.get(&piece).is_some_and(|l| l.0 == node) {
                        self.control.leases.remove(&piece);
                    }
                }
            }
            Event::Announced { node, pieces } => {
                if self.control.up && self.nodes[node].alive {
                    for piece in pieces {
                        self.control.leases.remove(&piece);
                        self.control.holders.entry(piece).or_default().insert(node);
                    }
                }
            }
            Event::Buried { node } => {
                if !self.nodes[node].alive {
                    self.control.members.remove(&node);
                    self.control.holders.values_mut().for_each(|h| {
                        h.remove(&node);
                    });
                    self.control.leases.retain(|_, lease| lease.0 != node);
                    self.push_parents();
                }
            }
            Event::ControlDown { noticed } => {
                self.control = Control::default();
                for node in 0..self.nodes.len() {
                    if noticed && self.nodes[node].alive {
                        let delay = self.delay();
                        self.deliver(node, delay, Input::ControlDown);
                    }
                }
            }
            Event::ControlUp => {
                self.control.up = true;
                for node in 0..self.nodes.len() {
                    if self.nodes[node].alive {
                        self.register(node);
                    }
                }
            }
        }
    }

    /// A node comes to control, anew or again, and says what it holds.
    fn register(&mut self, node: usize) {
        self.deliver(node, Duration::ZERO, Input::ControlDown);
        self.deliver(node, Duration::from_millis(1), Input::ControlUp);
        self.control.members.insert(node);
        let held = |(p, s): (usize, &Option<Stored>)| s.map(|_| p as u32);
        let pieces = self.nodes[node]
            .store
            .iter()
            .enumerate()
            .filter_map(held)
            .collect();
        self.step(Event::Announced { node, pieces });
        self.push_parents();
    }

    fn join(&mut self, node: usize) {
        self.nodes[node].alive = true;
        let plan = self.scenario.nodes[node].clone();
        let available = plan.credential;
        self.input(node, Input::SourceChanged { available });
        if self.control.up {
            self.input(node, Input::ControlUp);
            self.control.members.insert(node);
            let held = |(p, s): (usize, &Option<Stored>)| s.map(|_| p as u32);
            let pieces = self.nodes[node]
                .store
                .iter()
                .enumerate()
                .filter_map(held)
                .collect();
            self.step(Event::Announced { node, pieces });
            self.push_parents();
        }
        if let Some((first, _)) = plan.reads {
            self.nodes[node].reader_at = Some(first);
            self.want(node);
        }
        if plan.fill {
            let priority = if self.rng.chance(80) {
                Priority::Bulk
            } else {
                Priority::Prefetch
            };
            self.input(node, Input::FetchAll { priority });
        }
    }

    fn want(&mut self, node: usize) {
        let (Some((_, end)), Some(at)) =
            (self.scenario.nodes[node].reads, self.nodes[node].reader_at)
        else {
            return;
        };
        let held = |piece: u32| self.nodes[node].store[piece as usize].is_some();
        let next = (at..end).find(|&piece| !held(piece)).unwrap_or(end);
        if next == end {
            self.nodes[node].reader_at = None;
            return self.input(node, Input::Unwant { reader: READER });
        }
        self.nodes[node].reader_at = Some(next);
        let range = ByteRange::new(u64::from(next) * PIECE + 5, u64::from(end) * PIECE).unwrap();
        let priority = if node == 0 {
            Priority::Fault
        } else {
            Priority::Client
        };
        self.input(
            node,
            Input::Want {
                reader: READER,
                range,
                priority,
            },
        );
    }

    fn crash(&mut self, node: usize, silent: bool) {
        if !self.nodes[node].alive {
            return;
        }
        let epoch = self.nodes[node].epoch + 1;
        let children = self.nodes[node].children.clone();
        let mut store = self.nodes[node].store.clone();
        // A piece that was written last may not have become durable.
        for stored in &mut store {
            if self.rng.chance(10) {
                *stored = None;
            }
        }
        self.nodes[node] = self.fresh_node(node, epoch, store);
        if !silent {
            for (child, token) in children {
                let delay = self.delay();
                let reason = Gone::Closed;
                self.after(
                    delay,
                    Event::Gone {
                        child,
                        token,
                        parent: node,
                        reason,
                    },
                );
            }
        }
        self.after(Duration::from_secs(1), Event::Buried { node });
        if let Some(after) = self.scenario.nodes[node].returns_after {
            self.after(after, Event::Join { node });
        }
    }

    fn lose(&mut self, node: usize) {
        let held = |(p, s): (usize, &Option<Stored>)| s.map(|_| p as u32);
        let held: Vec<u32> = self.nodes[node]
            .store
            .iter()
            .enumerate()
            .filter_map(held)
            .collect();
        if !self.nodes[node].alive || held.is_empty() {
            return;
        }
        let piece = held[self.rng.range(0, held.len() as u64 - 1) as usize];
        self.nodes[node].store[piece as usize] = None;
        if let Some(holders) = self.control.holders.get_mut(&piece) {
            holders.remove(&node);
        }
        self.nodes[node].completed = false;
        self.input(
            node,
            Input::PieceLost {
                piece: PieceIndex(piece),
            },
        );
    }
}
