//! A cluster in virtual time: the cores of production, and a shell around them that does what the
//! node's and control's shells do.
//!
//! What is real: `pantala_control::core::Core` and `pantala_swarm::Download`, unchanged. What is
//! modelled: messages with a delay, connections that carry one piece after the other in the order of
//! their priority, the turns of a serving node, the pauses between two `Have` frames, requests to the
//! registry with a first byte and a limit, sessions with control that are lost and come back. What is
//! left out: the disk and the processor, which are taken to be fast enough, and the opening of blobs of
//! unknown size.
//!
//! # Faults
//!
//! Nodes crash and come back with their disk, fall silent, slow down, send wrong bytes, sign false
//! claims, boast of what they do not hold, take requests and never answer. Messages to control are lost
//! and cost the session; messages between nodes are lost and cost the connection. The registry refuses
//! requests above its limit. Control is cut off, or starts anew with empty memory.

mod control;
mod engine;
mod faults;
mod node;
mod peer;
mod queue;
mod report;
mod source;
mod topology;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use pantala_control::core::CoreConfig;
use pantala_swarm::{DownloadConfig, RequestId};
use pantala_wire::{BlobDigest, NodeId, PieceLayout};
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::check::{Mutation, Referee, Violation};
use crate::network::{FlowId, Network};
use crate::rng::{Rng, mix};
use crate::scenario::{Habit, Scenario, millis, seconds};

use control::Control;
use node::{Node, PullState, Session};
use queue::{Event, PeerMessage, Queue, SourceAsk};
pub use report::Report;
pub use topology::Topology;

/// Pause between two `Have` frames, as in the node.
const HAVE_INTERVAL: Duration = Duration::from_millis(2);
/// From a download's last piece to its sha256: what is left to hash then, and one sync of the disk.
const VERIFY_TIME: Duration = Duration::from_millis(3);
/// Width of the windows over which the registry's peak is measured.
const PEAK_WINDOW: Duration = Duration::from_millis(100);
/// Width of the steps in which arrivals are counted, and how many of them are.
pub const TIMELINE_STEP: Duration = Duration::from_millis(20);
const TIMELINE_STEPS_MAX: usize = 5_000;
/// Books that are dear to check are checked after one step in so many.
const DEAR_CHECK_EVERY: u64 = 64;

/// How the cores are set: what production uses, unless an experiment says otherwise.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Of each download.
    pub download: DownloadConfig,
    /// Of control.
    pub core: CoreConfig,
}

/// What a flow carries.
#[derive(Debug, Clone, Copy)]
enum FlowUse {
    Upload {
        parent: u32,
        child: u32,
    },
    Source {
        node: u32,
        epoch: u32,
        ask: SourceAsk,
    },
}

/// Counts of what happened.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    pub(crate) steps: u64,
    pub(crate) inputs: u64,
    pub(crate) control_messages: u64,
    pub(crate) pieces_from_peers: u64,
    pub(crate) pieces_from_source: u64,
    pub(crate) alone_fetches: u64,
    pub(crate) wasted_bytes: u64,
    pub(crate) hedges: u64,
    pub(crate) refusals: u64,
    pub(crate) blames: u64,
    pub(crate) leases: u64,
    pub(crate) lease_waits: u64,
    /// Pieces from peers and from the source in each [`TIMELINE_STEP`].
    pub(crate) timeline: Vec<(u32, u32)>,
}

impl Counts {
    /// A piece has arrived at `at`, after the first pull could begin.
    fn arrived(&mut self, at: Duration, is_from_source: bool) {
        let since = at.saturating_sub(SETTLE_TIME);
        let step = (since.as_nanos() / TIMELINE_STEP.as_nanos()) as usize;
        if step >= TIMELINE_STEPS_MAX {
            return;
        }
        if self.timeline.len() <= step {
            self.timeline.resize(step + 1, (0, 0));
        }
        let (peers, source) = &mut self.timeline[step];
        *(if is_from_source { source } else { peers }) += 1;
    }
}

/// The simulation of one scenario.
pub struct World {
    scenario: Scenario,
    policy: Policy,
    now: Duration,
    queue: Queue,
    net: Network,
    topology: Topology,
    rng: Rng,
    nodes: Vec<Node>,
    by_id: HashMap<NodeId, u32>,
    digests: Vec<BlobDigest>,
    by_digest: HashMap<BlobDigest, u32>,
    layouts: Vec<PieceLayout>,
    flows: HashMap<FlowId, FlowUse>,
    finished: Vec<FlowId>,
    control: Control,
    /// Requests that the registry would take now.
    registry_tokens: f64,
    registry_at: Duration,
    /// Pulls that have not ended.
    open_pulls: usize,
    next_token: u64,
    /// Somebody forges: authors are kept track of.
    has_forgers: bool,
    quantum: Duration,
    referee: Referee,
    counts: Counts,
    broken: Option<Violation>,
}

fn key_of(seed: u64, node: u32) -> Option<Ed25519KeyPair> {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&mix(seed ^ 0xf0).to_le_bytes());
    bytes[8..12].copy_from_slice(&node.to_le_bytes());
    Ed25519KeyPair::from_seed_unchecked(&bytes).ok()
}

/// A node's name. Only who signs something false needs a key to it.
fn name_of(seed: u64, node: u32, habit: Habit) -> NodeId {
    if habit == Habit::Forges
        && let Some(key) = key_of(seed, node)
        && let Ok(id) = NodeId::try_from(key.public_key().as_ref())
    {
        return id;
    }
    let mut bytes = [0; 32];
    for (number, chunk) in bytes.chunks_mut(8).enumerate() {
        let word = mix(seed.wrapping_add(u64::from(node) << 8 | number as u64) ^ 0x1d);
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes[28..].copy_from_slice(&node.to_le_bytes());
    NodeId::new(bytes)
}

impl World {
    /// The world of a scenario, with the cores set as `policy` says.
    pub fn new(scenario: Scenario, policy: Policy, mutation: Mutation) -> Self {
        let mut net = Network::new(millis(scenario.share_every_ms));
        let topology = Topology::new(&scenario, &mut net);
        net.watch(topology.registry(), PEAK_WINDOW);
        let digests: Vec<BlobDigest> = (0..scenario.blobs.len())
            .map(|number| {
                let mut bytes = [7; 32];
                bytes[..8].copy_from_slice(&mix(scenario.seed ^ number as u64).to_le_bytes());
                bytes[8..16].copy_from_slice(&(number as u64).to_le_bytes());
                BlobDigest::new(bytes)
            })
            .collect();
        let layouts = scenario
            .blobs
            .iter()
            .map(|&bytes| PieceLayout::new(bytes).expect("a scenario's blobs are no larger"))
            .collect();
        let has_forgers = scenario.groups.iter().any(|g| g.habit == Habit::Forges);
        let referee = Referee::new(&scenario, policy.core.clone(), mutation);
        let mut world = Self {
            now: Duration::ZERO,
            queue: Queue::default(),
            rng: Rng::new(scenario.seed),
            nodes: Vec::new(),
            by_id: HashMap::new(),
            by_digest: digests.iter().zip(0..).map(|(d, n)| (*d, n)).collect(),
            digests,
            layouts,
            flows: HashMap::new(),
            finished: Vec::new(),
            control: Control::new(&policy.core),
            registry_tokens: scenario.registry.requests_per_s,
            registry_at: Duration::ZERO,
            open_pulls: 0,
            next_token: 0,
            has_forgers,
            quantum: millis(scenario.quantum_ms),
            referee,
            counts: Counts::default(),
            broken: None,
            net,
            topology,
            policy,
            scenario,
        };
        world.populate();
        world
    }

    fn populate(&mut self) {
        let groups = self.scenario.groups.clone();
        for (number, group) in groups.iter().enumerate() {
            for _ in 0..group.count {
                let index = self.nodes.len() as u32;
                let id = name_of(self.scenario.seed, index, group.habit);
                let mut pulls = group.pulls.clone();
                if let Some(draws) = &group.draws {
                    let mut drawn = BTreeSet::new();
                    let blobs = self.scenario.blobs.len() as u64;
                    while drawn.len() < (draws.count as usize).min(blobs as usize) {
                        // The lower of two draws: the first blobs are the hot ones.
                        let blob = self.rng.below(blobs).min(self.rng.below(blobs)) as u32;
                        if drawn.insert(blob) {
                            pulls.push(crate::scenario::Pull {
                                blob,
                                ..draws.pull.clone()
                            });
                        }
                    }
                }
                let mut states = Vec::new();
                for pull in pulls {
                    let at = seconds(pull.at_s) + self.rng.time(seconds(pull.spread_s));
                    states.push(PullState {
                        pull,
                        at,
                        started: None,
                        done: None,
                        failed: None,
                    });
                }
                self.by_id.insert(id, index);
                self.nodes.push(Node {
                    id,
                    group: number as u32,
                    habit: group.habit,
                    has_source: group.has_source,
                    alive: false,
                    epoch: 0,
                    session: Session::default(),
                    tasks: BTreeMap::new(),
                    stores: BTreeMap::new(),
                    server: node::Server::default(),
                    connections: BTreeSet::new(),
                    shut_out: Rc::default(),
                    accusations: Vec::new(),
                    pulls: states,
                });
                self.queue
                    .push(Duration::ZERO, Event::Start { node: index });
                for (pull, state) in self.nodes[index as usize].pulls.iter().enumerate() {
                    let number = pull as u32;
                    // After the sessions stand: nodes are there before they are asked for something.
                    let at = state.at + SETTLE_TIME;
                    self.queue.push(
                        at,
                        Event::Pull {
                            node: index,
                            number,
                        },
                    );
                    self.open_pulls += 1;
                }
                if let Some(fault) = &group.fault
                    && self.rng.chance(fault.part)
                {
                    let at = seconds(fault.at_s) + self.rng.time(seconds(fault.spread_s));
                    let at = at + SETTLE_TIME;
                    self.queue.push(at, Event::Fault { node: index });
                }
            }
        }
        for (number, outage) in self.scenario.outages.iter().enumerate() {
            let number = number as u32;
            let (from, to) = (outage.at_s, outage.at_s + outage.for_s);
            for (at, begins) in [(from, true), (to, false)] {
                let at = seconds(at) + SETTLE_TIME;
                self.queue.push(at, Event::Outage { number, begins });
            }
        }
    }

    /// Runs to the end, or to the first rule that is broken.
    pub fn run(mut self) -> Report {
        let started = std::time::Instant::now();
        let limit = seconds(self.scenario.limit_s);
        while self.broken.is_none() && self.open_pulls > 0 {
            let next = match (self.net.next_event(), self.queue.next_at()) {
                (Some(flow), Some(event)) => flow.min(event),
                (Some(at), None) | (None, Some(at)) => at,
                (None, None) => break,
            };
            if next > limit {
                break;
            }
            self.now = self.now.max(next);
            self.step();
        }
        self.check_end();
        self.report(started.elapsed())
    }

    fn step(&mut self) {
        let now = self.now;
        let mut finished = std::mem::take(&mut self.finished);
        self.net.advance(now, &mut finished);
        for flow in finished.drain(..) {
            self.counts.steps += 1;
            if let Some(used) = self.flows.remove(&flow) {
                self.flow_finished(used);
            }
        }
        self.finished = finished;
        while self.queue.next_at().is_some_and(|at| at <= now) {
            let Some((_, event)) = self.queue.pop() else {
                break;
            };
            self.counts.steps += 1;
            self.happen(event);
            if self.broken.is_some() {
                return;
            }
        }
    }

    fn flow_finished(&mut self, used: FlowUse) {
        match used {
            FlowUse::Upload { parent, child } => self.upload_finished(parent, child),
            FlowUse::Source { node, epoch, ask } => self.source_flowed(node, epoch, ask),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start { node } => self.start(node),
            Event::Pull { node, number } => self.pull(node, number),
            Event::Wake { node, blob } => self.wake(node, blob),
            Event::Tell { node, blob } => self.tell_children(node, blob),
            Event::Peer {
                from,
                to,
                epoch,
                message,
            } => self.peer_message(from, to, epoch, message),
            Event::Broken { child, parent } => self.broken_for_child(child, parent),
            Event::SourceAsk { node, epoch, ask } => self.source_asked(node, epoch, ask),
            Event::SourceAnswer { node, epoch, ask } => self.source_answers(node, epoch, ask),
            Event::SourcePiece {
                node,
                epoch,
                ask,
                piece,
            } => self.source_piece(node, epoch, ask, piece),
            Event::SourceRefusal { node, epoch, ask } => self.source_refused(node, epoch, ask),
            Event::Verified { node, epoch, blob } => self.verified(node, epoch, blob),
            Event::Connect { node, epoch } => self.connect(node, epoch),
            Event::Hello {
                node,
                epoch,
                session,
            } => self.hello(node, epoch, session),
            Event::Welcome { node, session } => self.welcome(node, session),
            Event::ToControl {
                node,
                session,
                message,
            } => self.control_hears(node, session, *message),
            Event::ToNode {
                node,
                session,
                message,
            } => self.node_hears(node, session, *message),
            Event::SessionLost { node, session } => self.session_lost(node, session),
            Event::SessionLeft { node, session } => self.session_left(node, session),
            Event::ControlTick => self.control_tick(),
            Event::Outage { number, begins } => self.outage(number, begins),
            Event::Fault { node } => self.fault(node),
        }
    }

    /// One way from one node to another, or to control (`u32::MAX`): each pair has its own, so that
    /// messages stay in order.
    fn delay(&self, from: u32, to: u32) -> Duration {
        let messages = &self.scenario.messages;
        let share = mix(self.scenario.seed ^ (u64::from(from) << 32 | u64::from(to)));
        let jitter = (share >> 11) as f64 / (1u64 << 53) as f64 * messages.jitter_ms;
        millis(messages.delay_ms + jitter)
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.queue.push(self.now + delay, event);
    }

    /// Sends something to another node; it may be lost, and the connection with it.
    fn send(&mut self, from: u32, to: u32, message: PeerMessage) {
        let delay = self.delay(from, to);
        if self.rng.chance(self.scenario.messages.peer_loss) {
            return self.lose_connection(from, to, &message);
        }
        let epoch = self.nodes[to as usize].epoch;
        self.after(
            delay,
            Event::Peer {
                from,
                to,
                epoch,
                message,
            },
        );
    }

    /// The next instant at which inputs are taken.
    fn quantised(&self, at: Duration) -> Duration {
        if self.quantum.is_zero() {
            return at;
        }
        let quantum = self.quantum.as_nanos() as u64;
        Duration::from_nanos((at.as_nanos() as u64).div_ceil(quantum) * quantum)
    }

    /// A rule is broken: the run ends here.
    fn breaks(&mut self, violation: Violation) {
        if self.broken.is_none() {
            self.broken = Some(violation);
        }
    }

    fn is_current(&self, node: u32, epoch: u32) -> bool {
        let node = &self.nodes[node as usize];
        node.alive && node.epoch == epoch
    }

    fn request_of(ask: SourceAsk) -> Option<RequestId> {
        match ask {
            SourceAsk::Fetch { request, .. } => Some(request),
            SourceAsk::Recheck { .. } => None,
        }
    }
}

/// Nodes start so long before the first pull: their sessions stand by then.
const SETTLE_TIME: Duration = Duration::from_secs(1);
