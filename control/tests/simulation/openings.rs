//! The rules of openings: who may ask the source for the start of a blob whose size nobody knows.

use std::time::Duration;

use pantala_control::Labels;
use pantala_control::core::config::{LEASE_RUN_MAX, OPENINGS_PER_NODE_MAX};
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, ToNode};
use pantala_wire::{BlobDigest, NodeId, PieceIndex, PieceRun};

use crate::model::{PIECE, blob, id};

struct Cluster {
    core: Core,
    now: Duration,
}

impl Cluster {
    fn new(node_count: usize) -> Self {
        let mut cluster = Self {
            core: Core::new(CoreConfig::default(), Duration::ZERO),
            now: Duration::from_secs(60),
        };
        for number in 0..node_count {
            assert!(cluster.join(number, false));
        }
        cluster
    }

    fn join(&mut self, number: usize, resumed: bool) -> bool {
        let info = NodeInfo {
            address: ([127, 0, 0, 1], 1).into(),
            labels: Labels::default(),
            resumed,
            ..NodeInfo::default()
        };
        self.core
            .joined(self.now, id(number), info, &mut Vec::new())
    }

    fn send(&mut self, number: usize, message: FromNode) -> Vec<(NodeId, ToNode)> {
        let mut out = Vec::new();
        self.core.handle(self.now, id(number), message, &mut out);
        out
    }

    fn ask_opening(&mut self, number: usize, digest: BlobDigest) -> bool {
        let out = self.send(number, FromNode::AskOpening { digest });
        match &out[..] {
            [(to, ToNode::Opening { granted, .. })] if *to == id(number) => *granted,
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self, number: usize, piece_count: u32) -> Vec<(NodeId, ToNode)> {
        self.send(
            number,
            FromNode::OpenTask {
                digest: blob(0),
                size_bytes: u64::from(piece_count) * PIECE,
                has_source: true,
                held: Vec::new(),
                complete: false,
            },
        )
    }

    /// What the node is leased, asking for everything, the start first.
    fn lease(&mut self, number: usize) -> Option<PieceRun> {
        let wanted = vec![PieceRun {
            first: 0,
            count: u32::MAX,
        }];
        let out = self.send(
            number,
            FromNode::AskLease {
                digest: blob(0),
                wanted,
                urgent: Some(PieceIndex(0)),
            },
        );
        leases(&out, number).pop()
    }
}

fn leases(out: &[(NodeId, ToNode)], number: usize) -> Vec<PieceRun> {
    let mine = out.iter().filter(|(to, _)| *to == id(number));
    mine.filter_map(|(_, message)| match message {
        ToNode::Lease { pieces, .. } => Some(*pieces),
        _ => None,
    })
    .collect()
}

fn is_woken(out: &[(NodeId, ToNode)], number: usize) -> bool {
    out.iter().any(|(to, message)| {
        let now = Duration::ZERO;
        *to == id(number)
            && matches!(message, ToNode::LeaseWait { retry_after, .. } if *retry_after == now)
    })
}

#[test]
fn one_node_opens_a_blob_and_its_opening_becomes_a_lease() {
    let mut cluster = Cluster::new(3);
    assert!(cluster.ask_opening(0, blob(0)));
    assert!(!cluster.ask_opening(1, blob(0)), "another node");
    assert!(!cluster.ask_opening(0, blob(0)), "the same node again");
    assert!(cluster.ask_opening(1, blob(1)), "another blob");
    // Somebody else names the size first: the beginning stays the first node's.
    cluster.open(1, 20);
    let run = cluster.lease(1).unwrap();
    assert!(run.first >= LEASE_RUN_MAX, "{run:?}");
    let out = cluster.open(0, 20);
    let beginning = PieceRun {
        first: 0,
        count: LEASE_RUN_MAX,
    };
    assert_eq!(leases(&out, 0), [beginning]);
    assert!(!cluster.ask_opening(2, blob(0)), "the blob is known now");
    cluster.open(2, 20);
    let other = cluster.lease(2).unwrap();
    assert!(other.first >= run.first + run.count, "{other:?}");
}

#[test]
fn a_small_blob_is_leased_whole_and_others_wait_for_it() {
    let mut cluster = Cluster::new(2);
    assert!(cluster.ask_opening(0, blob(0)));
    cluster.open(1, 3);
    assert_eq!(cluster.lease(1), None);
    let whole = PieceRun { first: 0, count: 3 };
    let out = cluster.open(0, 3);
    assert_eq!(leases(&out, 0), [whole]);
    assert_eq!(cluster.lease(1), None);
    let out = cluster.send(
        0,
        FromNode::Fetched {
            digest: blob(0),
            pieces: vec![whole],
        },
    );
    assert!(leases(&out, 1).is_empty());
    assert_eq!(cluster.lease(1), None, "held by its parent now");
}

#[test]
fn an_opening_that_ends_frees_the_beginning_and_wakes_who_waits() {
    let returned =
        |cluster: &mut Cluster| cluster.send(0, FromNode::ReturnOpening { digest: blob(0) });
    let expired = |cluster: &mut Cluster| {
        let mut out = Vec::new();
        cluster.now = cluster.core.next_timeout().unwrap();
        cluster.core.tick(cluster.now, &mut out);
        out
    };
    let departed = |cluster: &mut Cluster| {
        cluster.core.left(cluster.now, id(0));
        let mut out = Vec::new();
        cluster.now += CoreConfig::default().reconnect_grace;
        cluster.core.tick(cluster.now, &mut out);
        out
    };
    type End<'a> = &'a dyn Fn(&mut Cluster) -> Vec<(NodeId, ToNode)>;
    let ends: [End<'_>; 3] = [&returned, &expired, &departed];
    for (case, end) in ends.into_iter().enumerate() {
        let mut cluster = Cluster::new(2);
        assert!(cluster.ask_opening(0, blob(0)));
        cluster.open(1, 3);
        assert_eq!(cluster.lease(1), None);
        let out = end(&mut cluster);
        assert!(is_woken(&out, 1), "case {case}: {out:?}");
        assert_eq!(
            cluster.lease(1).map(|run| run.first),
            Some(0),
            "case {case}"
        );
    }
}

#[test]
fn nobody_but_its_holder_returns_an_opening() {
    let mut cluster = Cluster::new(2);
    assert!(cluster.ask_opening(0, blob(0)));
    cluster.send(1, FromNode::ReturnOpening { digest: blob(0) });
    assert!(!cluster.ask_opening(1, blob(0)));
    cluster.send(0, FromNode::ReturnOpening { digest: blob(0) });
    assert!(cluster.ask_opening(1, blob(0)));
}

#[test]
fn one_node_cannot_hoard_openings() {
    let mut cluster = Cluster::new(2);
    for number in 0..OPENINGS_PER_NODE_MAX as u16 {
        assert!(cluster.ask_opening(0, numbered(number)));
    }
    assert!(!cluster.ask_opening(0, numbered(u16::MAX)));
    assert!(cluster.ask_opening(1, numbered(u16::MAX)));
    cluster.send(
        0,
        FromNode::ReturnOpening {
            digest: numbered(0),
        },
    );
    assert!(cluster.ask_opening(0, numbered(u16::MAX - 1)));
}

fn numbered(number: u16) -> BlobDigest {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&number.to_le_bytes());
    BlobDigest::new(bytes)
}

#[test]
fn after_a_restart_nothing_is_opened_until_others_have_had_time_to_announce() {
    let mut cluster = Cluster {
        core: Core::new(CoreConfig::default(), Duration::ZERO),
        now: Duration::from_millis(10),
    };
    assert!(cluster.join(0, true));
    assert!(!cluster.ask_opening(0, blob(0)));
    cluster.now = CoreConfig::default().start_grace;
    assert!(cluster.ask_opening(0, blob(0)));
}
