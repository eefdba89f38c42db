//! Whom a node is given as parents: by what they are predicted to deliver to it, and never too many
//! children for one.

use std::collections::BTreeMap;
use std::time::Duration;

use pantala_control::Labels;
use pantala_control::core::config::{
    CHILD_SHARE_BYTES_PER_S, CHILDREN_HARD_MAX, CHILDREN_LAST, CHILDREN_MIN, CHILDREN_SOFT_MAX,
    HARD_FACTOR, PARENTS_LOW, PARENTS_TARGET,
};
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, PathReport, ToNode};
use pantala_wire::{NodeId, PieceRun};

use crate::model::{PIECE, blob};

const GBIT: u64 = 125_000_000;
const S: Duration = Duration::from_secs(1);
const PIECES: u32 = 64;

fn node(number: usize) -> NodeId {
    let mut bytes = [5; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    NodeId::new(bytes)
}

fn number(node: &NodeId) -> usize {
    u64::from_le_bytes(*node.as_bytes().first_chunk().unwrap()) as usize
}

struct Cluster {
    core: Core,
    now: Duration,
    /// What each node was told last.
    parents: BTreeMap<usize, Vec<usize>>,
}

impl Cluster {
    fn new() -> Self {
        Self {
            core: Core::new(CoreConfig::default(), Duration::ZERO),
            now: Duration::from_secs(60),
            parents: BTreeMap::new(),
        }
    }
    fn join(&mut self, number: usize, uplink: Option<u64>, rack: &str) {
        let info = NodeInfo {
            labels: Labels {
                rack: rack.to_owned(),
                ..Labels::default()
            },
            uplink_bytes_per_s: uplink,
            ..NodeInfo::default()
        };
        let mut out = Vec::new();
        assert!(self.core.joined(self.now, node(number), info, &mut out));
    }
    fn send(&mut self, from: usize, message: FromNode) {
        let mut out = Vec::new();
        self.core.handle(self.now, node(from), message, &mut out);
        for (to, message) in out {
            if let ToNode::Parents { peers, .. } = message {
                let peers = peers.iter().map(|peer| number(&peer.node)).collect();
                self.parents.insert(number(&to), peers);
            }
        }
    }
    fn open(&mut self, number: usize, complete: bool) {
        self.send(
            number,
            FromNode::OpenTask {
                digest: blob(0),
                size_bytes: u64::from(PIECES) * PIECE,
                has_source: true,
                held: Vec::new(),
                complete,
            },
        );
    }
    fn got(&mut self, child: usize, parent: usize, mib_per_s: u64, failures: u32) {
        let report = PathReport {
            node: node(parent),
            bytes: mib_per_s << 20,
            busy: S,
            failures,
        };
        let reports = vec![report];
        self.send(child, FromNode::Paths { reports });
    }
    fn children(&self) -> BTreeMap<usize, usize> {
        let mut children = BTreeMap::new();
        for parent in self.parents.values().flatten() {
            *children.entry(*parent).or_default() += 1;
        }
        children
    }
    fn of(&self, child: usize) -> &[usize] {
        self.parents.get(&child).map_or(&[], Vec::as_slice)
    }
}

#[test]
fn ten_thousand_nodes_in_one_second_flood_nobody_and_all_get_parents() {
    const NODES: usize = 10_000;
    let uplinks = [1, 10, 25, 100].map(|gbit| gbit * GBIT);
    let uplink = |number: usize| uplinks[number * 7 % 4];
    let mut cluster = Cluster::new();
    for number in 0..NODES {
        let rack = format!("rack {}", number / 40);
        cluster.join(number, Some(uplink(number)), &rack);
    }
    cluster.open(0, true);
    for number in 1..NODES {
        cluster.now += Duration::from_micros(100);
        cluster.open(number * 7919 % NODES, false);
    }
    // Who asks in vain is helped as well.
    for number in 1..NODES {
        let wanted = vec![PieceRun {
            first: 0,
            count: PIECES,
        }];
        let digest = blob(0);
        let urgent = None;
        cluster.send(
            number,
            FromNode::AskLease {
                digest,
                wanted,
                urgent,
            },
        );
    }
    let mut by_uplink: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (parent, count) in cluster.children() {
        let fair = (uplink(parent) as f64 / CHILD_SHARE_BYTES_PER_S) as usize;
        let hard =
            (fair.clamp(CHILDREN_MIN, CHILDREN_SOFT_MAX) * HARD_FACTOR).min(CHILDREN_HARD_MAX);
        assert!(
            count <= hard.max(CHILDREN_LAST),
            "{parent} has {count} children"
        );
        by_uplink.entry(uplink(parent)).or_default().push(count);
    }
    let mean = |gbit: u64| {
        let counts = &by_uplink[&(gbit * GBIT)];
        counts.iter().sum::<usize>() / counts.len()
    };
    assert!(
        mean(100) > 2 * mean(10) && mean(10) > 2 * mean(1),
        "{by_uplink:?}"
    );
    for child in 1..NODES {
        assert!(
            cluster.of(child).len() >= PARENTS_LOW,
            "{child}: {:?}",
            cluster.of(child)
        );
    }
    let full = (1..NODES).filter(|child| cluster.of(*child).len() >= PARENTS_TARGET);
    assert!(full.count() > NODES * 9 / 10);
}

#[test]
fn what_a_path_has_delivered_counts_more_than_what_it_promises() {
    let mut cluster = Cluster::new();
    for number in 0..5 {
        cluster.join(number, None, "");
    }
    for number in 0..4 {
        cluster.open(number, true);
    }
    cluster.open(4, false);
    for (parent, rate) in [(0, 300), (1, 100), (2, 400), (3, 200)] {
        cluster.got(4, parent, rate, 0);
    }
    cluster.open(4, false);
    assert_eq!(cluster.of(4), [2, 0, 3, 1]);
}

#[test]
fn near_parents_are_preferred_but_a_rack_never_has_only_itself() {
    let mut cluster = Cluster::new();
    for number in 0..400 {
        cluster.join(number, None, &format!("rack {}", number / 20));
        cluster.open(number, false);
    }
    for number in 380..400 {
        cluster.open(number, false);
    }
    let near = |cluster: &Cluster, child: usize| {
        let own = |&&parent: &&usize| parent / 20 == child / 20;
        cluster.of(child).iter().filter(own).count()
    };
    let all: usize = (100..400).map(|child| near(&cluster, child)).sum();
    assert!(all > 2 * 300, "{all} parents in the own rack: too few");
    for child in 100..400 {
        let parents = cluster.of(child).len();
        assert!(
            near(&cluster, child) < parents,
            "{child}: {:?}",
            cluster.of(child)
        );
    }
}

/// Twelve children of nine complete parents, one of which gives a hundredth of what the others give.
fn cluster_with_one_slow_parent() -> Cluster {
    let mut cluster = Cluster::new();
    for number in 0..21 {
        cluster.join(number, None, "");
    }
    for parent in 0..9 {
        cluster.open(parent, true);
    }
    for child in 9..21 {
        cluster.open(child, false);
    }
    for _ in 0..10 {
        cluster.now += S;
        for child in 9..21 {
            for parent in cluster.of(child).to_vec() {
                cluster.got(child, parent, if parent == 0 { 1 } else { 100 }, 0);
            }
        }
    }
    cluster
}

#[test]
fn a_parent_far_slower_than_the_others_is_taken_from_its_children_and_comes_back_on_trial() {
    let mut cluster = cluster_with_one_slow_parent();
    assert_eq!(cluster.core.status().demotions, 1);
    assert_eq!(cluster.children().get(&0), None);
    // It is nobody's parent while it is demoted.
    cluster.join(21, None, "");
    cluster.open(21, false);
    assert!(!cluster.of(21).contains(&0));
    // And then again, of a few.
    cluster.now += Duration::from_secs(60);
    for number in 22..40 {
        cluster.join(number, None, "");
        cluster.open(number, false);
    }
    let count = cluster.children().get(&0).copied().unwrap_or(0);
    assert!((1..=2).contains(&count), "{count} children on trial");
}

#[test]
fn one_child_that_complains_about_everybody_takes_no_parent_from_the_others() {
    let mut cluster = Cluster::new();
    for number in 0..12 {
        cluster.join(number, None, "");
    }
    for parent in 0..8 {
        cluster.open(parent, true);
    }
    for child in 8..12 {
        cluster.open(child, false);
    }
    let before = cluster.of(9).to_vec();
    for _ in 0..100 {
        cluster.now += Duration::from_millis(100);
        for parent in 0..8 {
            cluster.got(8, parent, 0, 1000);
        }
    }
    assert_eq!(cluster.core.status().demotions, 0);
    assert_eq!(cluster.of(9), before);
}

#[test]
fn speeds_that_cannot_be_and_reports_on_strangers_count_for_nothing() {
    let mut cluster = Cluster::new();
    for number in 0..4 {
        cluster.join(number, None, "");
    }
    cluster.open(0, true);
    cluster.open(1, false);
    let mut lie = |child: usize, parent: usize, bytes: u64, busy: Duration| {
        let node = node(parent);
        let failures = 1;
        let report = PathReport {
            node,
            bytes,
            busy,
            failures,
        };
        let before = cluster.core.status().absurd_reports;
        cluster.send(
            child,
            FromNode::Paths {
                reports: vec![report],
            },
        );
        cluster.core.status().absurd_reports - before
    };
    assert_eq!(lie(1, 0, u64::MAX, S), 1, "faster than light");
    assert_eq!(lie(1, 0, 1, Duration::ZERO), 1, "in no time");
    assert_eq!(lie(1, 0, 1, Duration::MAX), 1, "for ever");
    assert_eq!(lie(2, 0, 1 << 20, S), 1, "of no child");
    assert_eq!(
        lie(0, 1, 1 << 20, S),
        1,
        "of a child on its parent's behalf"
    );
    assert_eq!(lie(1, 1, 1 << 20, S), 0, "of itself");
    assert_eq!(lie(1, 999, 1 << 20, S), 0, "of nobody");
    assert_eq!(lie(1, 0, 1 << 20, S), 0, "the truth");
}
