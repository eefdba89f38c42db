//! The core driven by a simulated cluster: one seed, virtual time, faults.
//!
//! The fault model: nodes crash and come back as new processes, lose their session and come back as
//! the same process, drop blobs, stop in the middle of a lease, report parents that failed, and
//! control itself restarts empty. Messages of one session arrive in order, at once or late.
//!
//! What is checked at every step stands in [`Referee`]; it knows only what went over the wire.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pantala_control::core::config::{CHILDREN_HARD_MAX, LEASE_RUN_MAX, PARENTS_MAX};
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, RefusedReason, TaskReport, ToNode};
use pantala_control::{Labels, Peer};
use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex, PieceRun, PieceSet};
use ring::signature::{Ed25519KeyPair, KeyPair};

const PIECE: u64 = 1 << 20;

/// SplitMix64: small, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

fn id(number: usize) -> NodeId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    NodeId::new(bytes)
}

fn blob(number: usize) -> BlobDigest {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    BlobDigest::new(bytes)
}

/// What a node knows of one blob.
struct Download {
    held: PieceSet,
    complete: bool,
    open: bool,
    leases: Vec<(PieceRun, Duration)>,
    fetching: VecDeque<u32>,
    parents: Vec<NodeId>,
    ask_at: Option<Duration>,
    opened: bool,
}

struct SimNode {
    id: NodeId,
    connected: bool,
    /// The process has had a session.
    resumed: bool,
    alive: bool,
    reconnect_at: Option<Duration>,
    downloads: BTreeMap<BlobDigest, Download>,
}

/// Who holds a lease on what, as told by the messages alone.
#[derive(Default)]
struct Referee {
    leases: BTreeMap<(BlobDigest, u32), (NodeId, Duration)>,
    /// How often each piece was leased.
    granted: BTreeMap<(BlobDigest, u32), u32>,
    shut_out: BTreeSet<NodeId>,
}

struct Sim {
    seed: u64,
    rng: Rng,
    now: Duration,
    config: CoreConfig,
    core: Core,
    nodes: Vec<SimNode>,
    blobs: Vec<(BlobDigest, u32)>,
    referee: Referee,
    source_reads: BTreeMap<(BlobDigest, u32), u32>,
    /// Nodes fail, so that exactly-once cannot be had.
    has_faults: bool,
}

impl Sim {
    fn new(seed: u64, node_count: usize, blobs: &[u32], has_faults: bool) -> Self {
        let config = CoreConfig {
            seed,
            ..CoreConfig::default()
        };
        let mut sim = Self {
            seed,
            rng: Rng(seed),
            now: Duration::from_secs(1),
            core: Core::new(config.clone(), Duration::from_secs(1)),
            config,
            nodes: Vec::new(),
            blobs: blobs
                .iter()
                .enumerate()
                .map(|(number, &count)| (blob(number), count))
                .collect(),
            referee: Referee::default(),
            source_reads: BTreeMap::new(),
            has_faults,
        };
        for number in 0..node_count {
            sim.nodes.push(SimNode {
                id: id(number),
                connected: false,
                resumed: false,
                alive: true,
                reconnect_at: Some(sim.now),
                downloads: BTreeMap::new(),
            });
        }
        sim
    }

    fn piece_count(&self, digest: &BlobDigest) -> u32 {
        self.blobs.iter().find(|(d, _)| d == digest).unwrap().1
    }

    fn send(&mut self, node: usize, message: FromNode) {
        if !self.nodes[node].connected {
            return;
        }
        let id = self.nodes[node].id;
        self.referee_sent(id, &message);
        let mut out = Vec::new();
        self.core.handle(self.now, id, message, &mut out);
        self.receive(out);
    }

    /// What a node says ends leases in the referee's book.
    fn referee_sent(&mut self, id: NodeId, message: &FromNode) {
        let (now, ttl) = (self.now, self.config.lease_ttl);
        let book = &mut self.referee.leases;
        match message {
            FromNode::Fetched { digest, pieces } => {
                for piece in pieces.iter().flat_map(PieceRun::range) {
                    if book.get(&(*digest, piece)).is_some_and(|l| l.0 == id) {
                        book.remove(&(*digest, piece));
                    }
                }
                for ((other, _), lease) in book.iter_mut() {
                    if other == digest && lease.0 == id && lease.1 > now {
                        lease.1 = now + ttl;
                    }
                }
            }
            FromNode::ReturnLease { digest, pieces } => {
                for piece in pieces.iter().flat_map(PieceRun::range) {
                    if book.get(&(*digest, piece)).is_some_and(|l| l.0 == id) {
                        book.remove(&(*digest, piece));
                    }
                }
            }
            FromNode::CloseTask { digest }
            | FromNode::Holding {
                digest,
                complete: true,
                ..
            } => {
                book.retain(|(other, _), lease| other != digest || lease.0 != id);
            }
            FromNode::Announce { holdings, last } => {
                book.retain(|(other, _), lease| {
                    lease.0 != id || !(*last || holdings.iter().any(|h| h.digest == *other))
                });
            }
            _ => {}
        }
    }

    fn receive(&mut self, out: Vec<(NodeId, ToNode)>) {
        for (to, message) in out {
            let Some(index) = self.nodes.iter().position(|n| n.id == to) else {
                continue;
            };
            self.check(to, &message);
            let now = self.now;
            let node = &mut self.nodes[index];
            if !node.connected {
                continue;
            }
            match message {
                ToNode::Parents { digest, peers } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        download.parents = peers.iter().map(|p| p.node).collect();
                    }
                }
                ToNode::Lease {
                    digest,
                    pieces,
                    expires_in,
                } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        download.leases.push((pieces, now + expires_in));
                        download.fetching.extend(pieces.range());
                        download.ask_at = None;
                    }
                }
                ToNode::LeaseWait {
                    digest,
                    retry_after,
                } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        download.ask_at = Some(now + retry_after);
                    }
                }
                ToNode::Refused { digest, reason } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        assert!(
                            matches!(reason, RefusedReason::UnknownTask | RefusedReason::Full),
                            "seed {}: {reason:?}",
                            self.seed
                        );
                        download.opened = false;
                    }
                }
                ToNode::ShutOut(_) => {}
            }
        }
    }

    /// The invariants that every answer must keep.
    fn check(&mut self, to: NodeId, message: &ToNode) {
        let seed = self.seed;
        match message {
            ToNode::Lease {
                digest,
                pieces,
                expires_in,
            } => {
                assert!(
                    !self.referee.shut_out.contains(&to),
                    "seed {seed}: lease to a shut-out node"
                );
                assert!((1..=LEASE_RUN_MAX).contains(&pieces.count), "seed {seed}");
                assert!(
                    pieces.range().end <= self.piece_count(digest),
                    "seed {seed}"
                );
                for piece in pieces.range() {
                    let key = (*digest, piece);
                    if let Some((holder, expires)) = self.referee.leases.get(&key) {
                        assert!(
                            *expires <= self.now,
                            "seed {seed}: {piece} of {digest} leased to {to:?} while {holder:?} has it"
                        );
                    }
                    if !self.has_faults {
                        let holder = self.nodes.iter().find(|n| {
                            n.downloads
                                .get(digest)
                                .is_some_and(|d| d.held.contains(PieceIndex(piece)))
                        });
                        assert!(holder.is_none(), "seed {seed}: {piece} leased though held");
                    }
                    self.referee
                        .leases
                        .insert(key, (to, self.now + *expires_in));
                    *self.referee.granted.entry(key).or_default() += 1;
                }
            }
            ToNode::Parents { peers, .. } => {
                assert!(peers.len() <= PARENTS_MAX, "seed {seed}");
                let distinct: BTreeSet<NodeId> = peers.iter().map(|p: &Peer| p.node).collect();
                assert_eq!(distinct.len(), peers.len(), "seed {seed}: a parent twice");
                assert!(!distinct.contains(&to), "seed {seed}: its own parent");
                assert!(
                    distinct.is_disjoint(&self.referee.shut_out),
                    "seed {seed}: a shut-out parent"
                );
            }
            _ => {}
        }
    }

    fn connect(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let info = NodeInfo {
            address: ([127, 0, 0, 1], index as u16 + 1).into(),
            labels: Labels {
                rack: format!("rack {}", index / 8),
                ..Labels::default()
            },
            resumed: node.resumed,
        };
        let id = node.id;
        let fresh = !node.resumed;
        node.connected = true;
        node.resumed = true;
        node.reconnect_at = None;
        if fresh {
            self.referee.leases.retain(|_, lease| lease.0 != id);
        }
        let mut out = Vec::new();
        assert!(self.core.joined(self.now, id, info, &mut out));
        self.receive(out);
        let mut holdings = Vec::new();
        for (digest, download) in &mut self.nodes[index].downloads {
            let mut fetching = PieceSet::empty(download.held.piece_count());
            for &piece in &download.fetching {
                fetching.insert(PieceIndex(piece));
            }
            download.leases.clear();
            download.fetching.clear();
            download.ask_at = Some(self.now);
            download.opened = true;
            holdings.push(TaskReport {
                digest: *digest,
                size_bytes: u64::from(download.held.piece_count()) * PIECE,
                has_source: true,
                wanted: download.open,
                complete: download.complete,
                held: download.held.runs(),
                fetching: fetching.runs(),
            });
        }
        let last = true;
        self.send(index, FromNode::Announce { holdings, last });
    }

    fn disconnect(&mut self, index: usize, back_in: Duration) {
        let node = &mut self.nodes[index];
        if node.connected {
            node.connected = false;
            let id = node.id;
            self.core.left(self.now, id);
            // After the grace the core may give its leases to others.
            let until = self.now + self.config.reconnect_grace;
            for lease in self.referee.leases.values_mut().filter(|l| l.0 == id) {
                lease.1 = lease.1.min(until);
            }
        }
        self.nodes[index].reconnect_at = Some(self.now + back_in);
    }

    fn crash(&mut self, index: usize) {
        let back_in = Duration::from_millis(self.rng.below(5000));
        self.disconnect(index, back_in);
        let node = &mut self.nodes[index];
        node.resumed = false;
        for download in node.downloads.values_mut() {
            download.fetching.clear();
            download.leases.clear();
            download.parents.clear();
        }
    }

    fn restart_control(&mut self) {
        self.core = Core::new(self.config.clone(), self.now);
        self.referee.leases.clear();
        for index in 0..self.nodes.len() {
            let back_in = Duration::from_millis(self.rng.below(1500));
            self.nodes[index].connected = false;
            self.nodes[index].reconnect_at = Some(self.now + back_in);
        }
    }

    fn start_download(&mut self, index: usize, digest: BlobDigest) {
        let count = self.piece_count(&digest);
        self.nodes[index].downloads.insert(
            digest,
            Download {
                held: PieceSet::empty(count),
                complete: false,
                open: true,
                leases: Vec::new(),
                fetching: VecDeque::new(),
                parents: Vec::new(),
                ask_at: Some(self.now),
                opened: false,
            },
        );
    }

    /// One node does a little of what it has to do for one of its blobs.
    fn work(&mut self, index: usize, digest: BlobDigest) {
        let now = self.now;
        let node = &self.nodes[index];
        let (connected, count) = (node.connected, self.piece_count(&digest));
        let download = &node.downloads[&digest];
        if download.complete || !download.open {
            return;
        }
        if connected && !download.opened {
            let held = download.held.runs();
            self.nodes[index].downloads.get_mut(&digest).unwrap().opened = true;
            self.send(
                index,
                FromNode::OpenTask {
                    digest,
                    size_bytes: u64::from(count) * PIECE,
                    has_source: true,
                    held,
                    complete: false,
                },
            );
        }
        // From a parent: any piece that one of them holds.
        let download = &self.nodes[index].downloads[&digest];
        let mut missing: Vec<u32> = (0..count)
            .filter(|&piece| !download.held.contains(PieceIndex(piece)))
            .collect();
        let found = missing.iter().copied().find(|&piece| {
            download.parents.iter().any(|parent| {
                self.nodes.iter().any(|n| {
                    n.id == *parent
                        && n.alive
                        && n.downloads
                            .get(&digest)
                            .is_some_and(|d| d.held.contains(PieceIndex(piece)))
                })
            })
        });
        if let Some(piece) = found {
            self.got(index, digest, piece, false);
            missing.retain(|&other| other != piece);
        }
        // From the source, under a lease that has not ended.
        let download = self.nodes[index].downloads.get_mut(&digest).unwrap();
        if download.leases.iter().all(|l| l.1 <= now) {
            download.fetching.clear();
        }
        if connected && let Some(piece) = download.fetching.pop_front() {
            if !download.held.contains(PieceIndex(piece)) {
                *self.source_reads.entry((digest, piece)).or_default() += 1;
            }
            self.got(index, digest, piece, true);
            missing.retain(|&other| other != piece);
        }
        if missing.is_empty() {
            let download = self.nodes[index].downloads.get_mut(&digest).unwrap();
            download.complete = true;
            download.open = false;
            download.leases.clear();
            self.send(
                index,
                FromNode::Holding {
                    digest,
                    runs: Vec::new(),
                    complete: true,
                },
            );
            return;
        }
        let download = self.nodes[index].downloads.get_mut(&digest).unwrap();
        if connected && download.fetching.is_empty() && download.ask_at.is_none_or(|at| at <= now) {
            download.ask_at = Some(now + Duration::from_secs(5));
            let mut wanted = PieceSet::empty(count);
            for &piece in &missing {
                wanted.insert(PieceIndex(piece));
            }
            let urgent = missing[self.rng.below(missing.len() as u64) as usize];
            let urgent = self.rng.one_in(2).then_some(PieceIndex(urgent));
            self.send(
                index,
                FromNode::AskLease {
                    digest,
                    wanted: wanted.runs(),
                    urgent,
                },
            );
        }
    }

    fn got(&mut self, index: usize, digest: BlobDigest, piece: u32, from_source: bool) {
        let download = self.nodes[index].downloads.get_mut(&digest).unwrap();
        download.held.insert(PieceIndex(piece));
        let runs = vec![PieceRun {
            first: piece,
            count: 1,
        }];
        let message = if from_source {
            let expires = self.now + self.config.lease_ttl;
            for lease in &mut download.leases {
                lease.1 = expires;
            }
            FromNode::Fetched {
                digest,
                pieces: runs,
            }
        } else {
            FromNode::Holding {
                digest,
                runs,
                complete: false,
            }
        };
        self.send(index, message);
    }

    fn fault(&mut self) {
        let index = self.rng.below(self.nodes.len() as u64) as usize;
        let digest = self.blobs[self.rng.below(self.blobs.len() as u64) as usize].0;
        match self.rng.below(12) {
            0..=1 => self.crash(index),
            2..=3 => {
                let back_in = Duration::from_millis(self.rng.below(3000));
                self.disconnect(index, back_in);
            }
            4 => self.restart_control(),
            5 => {
                // Stops in the middle of its leases without a word.
                if let Some(download) = self.nodes[index].downloads.get_mut(&digest) {
                    download.fetching.clear();
                    download.ask_at = Some(self.now + Duration::from_secs(40));
                }
            }
            6 => {
                if let Some(download) = self.nodes[index].downloads.get_mut(&digest) {
                    let pieces: Vec<PieceRun> = download.leases.iter().map(|l| l.0).collect();
                    download.fetching.clear();
                    download.leases.clear();
                    self.send(index, FromNode::ReturnLease { digest, pieces });
                }
            }
            7 => {
                // Evicted.
                if self.nodes[index]
                    .downloads
                    .get(&digest)
                    .is_some_and(|d| d.complete)
                {
                    self.nodes[index].downloads.remove(&digest);
                    self.send(index, FromNode::Dropped { digest });
                }
            }
            8 => {
                // Given up by its client.
                if self.nodes[index].downloads.remove(&digest).is_some() {
                    self.send(index, FromNode::CloseTask { digest });
                    self.send(index, FromNode::Dropped { digest });
                    let id = self.nodes[index].id;
                    self.referee
                        .leases
                        .retain(|key, lease| key.0 != digest || lease.0 != id);
                }
            }
            9..=10 => {
                let failed = self.nodes[index]
                    .downloads
                    .get(&digest)
                    .and_then(|d| d.parents.first().copied());
                if let Some(node) = failed {
                    self.send(index, FromNode::ParentFailed { digest, node });
                }
            }
            _ => self.send_rubbish(index, digest),
        }
    }

    /// Whatever a broken or hostile member can say within the schema.
    fn send_rubbish(&mut self, index: usize, digest: BlobDigest) {
        let run = |rng: &mut Rng| PieceRun {
            first: rng.next() as u32,
            count: rng.next() as u32,
        };
        let pieces = vec![run(&mut self.rng), run(&mut self.rng)];
        let messages = [
            FromNode::ReturnLease {
                digest: blob(999),
                pieces: pieces.clone(),
            },
            FromNode::Fetched {
                digest: blob(999),
                pieces: pieces.clone(),
            },
            FromNode::Dropped { digest: blob(998) },
            FromNode::ParentFailed {
                digest,
                node: id(5000),
            },
            FromNode::AskLease {
                digest: blob(997),
                wanted: pieces,
                urgent: Some(PieceIndex(u32::MAX)),
            },
        ];
        let pick = self.rng.below(messages.len() as u64) as usize;
        self.send(index, messages[pick].clone());
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(10 + self.rng.below(40));
        let mut out = Vec::new();
        self.core.tick(self.now, &mut out);
        assert!(
            self.core.next_timeout().is_none_or(|at| at > self.now),
            "seed {}: due work was left",
            self.seed
        );
        self.receive(out);
        for index in 0..self.nodes.len() {
            if self.nodes[index]
                .reconnect_at
                .is_some_and(|at| at <= self.now)
            {
                self.connect(index);
            }
        }
    }

    fn step(&mut self) {
        self.tick();
        for _ in 0..self.nodes.len() {
            let index = self.rng.below(self.nodes.len() as u64) as usize;
            let digests: Vec<BlobDigest> = self.nodes[index].downloads.keys().copied().collect();
            for digest in digests {
                self.work(index, digest);
            }
        }
    }

    fn is_done(&self) -> bool {
        self.nodes
            .iter()
            .all(|node| node.downloads.values().all(|d| d.complete))
    }

    fn finish(&mut self, steps_max: usize) {
        for _ in 0..steps_max {
            if self.is_done() {
                return;
            }
            self.step();
        }
        let stuck: Vec<String> = self
            .nodes
            .iter()
            .flat_map(|node| {
                node.downloads
                    .iter()
                    .filter(|(_, d)| !d.complete)
                    .map(move |(digest, d)| {
                        format!(
                            "{:?} of {digest}: {}/{} parents {:?}",
                            node.id,
                            d.held.len(),
                            d.held.piece_count(),
                            d.parents
                        )
                    })
            })
            .collect();
        panic!("seed {}: stuck: {stuck:#?}", self.seed);
    }

    /// All nodes leave; nothing may be left in the core.
    fn drain(&mut self) {
        for index in 0..self.nodes.len() {
            self.disconnect(index, Duration::from_secs(1_000_000));
        }
        for _ in 0..200 {
            self.tick();
        }
        let status = self.core.status();
        assert_eq!(
            (
                status.nodes,
                status.tasks,
                status.memberships,
                status.leases
            ),
            (0, 0, 0, 0),
            "seed {}: the core keeps what nobody needs",
            self.seed
        );
    }
}

fn seeds(count: u64) -> impl Iterator<Item = u64> {
    // One seed of a failed run replays it.
    let replay = std::env::var("PANTALA_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let range = replay.map_or(0..count, |seed: u64| seed..seed + 1);
    range.inspect(|seed| println!("seed {seed}"))
}

#[test]
fn a_healthy_cluster_reads_every_piece_from_the_source_exactly_once() {
    for seed in seeds(30) {
        let mut rng = Rng(seed ^ 0xabc);
        let node_count = 1 + rng.below(40) as usize;
        let counts = [1 + rng.below(300) as u32, 1, 1 + rng.below(40) as u32];
        let mut sim = Sim::new(seed, node_count, &counts, false);
        sim.step();
        for (digest, _) in sim.blobs.clone() {
            for index in 0..node_count {
                // All at once, or one by one.
                if sim.rng.one_in(3) {
                    sim.step();
                }
                sim.start_download(index, digest);
            }
        }
        sim.finish(20_000);
        for (digest, count) in sim.blobs.clone() {
            for piece in 0..count {
                let key = (digest, piece);
                assert_eq!(
                    sim.source_reads.get(&key),
                    Some(&1),
                    "seed {seed}: piece {piece}"
                );
                assert_eq!(
                    sim.referee.granted.get(&key),
                    Some(&1),
                    "seed {seed}: piece {piece}"
                );
            }
        }
        // A late node takes nothing from the source.
        sim.nodes.push(SimNode {
            id: id(node_count),
            connected: false,
            resumed: false,
            alive: true,
            reconnect_at: Some(sim.now),
            downloads: BTreeMap::new(),
        });
        sim.step();
        let reads = sim.source_reads.clone();
        for (digest, _) in sim.blobs.clone() {
            sim.start_download(node_count, digest);
        }
        sim.finish(20_000);
        assert_eq!(
            sim.source_reads, reads,
            "seed {seed}: a late node went to the source"
        );
        sim.drain();
    }
}

#[test]
fn whatever_fails_leases_stay_disjoint_and_everybody_ends_up_with_the_blob() {
    for seed in seeds(60) {
        let mut rng = Rng(seed ^ 0xdef);
        let node_count = 2 + rng.below(20) as usize;
        let counts = [1 + rng.below(120) as u32, 1 + rng.below(60) as u32];
        let mut sim = Sim::new(seed, node_count, &counts, true);
        for _ in 0..1500 {
            if sim.rng.one_in(10) {
                let index = sim.rng.below(node_count as u64) as usize;
                let digest = sim.blobs[sim.rng.below(2) as usize].0;
                if !sim.nodes[index].downloads.contains_key(&digest) {
                    sim.start_download(index, digest);
                }
            }
            if sim.rng.one_in(8) {
                sim.fault();
            }
            sim.step();
        }
        sim.finish(20_000);
        sim.drain();
    }
}

#[test]
fn control_that_restarts_in_mid_pull_costs_no_second_copy() {
    for seed in seeds(20) {
        let mut sim = Sim::new(seed, 10, &[200], true);
        sim.step();
        for index in 0..10 {
            sim.start_download(index, blob(0));
        }
        for _ in 0..5 {
            sim.step();
        }
        sim.restart_control();
        sim.finish(20_000);
        let reads: u32 = sim.source_reads.values().sum();
        assert_eq!(reads, 200, "seed {seed}");
    }
}

#[test]
fn a_thousand_nodes_make_a_mesh_in_which_nobody_is_flooded() {
    let mut sim = Sim::new(1, 1000, &[40], false);
    sim.step();
    for index in 0..1000 {
        sim.start_download(index, blob(0));
    }
    let mut children_max = 0;
    for _ in 0..4000 {
        if sim.is_done() {
            break;
        }
        sim.step();
        let mut children: BTreeMap<NodeId, usize> = BTreeMap::new();
        for node in &sim.nodes {
            for download in node.downloads.values().filter(|d| !d.complete) {
                for parent in &download.parents {
                    *children.entry(*parent).or_default() += 1;
                }
            }
        }
        children_max = children_max.max(children.values().copied().max().unwrap_or(0));
    }
    assert!(sim.is_done());
    assert!(children_max <= CHILDREN_HARD_MAX, "{children_max} children");
    let reads: u32 = sim.source_reads.values().sum();
    assert_eq!(reads, 40);
}

struct Cluster {
    core: Core,
    now: Duration,
}

impl Cluster {
    fn new(config: CoreConfig, node_count: usize) -> Self {
        let mut cluster = Self {
            core: Core::new(config, Duration::ZERO),
            now: Duration::from_secs(60),
        };
        for number in 0..node_count {
            assert!(cluster.join(id(number)));
        }
        cluster
    }
    fn join(&mut self, id: NodeId) -> bool {
        let info = NodeInfo {
            address: ([127, 0, 0, 1], 1).into(),
            labels: Labels::default(),
            resumed: false,
        };
        self.core.joined(self.now, id, info, &mut Vec::new())
    }
    fn send(&mut self, number: usize, message: FromNode) -> Vec<ToNode> {
        let mut out = Vec::new();
        self.core.handle(self.now, id(number), message, &mut out);
        let mine = out.into_iter().filter(|(to, _)| *to == id(number));
        mine.map(|(_, message)| message).collect()
    }
    fn open(&mut self, number: usize, digest: BlobDigest, piece_count: u64) -> Vec<ToNode> {
        self.send(
            number,
            FromNode::OpenTask {
                digest,
                size_bytes: piece_count * PIECE,
                has_source: true,
                held: Vec::new(),
                complete: false,
            },
        )
    }
    fn ask(&mut self, number: usize, digest: BlobDigest, urgent: Option<u32>) -> Vec<ToNode> {
        self.send(
            number,
            FromNode::AskLease {
                digest,
                wanted: vec![PieceRun {
                    first: 0,
                    count: u32::MAX,
                }],
                urgent: urgent.map(PieceIndex),
            },
        )
    }
    fn run(&mut self, number: usize, digest: BlobDigest, urgent: Option<u32>) -> Option<PieceRun> {
        let answers = self.ask(number, digest, urgent);
        answers.into_iter().find_map(|message| match message {
            ToNode::Lease { pieces, .. } => Some(pieces),
            _ => None,
        })
    }
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.core.tick(self.now, &mut Vec::new());
    }
}

fn refused(answers: &[ToNode]) -> Option<RefusedReason> {
    answers.iter().find_map(|message| match message {
        ToNode::Refused { reason, .. } => Some(*reason),
        _ => None,
    })
}

#[test]
fn a_lease_starts_at_the_urgent_piece_and_is_half_of_a_fair_share() {
    let mut cluster = Cluster::new(CoreConfig::default(), 3);
    for number in 0..3 {
        cluster.open(number, blob(0), 60);
    }
    let run = cluster.run(0, blob(0), Some(30)).unwrap();
    assert_eq!((run.first, run.count), (30, 10));
    // Taken: the next free pieces instead.
    let run = cluster.run(1, blob(0), Some(30)).unwrap();
    assert_eq!((run.first, run.count), (40, 8));
    // Nothing is free behind: from the start.
    let run = cluster.run(2, blob(0), Some(59)).unwrap();
    assert_eq!(
        run,
        PieceRun {
            first: 59,
            count: 1
        }
    );
    let run = cluster.run(2, blob(0), Some(59)).unwrap();
    assert_eq!(run.first, 0);
}

#[test]
fn a_lease_lasts_its_time_unless_progress_extends_it() {
    let mut cluster = Cluster::new(CoreConfig::default(), 2);
    let ttl = CoreConfig::default().lease_ttl;
    for number in 0..2 {
        cluster.open(number, blob(0), 2);
    }
    assert_eq!(cluster.run(0, blob(0), Some(0)).unwrap().count, 1);
    assert_eq!(cluster.run(0, blob(0), Some(1)).unwrap().first, 1);
    cluster.pass(ttl - Duration::from_millis(1));
    cluster.send(
        0,
        FromNode::Fetched {
            digest: blob(0),
            pieces: vec![PieceRun { first: 0, count: 1 }],
        },
    );
    cluster.pass(ttl - Duration::from_millis(1));
    assert_eq!(cluster.run(1, blob(0), None), None);
    cluster.pass(Duration::from_millis(1));
    assert_eq!(cluster.run(1, blob(0), None).unwrap().first, 1);
    assert_eq!(cluster.core.status().leases_expired, 1);
}

#[test]
fn a_parent_that_failed_a_child_is_not_offered_to_it_and_its_pieces_are() {
    let mut cluster = Cluster::new(CoreConfig::default(), 2);
    for number in 0..2 {
        cluster.open(number, blob(0), 1);
    }
    cluster.run(0, blob(0), None).unwrap();
    let pieces = vec![PieceRun { first: 0, count: 1 }];
    cluster.send(
        0,
        FromNode::Fetched {
            digest: blob(0),
            pieces,
        },
    );
    assert_eq!(cluster.run(1, blob(0), None), None);
    let answers = cluster.send(
        1,
        FromNode::ParentFailed {
            digest: blob(0),
            node: id(0),
        },
    );
    assert!(
        matches!(&answers[..], [ToNode::Parents { peers, .. }] if peers.is_empty()),
        "{answers:?}"
    );
    assert!(cluster.run(1, blob(0), None).is_some());
}

#[test]
fn every_bound_is_a_refusal_and_idle_tasks_make_room() {
    let config = CoreConfig {
        nodes_max: 2,
        tasks_max: 2,
        memberships_max: 3,
        pieces_max: 100,
        ..CoreConfig::default()
    };
    let mut cluster = Cluster::new(config, 2);
    assert!(!cluster.join(id(2)), "a third node");
    assert_eq!(refused(&cluster.open(0, blob(0), 10)), None);
    assert_eq!(
        refused(&cluster.open(1, blob(0), 11)),
        Some(RefusedReason::Size)
    );
    assert_eq!(
        refused(&cluster.open(0, blob(1), 200)),
        Some(RefusedReason::Full)
    );
    assert_eq!(refused(&cluster.open(0, blob(1), 10)), None);
    assert_eq!(
        refused(&cluster.open(0, blob(2), 10)),
        Some(RefusedReason::Full)
    );
    cluster.send(
        0,
        FromNode::Holding {
            digest: blob(0),
            runs: Vec::new(),
            complete: true,
        },
    );
    // Nobody downloads the first any more: it makes room.
    assert_eq!(refused(&cluster.open(0, blob(2), 10)), None);
    assert_eq!(refused(&cluster.open(1, blob(1), 10)), None);
    assert_eq!(
        refused(&cluster.open(1, blob(2), 10)),
        Some(RefusedReason::Full)
    );
    assert_eq!(
        refused(&cluster.open(0, blob(3), u64::MAX / PIECE)),
        Some(RefusedReason::Size)
    );
    assert_eq!(
        refused(&cluster.open(0, blob(4), 0)),
        Some(RefusedReason::Full)
    );
}

#[test]
fn hostile_runs_cost_no_more_than_the_blob_has_pieces() {
    let mut cluster = Cluster::new(CoreConfig::default(), 1);
    cluster.open(0, blob(0), 16 * 1024);
    let all = PieceRun {
        first: 0,
        count: u32::MAX,
    };
    // Taken literally, each of these would touch 16 Ki pieces 16 Ki times.
    for _ in 0..100 {
        cluster.send(
            0,
            FromNode::Holding {
                digest: blob(0),
                runs: vec![all; 16 * 1024],
                complete: false,
            },
        );
    }
    assert_eq!(cluster.run(0, blob(0), None), None);
}

/// A node that can sign.
fn author(number: u8) -> (NodeId, Ed25519KeyPair) {
    let key = Ed25519KeyPair::from_seed_unchecked(&[number; 32]).unwrap();
    let id = NodeId::try_from(key.public_key().as_ref()).unwrap();
    (id, key)
}

fn report(author: &(NodeId, Ed25519KeyPair), says: u8, relayer: NodeId) -> FromNode {
    let piece_digest = PieceDigest([says; 32]);
    let form = Claim::signed_form(&blob(0), PieceIndex(0), &piece_digest);
    FromNode::FalseClaim {
        digest: blob(0),
        piece: PieceIndex(0),
        claim: Claim {
            piece_digest,
            author: author.0,
            signature: author.1.sign(&form).as_ref().try_into().unwrap(),
        },
        true_digest: PieceDigest([99; 32]),
        relayer,
    }
}

#[test]
fn one_report_shuts_nobody_out_and_two_of_different_nodes_do() {
    let liar = author(1);
    let mut cluster = Cluster::new(CoreConfig::default(), 3);
    assert!(cluster.join(liar.0));
    for _ in 0..3 {
        cluster.send(0, report(&liar, 1, id(2)));
    }
    assert!(cluster.core.status().shut_out.is_empty());
    let answers = cluster.send(1, report(&liar, 1, id(2)));
    assert_eq!(answers, [ToNode::ShutOut(vec![liar.0])]);
    assert!(!cluster.join(liar.0), "a shut-out node is let in again");
}

#[test]
fn an_author_that_contradicts_itself_needs_no_second_witness() {
    let liar = author(1);
    let mut cluster = Cluster::new(CoreConfig::default(), 1);
    assert!(cluster.join(liar.0));
    cluster.send(0, report(&liar, 1, id(0)));
    cluster.send(0, report(&liar, 2, id(0)));
    assert_eq!(cluster.core.status().shut_out, [liar.0]);
}

#[test]
fn a_claim_that_its_author_did_not_sign_accuses_nobody() {
    let (victim, forger) = (author(1), author(2));
    let mut cluster = Cluster::new(CoreConfig::default(), 3);
    assert!(cluster.join(victim.0));
    let forged = (victim.0, forger.1);
    for number in 0..3 {
        cluster.send(number, report(&forged, 1, victim.0));
    }
    assert!(cluster.core.status().shut_out.is_empty());
}

#[test]
fn for_an_author_that_never_was_a_member_the_relayer_answers() {
    let invented = author(1);
    let mut cluster = Cluster::new(CoreConfig::default(), 3);
    cluster.send(0, report(&invented, 1, id(2)));
    cluster.send(1, report(&invented, 1, id(2)));
    assert_eq!(cluster.core.status().shut_out, [id(2)]);
}

#[test]
fn a_shut_out_node_loses_its_leases_and_its_pieces_do_not_count() {
    let liar = author(1);
    let mut cluster = Cluster::new(CoreConfig::default(), 2);
    assert!(cluster.join(liar.0));
    let mut out = Vec::new();
    for message in [
        FromNode::OpenTask {
            digest: blob(0),
            size_bytes: 4 * PIECE,
            has_source: true,
            held: vec![PieceRun { first: 0, count: 2 }],
            complete: false,
        },
        FromNode::AskLease {
            digest: blob(0),
            wanted: vec![PieceRun { first: 2, count: 2 }],
            urgent: None,
        },
    ] {
        cluster.core.handle(cluster.now, liar.0, message, &mut out);
    }
    assert!(out.iter().any(|(_, m)| matches!(m, ToNode::Lease { .. })));
    for number in 0..2 {
        cluster.open(number, blob(0), 4);
        cluster.send(number, report(&liar, 1, id(0)));
    }
    let mut leased = PieceSet::empty(4);
    while let Some(run) = cluster.run(0, blob(0), None) {
        leased.insert_run(run);
    }
    assert!(leased.is_full());
}
