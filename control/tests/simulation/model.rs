//! The simulated cluster and its referee, which knows only what went over the wire.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pantala_control::Peer;
use pantala_control::core::config::{CHILDREN_HARD_MAX, LEASE_RUN_MAX, PARENTS_MAX};
use pantala_control::core::{Core, CoreConfig, FromNode, HostStatus, RefusedReason, ToNode};
use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceRun, PieceSet};
use ring::signature::{Ed25519KeyPair, KeyPair};

pub(crate) const PIECE: u64 = 1 << 20;
/// The registry of all blobs.
pub(crate) const SOURCE: &str = "registry.example";

/// SplitMix64: small, and the same everywhere.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
    pub(crate) fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

pub(crate) fn key(number: usize) -> Ed25519KeyPair {
    let mut seed = [1; 32];
    seed[..8].copy_from_slice(&(number as u64).to_le_bytes());
    Ed25519KeyPair::from_seed_unchecked(&seed).unwrap()
}

pub(crate) fn id(number: usize) -> NodeId {
    NodeId::try_from(key(number).public_key().as_ref()).unwrap()
}

pub(crate) fn blob(number: usize) -> BlobDigest {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    BlobDigest::new(bytes)
}

/// What a node knows of one blob.
pub(crate) struct Download {
    pub(crate) held: PieceSet,
    pub(crate) complete: bool,
    pub(crate) open: bool,
    pub(crate) leases: Vec<(PieceRun, Duration)>,
    pub(crate) fetching: VecDeque<u32>,
    pub(crate) parents: Vec<NodeId>,
    pub(crate) ask_at: Option<Duration>,
    pub(crate) opened: bool,
}

pub(crate) struct SimNode {
    pub(crate) id: NodeId,
    pub(crate) connected: bool,
    /// The process has had a session.
    pub(crate) resumed: bool,
    pub(crate) reconnect_at: Option<Duration>,
    pub(crate) downloads: BTreeMap<BlobDigest, Download>,
    /// When it last said that a parent failed it.
    pub(crate) complained_at: Option<Duration>,
    /// It was found out as a liar, and is off.
    pub(crate) is_out: bool,
}

/// Who holds a lease on what, as told by the messages alone.
#[derive(Default)]
pub(crate) struct Referee {
    pub(crate) leases: BTreeMap<(BlobDigest, u32), (NodeId, Duration)>,
    /// How often each piece was leased.
    pub(crate) granted: BTreeMap<(BlobDigest, u32), u32>,
    pub(crate) shut_out: BTreeSet<NodeId>,
}

pub(crate) struct Sim {
    pub(crate) seed: u64,
    pub(crate) rng: Rng,
    pub(crate) now: Duration,
    pub(crate) config: CoreConfig,
    pub(crate) core: Core,
    pub(crate) nodes: Vec<SimNode>,
    pub(crate) by_id: BTreeMap<NodeId, usize>,
    pub(crate) blobs: Vec<(BlobDigest, u32)>,
    pub(crate) referee: Referee,
    pub(crate) source_reads: BTreeMap<(BlobDigest, u32), u32>,
}

impl Sim {
    pub(crate) fn new(seed: u64, node_count: usize, blobs: &[u32]) -> Self {
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
            by_id: BTreeMap::new(),
            blobs: blobs
                .iter()
                .enumerate()
                .map(|(number, &count)| (blob(number), count))
                .collect(),
            referee: Referee::default(),
            source_reads: BTreeMap::new(),
        };
        for number in 0..=node_count {
            sim.by_id.insert(id(number), number);
        }
        for number in 0..node_count {
            sim.nodes.push(SimNode {
                id: id(number),
                connected: false,
                resumed: false,
                reconnect_at: Some(sim.now),
                downloads: BTreeMap::new(),
                complained_at: None,
                is_out: false,
            });
        }
        sim
    }

    pub(crate) fn piece_count(&self, digest: &BlobDigest) -> u32 {
        self.blobs.iter().find(|(d, _)| d == digest).unwrap().1
    }

    pub(crate) fn send(&mut self, node: usize, message: FromNode) {
        if !self.nodes[node].connected {
            return;
        }
        let id = self.nodes[node].id;
        self.referee_sent(id, &message);
        let mut out = Vec::new();
        let asks = matches!(message, FromNode::AskLease { .. });
        let before = asks.then(|| self.core.status().hosts);
        self.core.handle(self.now, id, message, &mut out);
        if let Some(before) = before {
            self.check_budget(&before);
        }
        self.receive(out);
        self.check_children();
    }

    /// A lease that was asked for keeps within what its registry is allowed.
    fn check_budget(&self, before: &[HostStatus]) {
        for host in self.core.status().hosts {
            let leases = before.iter().find(|other| other.name == host.name);
            let has_more = leases.is_some_and(|before| before.leases < host.leases);
            assert!(
                !has_more || (host.leases <= host.leases_max && host.paused_for.is_zero()),
                "seed {}: {host:?} is over its budget",
                self.seed
            );
        }
    }

    /// Nobody has more children than anybody may have, by what the children were told.
    fn check_children(&mut self) {
        // Looking at all of them each time would take longer than everything else.
        if !self.rng.one_in(64) {
            return;
        }
        let mut children: BTreeMap<(NodeId, BlobDigest), usize> = BTreeMap::new();
        for node in self.nodes.iter().filter(|node| node.connected) {
            for (digest, download) in node.downloads.iter().filter(|(_, d)| d.open) {
                for parent in &download.parents {
                    *children.entry((*parent, *digest)).or_default() += 1;
                }
            }
        }
        let most = children.values().copied().max().unwrap_or(0);
        assert!(
            most <= CHILDREN_HARD_MAX,
            "seed {}: {most} children",
            self.seed
        );
    }

    /// What a node says ends leases in the referee's book.
    pub(crate) fn referee_sent(&mut self, id: NodeId, message: &FromNode) {
        let (now, ttl) = (self.now, self.config.lease_ttl);
        let book = &mut self.referee.leases;
        match message {
            FromNode::Fetched { digest, pieces } => {
                for piece in pieces
                    .iter()
                    .flat_map(|run| run.first..run.range().end.min(1000))
                {
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
                for piece in pieces
                    .iter()
                    .flat_map(|run| run.first..run.range().end.min(1000))
                {
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

    pub(crate) fn receive(&mut self, out: Vec<(NodeId, ToNode)>) {
        for (to, message) in out {
            let index = self.by_id[&to];
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
                    ..
                } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        download.ask_at = Some(now + retry_after);
                    }
                }
                ToNode::Refused { digest, reason } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        assert!(
                            matches!(
                                reason,
                                RefusedReason::UnknownTask
                                    | RefusedReason::Full
                                    | RefusedReason::Impossible
                            ),
                            "seed {}: {reason:?}",
                            self.seed
                        );
                        download.opened &= reason == RefusedReason::Impossible;
                    }
                }
                ToNode::ShutOut(list) => self.referee.shut_out.extend(list),
                ToNode::LeaseCut { digest, pieces } => {
                    if let Some(download) = node.downloads.get_mut(&digest) {
                        download
                            .fetching
                            .retain(|piece| !pieces.range().contains(piece));
                    }
                }
                // Its holder opens the task soon, and gets a lease for it.
                ToNode::Opening { .. } => {}
            }
        }
    }

    /// The invariants that every answer must keep.
    pub(crate) fn check(&mut self, to: NodeId, message: &ToNode) {
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
                    // A node whose parents failed it may fetch what they hold; nobody else may.
                    let complained = self.nodes[self.by_id[&to]].complained_at;
                    if complained.is_none_or(|at| at + self.config.parent_exclusion < self.now) {
                        let holder = self.nodes.iter().find(|n| {
                            n.connected
                                && n.downloads
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
            ToNode::LeaseCut { digest, pieces } => {
                let index = self.by_id[&to];
                assert!(
                    self.nodes[index].connected,
                    "seed {seed}: {to:?} cannot hear that its lease is cut"
                );
                for piece in pieces.range() {
                    let book = &mut self.referee.leases;
                    let cut = book.remove(&(*digest, piece));
                    assert!(
                        cut.is_some_and(|lease| lease.0 == to && lease.1 > self.now),
                        "seed {seed}: {piece} of {digest} cut of {pieces:?}, which {to:?} had no lease on: {cut:?} at {:?}",
                        self.now
                    );
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

    pub(crate) fn tick(&mut self) {
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

    pub(crate) fn step(&mut self) {
        self.tick();
        for _ in 0..self.nodes.len() {
            let index = self.rng.below(self.nodes.len() as u64) as usize;
            let digests: Vec<BlobDigest> = self.nodes[index].downloads.keys().copied().collect();
            for digest in digests {
                self.work(index, digest);
            }
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.nodes
            .iter()
            .all(|node| node.downloads.values().all(|d| d.complete))
    }

    pub(crate) fn finish(&mut self, steps_max: usize) {
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
    pub(crate) fn drain(&mut self) {
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
