//! A node of the simulation: its core, its store, and the checks on what the core does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pantala_swarm::{Action, Author, Download, DownloadConfig, RequestId};
use pantala_wire::NodeId;

/// What a node has for a piece: the version of its bytes (0 is the source's) and who vouches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub version: u32,
    pub author: Author,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    pub parent: Option<usize>,
    /// Pieces still to come.
    pub left: BTreeSet<u32>,
    pub leased: bool,
}

pub struct Node {
    pub alive: bool,
    /// Counts restarts: what was sent to an earlier life does not arrive.
    pub epoch: u32,
    pub core: Download,
    pub config: DownloadConfig,
    pub store: Vec<Option<Stored>>,
    pub live: BTreeMap<RequestId, Live>,
    /// Parents subscribed to, and the token of each subscription.
    pub subscriptions: BTreeMap<usize, u64>,
    /// What each subscribed parent offered.
    pub offered: BTreeMap<usize, BTreeSet<u32>>,
    /// Nodes that this one shut out.
    pub blamed: BTreeSet<usize>,
    /// Children and the tokens of their subscriptions.
    pub children: BTreeMap<usize, u64>,
    /// Leased pieces and when the lease ends.
    pub leases: BTreeMap<u32, Duration>,
    pub asked_at: Option<Duration>,
    pub tick_at: Option<Duration>,
    pub reader_at: Option<u32>,
    pub completed: bool,
    pub active_uploads: u32,
    pub rechecking: BTreeSet<u32>,
    pub verifying: bool,
}

pub fn node_id(index: usize) -> NodeId {
    NodeId::new([index as u8 + 1; 32])
}

pub fn node_index(id: NodeId) -> usize {
    usize::from(id.as_bytes()[0]) - 1
}

impl Node {
    /// Checks an action against what the core knows and may do; then notes it.
    pub fn check(&mut self, now: Duration, action: &Action) {
        match action {
            Action::Subscribe { parent } => {
                let parent = node_index(*parent);
                assert!(!self.blamed.contains(&parent), "subscribes to a liar");
                assert!(!self.subscriptions.contains_key(&parent), "twice");
                assert!(self.subscriptions.len() < self.config.parents_max as usize);
            }
            Action::Unsubscribe { parent, .. } => {
                let parent = node_index(*parent);
                assert!(
                    self.live.values().all(|l| l.parent != Some(parent)),
                    "unsubscribes from {parent} with requests outstanding"
                );
            }
            Action::Fetch {
                request,
                parent,
                piece,
                first_group,
                ..
            } => self.check_fetch(*request, node_index(*parent), piece.0, *first_group),
            Action::FetchSource {
                request,
                pieces,
                leased,
                ..
            } => {
                assert!(pieces.count >= 1);
                let max = if *leased {
                    self.config.source_run_pieces_max
                } else {
                    self.config.alone_run_pieces_max
                };
                assert!(pieces.count <= max);
                for piece in pieces.range() {
                    assert!(self.store[piece as usize].is_none(), "held already");
                    self.check_copies(piece);
                    let in_source = |l: &Live| l.parent.is_none() && l.left.contains(&piece);
                    assert!(!self.live.values().any(in_source), "twice from the source");
                    if *leased {
                        let ends = self.leases.get(&piece).copied();
                        assert!(ends.is_some_and(|e| e > now), "piece {piece} is not leased");
                    }
                }
                let live = Live {
                    parent: None,
                    left: pieces.range().collect(),
                    leased: *leased,
                };
                assert!(self.live.insert(*request, live).is_none());
                let same = |l: &&Live| l.parent.is_none() && l.leased == *leased;
                let max = if *leased {
                    self.config.source_fetches_max
                } else {
                    self.config.alone_fetches_max
                };
                assert!(self.live.values().filter(same).count() <= max as usize);
            }
            Action::AskLease { wanted, urgent } => {
                let impatient = |at: Duration| at + self.config.ask_timeout <= now;
                assert!(self.asked_at.is_none_or(impatient), "asks twice at once");
                assert!(wanted.len() <= self.config.ask_runs_max as usize);
                assert_eq!(wanted[0].first, urgent.0);
                for piece in wanted.iter().flat_map(|run| run.range()) {
                    assert!(
                        self.store[piece as usize].is_none(),
                        "asks for a held piece"
                    );
                }
                self.asked_at = Some(now);
            }
            Action::ReturnLease { pieces } => {
                for piece in pieces.range() {
                    self.leases.remove(&piece);
                }
            }
            Action::Cancel { request } => {
                self.live.remove(request);
            }
            Action::Complete => {
                let right = |s: &Option<Stored>| s.is_some_and(|s| s.version == 0);
                assert!(self.store.iter().all(right), "complete with wrong bytes");
                self.completed = true;
            }
            Action::Fail { .. } => assert!(self.live.is_empty(), "requests outlive the end"),
            Action::Verify => {
                assert!(self.store.iter().all(Option::is_some) && !self.verifying);
                self.verifying = true;
            }
            Action::Recheck { piece } => {
                assert!(self.rechecking.insert(piece.0));
                let max = self.config.rechecks_in_flight_max as usize;
                assert!(self.rechecking.len() <= max);
            }
            Action::Blame { node, .. } => {
                self.blamed.insert(node_index(*node));
            }
        }
    }

    fn check_fetch(&mut self, request: RequestId, parent: usize, piece: u32, first_group: u32) {
        assert!(!self.blamed.contains(&parent), "asks a liar");
        assert!(self.subscriptions.contains_key(&parent), "not subscribed");
        let offered = self.offered.get(&parent);
        assert!(
            offered.is_some_and(|o| o.contains(&piece)),
            "asks {parent} for piece {piece}, which it did not offer"
        );
        assert!(self.store[piece as usize].is_none(), "held already");
        assert!(first_group < 16);
        self.check_copies(piece);
        let live = Live {
            parent: Some(parent),
            left: BTreeSet::from([piece]),
            leased: false,
        };
        assert!(self.live.insert(request, live).is_none(), "number reused");
        let of_parent = self.live.values().filter(|l| l.parent == Some(parent));
        assert!(of_parent.count() <= self.config.requests_per_parent_max as usize);
        let to_parents = self.live.values().filter(|l| l.parent.is_some()).count();
        assert!(to_parents <= self.config.requests_in_flight_max as usize);
    }

    fn check_copies(&self, piece: u32) {
        let copies = self
            .live
            .values()
            .filter(|l| l.left.contains(&piece))
            .count();
        assert!(copies < 2, "piece {piece} travels {} times", copies + 1);
    }
}
