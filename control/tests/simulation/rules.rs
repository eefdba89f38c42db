//! One rule of the core after the other, without chance.

use std::time::Duration;

use pantala_control::Labels;
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, CoreConfig, FromNode, RefusedReason, ToNode};
use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex, PieceRun, PieceSet};
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::model::{PIECE, blob, id};

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
            ..NodeInfo::default()
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
        cluster.open(number, blob(0), 36);
    }
    let run = cluster.run(0, blob(0), Some(18)).unwrap();
    assert_eq!((run.first, run.count), (18, 6));
    // Taken: the next free pieces instead.
    let run = cluster.run(1, blob(0), Some(18)).unwrap();
    assert_eq!((run.first, run.count), (24, 5));
    // Nothing is free behind: from the start.
    let run = cluster.run(2, blob(0), Some(35)).unwrap();
    assert_eq!(
        run,
        PieceRun {
            first: 35,
            count: 1
        }
    );
    let run = cluster.run(2, blob(0), Some(35)).unwrap();
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
    assert_eq!(cluster.core.status().leases, 1);
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
fn a_new_process_of_a_node_has_nothing_of_what_the_old_one_had() {
    let mut cluster = Cluster::new(CoreConfig::default(), 2);
    for number in 0..2 {
        cluster.open(number, blob(0), 2);
    }
    assert!(cluster.run(0, blob(0), Some(0)).is_some());
    cluster.send(
        0,
        FromNode::Holding {
            digest: blob(0),
            runs: vec![PieceRun { first: 1, count: 1 }],
            complete: false,
        },
    );
    assert_eq!(cluster.run(1, blob(0), None), None);
    assert!(cluster.join(id(0)));
    assert_eq!(cluster.run(1, blob(0), None).unwrap().first, 0);
    assert_eq!(cluster.run(1, blob(0), None).unwrap().first, 1);
}

#[test]
fn who_waits_for_a_piece_gets_a_parent_that_holds_it() {
    const NODES: usize = 60;
    let mut cluster = Cluster::new(CoreConfig::default(), NODES);
    let mut parents: Vec<Vec<NodeId>> = vec![Vec::new(); NODES];
    let ids: Vec<NodeId> = (0..NODES).map(id).collect();
    let mut tell = |cluster: &mut Cluster, number: usize, message: FromNode| {
        let mut out = Vec::new();
        let (now, node) = (cluster.now, ids[number]);
        cluster.core.handle(now, node, message, &mut out);
        for (to, message) in out {
            if let ToNode::Parents { peers, .. } = message {
                let at = ids.iter().position(|other| *other == to).unwrap();
                parents[at] = peers.iter().map(|peer| peer.node).collect();
            }
        }
        parents[number].clone()
    };
    for number in 0..NODES {
        tell(
            &mut cluster,
            number,
            FromNode::OpenTask {
                digest: blob(0),
                size_bytes: PIECE,
                has_source: true,
                held: Vec::new(),
                complete: false,
            },
        );
    }
    let only = vec![PieceRun { first: 0, count: 1 }];
    let fetched = FromNode::Fetched {
        digest: blob(0),
        pieces: only.clone(),
    };
    tell(&mut cluster, 0, fetched);
    for number in 1..NODES {
        let ask = FromNode::AskLease {
            digest: blob(0),
            wanted: only.clone(),
            urgent: None,
        };
        let parents = tell(&mut cluster, number, ask);
        assert!(parents.contains(&id(0)), "node {number}");
    }
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
        count: 16 * 1024,
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
