//! Leases that are cut, hosts that have enough, and what nodes cannot know.

use std::collections::BTreeSet;
use std::time::Duration;

use pantala_control::core::config::{
    ANNOUNCEMENTS_PER_MINUTE_MAX, HOST_LEASES_START, HOST_PAUSE_MAX, HOSTS_PER_NODE_MAX,
};
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, RefusedReason, TaskReport, ToNode};
use pantala_wire::{BlobDigest, NodeId, PieceRun};

use crate::model::{PIECE, SOURCE, blob};

const S: Duration = Duration::from_secs(1);

fn node(number: usize) -> NodeId {
    let mut bytes = [5; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    NodeId::new(bytes)
}

struct Cluster {
    core: Core,
    now: Duration,
}

impl Cluster {
    fn new(node_count: usize) -> Self {
        Self::with_uplinks(node_count, |_| None)
    }
    fn with_uplinks(node_count: usize, bytes_per_s: impl Fn(usize) -> Option<u64>) -> Self {
        let mut core = Core::new(CoreConfig::default(), Duration::ZERO);
        let now = Duration::from_secs(60);
        for number in 0..node_count {
            let info = NodeInfo {
                uplink_bytes_per_s: bytes_per_s(number),
                ..NodeInfo::default()
            };
            assert!(core.joined(now, node(number), info, &mut Vec::new()));
        }
        Self { core, now }
    }
    fn send(&mut self, number: usize, message: FromNode) -> Vec<(NodeId, ToNode)> {
        let mut out = Vec::new();
        self.core.handle(self.now, node(number), message, &mut out);
        out
    }
    fn open(&mut self, number: usize, digest: BlobDigest, piece_count: u32, host: &str) {
        self.send(
            number,
            FromNode::OpenTask {
                digest,
                size_bytes: u64::from(piece_count) * PIECE,
                has_source: true,
                held: Vec::new(),
                complete: false,
            },
        );
        let host = host.to_owned();
        self.send(number, FromNode::SourceHost { digest, host });
    }
    fn ask(&mut self, number: usize, digest: BlobDigest) -> Vec<(NodeId, ToNode)> {
        let first = 0;
        let count = u32::MAX;
        let wanted = vec![PieceRun { first, count }];
        let urgent = None;
        self.send(
            number,
            FromNode::AskLease {
                digest,
                wanted,
                urgent,
            },
        )
    }
    fn lease(&mut self, number: usize, digest: BlobDigest) -> Option<PieceRun> {
        leased(&self.ask(number, digest), number)
    }
    fn fetched(
        &mut self,
        number: usize,
        digest: BlobDigest,
        run: PieceRun,
    ) -> Vec<(NodeId, ToNode)> {
        let pieces = vec![run];
        self.send(number, FromNode::Fetched { digest, pieces })
    }
}

fn leased(out: &[(NodeId, ToNode)], number: usize) -> Option<PieceRun> {
    out.iter().find_map(|(to, message)| match message {
        ToNode::Lease { pieces, .. } if *to == node(number) => Some(*pieces),
        _ => None,
    })
}

fn wait(out: &[(NodeId, ToNode)]) -> Option<Duration> {
    out.iter().find_map(|(_, message)| match message {
        ToNode::LeaseWait { retry_after, .. } => Some(*retry_after),
        _ => None,
    })
}

fn one(first: u32) -> PieceRun {
    PieceRun { first, count: 1 }
}

#[test]
fn what_many_wait_for_is_fetched_by_those_that_pass_it_on_fastest() {
    // Two of a hundredth of the others' uplink.
    let is_slow = |number: usize| number < 2;
    let mut cluster = Cluster::with_uplinks(22, |number| {
        Some(if is_slow(number) {
            12_500_000
        } else {
            1_250_000_000
        })
    });
    for number in 0..22 {
        cluster.open(number, blob(0), 1000, SOURCE);
    }
    let mut busy: Vec<(usize, PieceRun)> = (6..22)
        .map(|number| (number, cluster.lease(number, blob(0)).unwrap()))
        .collect();
    // The slow ask first, then four that are fast.
    for number in 0..6 {
        assert_eq!(cluster.lease(number, blob(0)), None);
        cluster.now += S / 1000;
    }
    let mut turns = Vec::new();
    for _ in 0..6 {
        let (number, run) = busy.remove(0);
        let out = cluster.fetched(number, blob(0), run);
        turns.extend((0..22).filter(|&number| leased(&out, number).is_some()));
    }
    assert_eq!(turns, [2, 3, 4, 5, 0, 1]);
    // Who has waited for a second has waited long enough.
    for number in [0, 2] {
        assert_eq!(cluster.lease(number, blob(0)), None);
        cluster.now += S;
    }
    let (number, run) = busy.remove(0);
    let out = cluster.fetched(number, blob(0), run);
    assert!(leased(&out, 0).is_some() && leased(&out, 2).is_none());
}

#[test]
fn a_slow_node_that_fetches_alone_waits_for_nobody() {
    let mut cluster = Cluster::with_uplinks(2, |number| Some([12_500_000, 1_250_000_000][number]));
    for number in 0..2 {
        cluster.open(number, blob(0), 100, SOURCE);
    }
    assert!(cluster.lease(1, blob(0)).is_some());
    assert!(cluster.lease(0, blob(0)).is_some());
}

#[test]
fn a_lease_that_falls_behind_its_peers_is_cut_behind_the_piece_that_is_arriving() {
    let mut cluster = Cluster::new(3);
    for number in 0..2 {
        cluster.open(number, blob(0), 32, SOURCE);
    }
    let slow = cluster.lease(0, blob(0)).unwrap();
    assert_eq!(slow.count, 8);
    // The other fetches a piece in a tenth of a second.
    while let Some(run) = cluster.lease(1, blob(0)) {
        for piece in run.range() {
            cluster.now += S / 10;
            cluster.fetched(1, blob(0), one(piece));
        }
    }
    assert_eq!(cluster.core.status().leases_cut, 1);
    let book: BTreeSet<u32> = (slow.first + 1..slow.range().end).collect();
    assert!(book.iter().all(|&piece| piece != slow.first));
    // What it was at is still its own.
    assert_eq!(cluster.core.status().leases, 1);
    cluster.fetched(0, blob(0), one(slow.first));
    assert_eq!(cluster.core.status().leases, 0);
    assert_eq!(cluster.core.status().forged_fetches, 0);
}

#[test]
fn the_holder_is_told_before_another_has_its_pieces() {
    let mut cluster = Cluster::new(2);
    for number in 0..2 {
        cluster.open(number, blob(0), 32, SOURCE);
    }
    let slow = cluster.lease(0, blob(0)).unwrap();
    cluster.now += S / 10;
    cluster.fetched(0, blob(0), one(slow.first));
    while let Some(run) = cluster.lease(1, blob(0)) {
        cluster.fetched(1, blob(0), run);
    }
    // All is held or leased, and from node 0 comes nothing any more.
    cluster.now += S * 3;
    let out = cluster.ask(1, blob(0));
    let cut = out
        .iter()
        .position(|(to, message)| *to == node(0) && matches!(message, ToNode::LeaseCut { .. }));
    let given = out
        .iter()
        .position(|(to, message)| *to == node(1) && matches!(message, ToNode::Lease { .. }));
    assert!(cut.unwrap() < given.unwrap(), "{out:?}");
}

#[test]
fn a_lease_that_is_no_slower_than_the_others_is_not_cut() {
    let mut cluster = Cluster::new(2);
    for number in 0..2 {
        cluster.open(number, blob(0), 16, SOURCE);
    }
    let mut runs = [Vec::new(), Vec::new()];
    let mut turn = 0;
    while let Some(run) = cluster.lease(turn % 2, blob(0)) {
        runs[turn % 2].extend(run.range());
        turn += 1;
    }
    // All pieces take three seconds: a slow source is not a slow node.
    for step in 0..runs[0].len().max(runs[1].len()) {
        cluster.now += S * 3;
        for (number, own) in runs.iter().enumerate() {
            if let Some(&piece) = own.get(step) {
                cluster.fetched(number, blob(0), one(piece));
                cluster.ask(number, blob(0));
            }
        }
    }
    assert_eq!(cluster.core.status().leases_cut, 0);
}

#[test]
fn a_host_has_one_budget_over_all_blobs_and_what_it_frees_goes_to_who_waits() {
    const NODES: usize = 200;
    let mut cluster = Cluster::new(NODES);
    for number in 0..NODES {
        cluster.open(number, blob(number), 1, SOURCE);
    }
    let mut holders = Vec::new();
    for number in 0..NODES {
        match cluster.lease(number, blob(number)) {
            Some(_) => holders.push(number),
            None => assert!(number >= HOST_LEASES_START as usize),
        }
    }
    assert_eq!(holders.len(), HOST_LEASES_START as usize);
    let status = cluster.core.status();
    assert_eq!(
        (status.hosts.len(), status.hosts[0].leases),
        (1, holders.len())
    );
    // Another host has its own.
    cluster.open(0, blob(9999), 1, "elsewhere.example");
    assert!(cluster.lease(0, blob(9999)).is_some());
    let out = cluster.fetched(holders[0], blob(holders[0]), one(0));
    assert_eq!(wait(&out), Some(Duration::ZERO), "nobody was told: {out:?}");
    let told: BTreeSet<NodeId> = out.iter().map(|(to, _)| *to).collect();
    assert!(
        told.contains(&node(holders.len())),
        "the first in the queue"
    );
    assert!(cluster.lease(holders.len(), blob(holders.len())).is_some());
}

#[test]
fn a_host_that_complains_is_left_alone_by_all_and_they_do_not_come_back_together() {
    const NODES: usize = 60;
    let mut cluster = Cluster::new(NODES);
    for number in 0..NODES {
        cluster.open(number, blob(number), 2, SOURCE);
    }
    assert!(cluster.lease(0, blob(0)).is_some());
    let retry_after = Some(S * 8);
    let host = SOURCE.to_owned();
    // Who fetches nothing there cannot know.
    cluster.send(
        1,
        FromNode::SourceLimited {
            host: host.clone(),
            retry_after,
        },
    );
    assert!(cluster.lease(1, blob(1)).is_some());
    cluster.send(
        0,
        FromNode::SourceLimited {
            host: host.clone(),
            retry_after,
        },
    );
    let waits: Vec<Duration> = (2..NODES)
        .map(|number| wait(&cluster.ask(number, blob(number))).expect("a lease in a pause"))
        .collect();
    assert!(
        waits.iter().all(|wait| (S * 8..S * 11).contains(wait)),
        "{waits:?}"
    );
    assert!(
        waits.iter().collect::<BTreeSet<_>>().len() > 30,
        "{waits:?}"
    );
    // However long it says.
    let retry_after = Some(Duration::MAX);
    cluster.send(0, FromNode::SourceLimited { host, retry_after });
    cluster.now += HOST_PAUSE_MAX;
    cluster.core.tick(cluster.now, &mut Vec::new());
    assert!((2..NODES).any(|number| cluster.lease(number, blob(number)).is_some()));
}

#[test]
fn a_task_is_estimated_by_what_its_members_get() {
    let mut cluster = Cluster::new(10);
    for number in 0..10 {
        cluster.open(number, blob(0), 100, SOURCE);
    }
    for second in 0..50 {
        cluster.now += S;
        for number in 0..10 {
            let runs = vec![one(second)];
            cluster.send(
                number,
                FromNode::Holding {
                    digest: blob(0),
                    runs,
                    complete: false,
                },
            );
        }
    }
    let estimates = cluster.core.status().estimates;
    let estimate = &estimates[0];
    assert_eq!((estimates.len(), estimate.wanted), (1, 10));
    assert_eq!(estimate.missing_bytes, 10 * 50 * PIECE);
    let left = estimate.completes_in.unwrap();
    assert!((S * 40..S * 60).contains(&left), "{left:?}");
}

#[test]
fn pieces_that_cannot_be_and_leases_that_never_were_are_refused_and_counted() {
    let mut cluster = Cluster::new(2);
    for number in 0..2 {
        cluster.open(number, blob(0), 16, SOURCE);
    }
    let beyond = PieceRun {
        first: 15,
        count: 2,
    };
    let out = cluster.send(
        0,
        FromNode::Holding {
            digest: blob(0),
            runs: vec![one(0), beyond],
            complete: false,
        },
    );
    let reason = RefusedReason::Impossible;
    let digest = blob(0);
    assert_eq!(out, [(node(0), ToNode::Refused { digest, reason })]);
    assert_eq!(cluster.core.status().impossible_runs, 1);
    // Nothing of it counts: the piece that it named beside it is still to be had.
    let given = cluster.lease(1, blob(0)).unwrap();
    assert!(
        given.range().contains(&0) && given.range().contains(&3),
        "{given:?}"
    );
    // Node 0 says that it has fetched what node 1 is leased: the lease stands.
    cluster.fetched(0, blob(0), one(3));
    assert_eq!(cluster.core.status().forged_fetches, 1);
    let leases = cluster.core.status().leases;
    cluster.fetched(1, blob(0), one(3));
    assert!(cluster.core.status().leases <= leases);
    assert_eq!(cluster.core.status().forged_fetches, 1);
}

#[test]
fn announcements_without_end_are_refused_and_counted_and_the_next_minute_is_a_new_one() {
    let mut cluster = Cluster::new(2);
    let report = TaskReport {
        digest: blob(0),
        size_bytes: PIECE,
        has_source: false,
        wanted: false,
        complete: true,
        held: Vec::new(),
        fetching: Vec::new(),
    };
    let announce = |cluster: &mut Cluster, number: usize| {
        let holdings = vec![report.clone(); 1024];
        let last = false;
        cluster.send(number, FromNode::Announce { holdings, last })
    };
    for _ in 0..ANNOUNCEMENTS_PER_MINUTE_MAX / 1024 {
        assert!(announce(&mut cluster, 0).is_empty());
    }
    assert_eq!(announce(&mut cluster, 0).len(), 1024);
    assert_eq!(cluster.core.status().refused_floods, 1024);
    assert!(announce(&mut cluster, 1).is_empty(), "another node");
    cluster.now += S * 60;
    assert!(announce(&mut cluster, 0).is_empty());
}

#[test]
fn one_node_cannot_use_up_the_names_of_hosts() {
    let mut cluster = Cluster::new(2);
    for number in 0..HOSTS_PER_NODE_MAX as usize + 10 {
        cluster.open(0, blob(number), 1, &format!("host-{number}.example"));
    }
    assert_eq!(
        cluster.core.status().hosts.len(),
        HOSTS_PER_NODE_MAX as usize
    );
    cluster.open(1, blob(0), 1, SOURCE);
    assert!(
        cluster
            .core
            .status()
            .hosts
            .iter()
            .any(|host| host.name == SOURCE)
    );
}

#[test]
fn a_node_that_announces_without_end_is_refused_and_the_others_are_not() {
    let config = CoreConfig {
        tasks_per_node_max: 10,
        ..CoreConfig::default()
    };
    let mut cluster = Cluster::new(2);
    cluster.core = Core::new(config, Duration::ZERO);
    for number in 0..2 {
        let info = NodeInfo::default();
        assert!(
            cluster
                .core
                .joined(cluster.now, node(number), info, &mut Vec::new())
        );
    }
    for number in 0..50 {
        cluster.open(0, blob(number), 1, SOURCE);
    }
    assert_eq!(cluster.core.status().memberships, 10);
    cluster.open(1, blob(100), 1, SOURCE);
    assert!(cluster.lease(1, blob(100)).is_some());
}
