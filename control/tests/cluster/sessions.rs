//! What honest nodes get, also when control restarts or a node goes.

use pantala_control::{Command, Event, RefusedReason, Server, TaskReport};
use pantala_wire::{BlobDigest, PieceDigest, PieceIndex, PieceRun, PieceSet};

use crate::harness::{Node, PIECE, WAIT, blob, config, server};

#[tokio::test]
async fn two_nodes_get_each_other_as_parents_and_disjoint_leases() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut a = Node::new(&server).await;
    let mut b = Node::new(&server).await;
    a.open(blob(1), 100);
    a.ask(blob(1), 0, 100);
    let first = a.lease().await;
    b.open(blob(1), 100);
    b.ask(blob(1), 0, 100);
    let second = b.lease().await;
    assert_eq!(first.first, 0);
    assert!(second.first >= first.range().end || second.range().end <= first.first);
    let id = b.id();
    a.until(
        |event| matches!(event, Event::Parents { peers, .. } if peers.iter().any(|p| p.node == id)),
    )
    .await;
}

#[tokio::test]
async fn leases_are_disjoint_and_cover_the_blob_when_many_pull_at_once() {
    const COUNT: u32 = 200;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut nodes = Vec::new();
    for _ in 0..8 {
        nodes.push(Node::new(&server).await);
    }
    let fetchers = nodes.into_iter().map(|mut node| {
        tokio::spawn(async move {
            let mut mine = Vec::new();
            node.open(blob(7), COUNT);
            node.ask(blob(7), 0, COUNT);
            loop {
                match node.next().await {
                    Event::Lease { digest, pieces, .. } => {
                        mine.push(pieces);
                        let fetched = vec![pieces];
                        node.handle
                            .send(Command::Fetched {
                                digest,
                                pieces: fetched,
                            })
                            .unwrap();
                        node.ask(blob(7), 0, COUNT);
                    }
                    // All is leased, and nobody gives back.
                    Event::LeaseWait { .. } => return (node, mine),
                    Event::Parents { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        })
    });
    let mut seen = PieceSet::empty(COUNT);
    let mut kept = Vec::new();
    for fetcher in fetchers.collect::<Vec<_>>() {
        let (node, runs) = fetcher.await.unwrap();
        for piece in runs.iter().flat_map(PieceRun::range) {
            assert!(seen.insert(PieceIndex(piece)), "piece {piece} leased twice");
        }
        kept.push(node);
    }
    assert!(seen.is_full());
}

#[tokio::test]
async fn the_leases_of_a_node_that_leaves_go_to_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut a = Node::new(&server).await;
    let mut b = Node::new(&server).await;
    a.open(blob(1), 1);
    a.ask(blob(1), 0, 1);
    a.lease().await;
    b.open(blob(1), 1);
    b.ask(blob(1), 0, 1);
    b.until(
        |event| matches!(event, Event::LeaseWait { retry_after, .. } if !retry_after.is_zero()),
    )
    .await;
    drop(a);
    b.until(|event| matches!(event, Event::LeaseWait { retry_after, .. } if retry_after.is_zero()))
        .await;
    b.ask(blob(1), 0, 1);
    assert_eq!(b.lease().await, PieceRun { first: 0, count: 1 });
}

#[tokio::test]
async fn after_a_restart_announced_pieces_are_not_leased_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let address = server.local_addr();
    let mut a = Node::new(&server).await;
    let mut b = Node::new(&server).await;
    a.open(blob(1), 10);
    a.ask(blob(1), 0, 10);
    let run = a.lease().await;
    server.shutdown().await;
    a.until(|event| matches!(event, Event::Disconnected { .. }))
        .await;
    assert!(
        a.handle
            .send(Command::CloseTask { digest: blob(2) })
            .is_err()
    );

    let mut again = config(dir.path());
    again.listen = address;
    // Long enough for the slowest node to come back.
    again.core.start_grace = WAIT;
    let server = Server::start(again).await.unwrap();
    for node in [&mut a, &mut b] {
        node.until(|event| matches!(event, Event::Connected)).await;
    }
    let report = |held: Vec<PieceRun>, fetching: Vec<PieceRun>| TaskReport {
        digest: blob(1),
        size_bytes: 10 * PIECE,
        has_source: true,
        wanted: true,
        complete: false,
        held,
        fetching,
    };
    let held = PieceRun {
        first: run.first,
        count: 1,
    };
    let fetching = PieceRun {
        first: run.first + 1,
        count: run.count - 1,
    };
    a.announce(vec![report(vec![held], vec![fetching])]);
    assert_eq!(a.lease().await, fetching);
    b.announce(vec![report(Vec::new(), Vec::new())]);
    b.ask(blob(1), 0, 10);
    // The grace holds back even what is free.
    b.until(|event| matches!(event, Event::LeaseWait { .. }))
        .await;
    drop(server);
}

#[tokio::test]
async fn a_task_that_was_never_opened_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut node = Node::new(&server).await;
    node.ask(blob(9), 0, 1);
    let event = node.next().await;
    let reason = RefusedReason::UnknownTask;
    assert_eq!(
        event,
        Event::Refused {
            digest: blob(9),
            reason
        }
    );
    node.handle
        .send(Command::OpenTask {
            digest: blob(9),
            size_bytes: u64::MAX,
            has_source: true,
            held: Vec::new(),
            complete: false,
        })
        .unwrap();
    let reason = RefusedReason::Size;
    let event = node.next().await;
    assert!(matches!(event, Event::Refused { reason: r, .. } if r == reason));
}

#[tokio::test]
async fn a_liar_reported_twice_is_shut_out_and_its_session_is_void() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut liar = Node::new(&server).await;
    let mut a = Node::new(&server).await;
    let b = Node::new(&server).await;
    let claim = liar
        .identity
        .sign_claim(&blob(1), PieceIndex(0), &PieceDigest([1; 32]));
    for node in [&a, &b] {
        node.handle
            .send(Command::FalseClaim {
                digest: blob(1),
                piece: PieceIndex(0),
                claim,
                true_digest: PieceDigest([2; 32]),
                relayer: liar.id(),
            })
            .unwrap();
    }
    let id = liar.id();
    a.until(|event| *event == Event::ShutOut(vec![id])).await;
    liar.until(|event| *event == Event::ShutOut(vec![id])).await;
    liar.open(blob(2), 1);
    let event = liar.next().await;
    let reason = RefusedReason::ShutOut;
    assert!(
        matches!(event, Event::Refused { reason: r, .. } if r == reason),
        "{event:?}"
    );
    // Who comes later hears it too.
    let mut late = Node::new(&server).await;
    late.until(|event| *event == Event::ShutOut(vec![id])).await;
}

#[tokio::test]
async fn a_big_announcement_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let a = Node::new(&server).await;
    let holdings = (0..1000u32)
        .map(|number| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            TaskReport {
                digest: BlobDigest::new(bytes),
                size_bytes: 400 * PIECE,
                has_source: false,
                wanted: false,
                complete: false,
                held: (0..200)
                    .map(|i| PieceRun {
                        first: 2 * i,
                        count: 1,
                    })
                    .collect(),
                fetching: Vec::new(),
            }
        })
        .collect();
    a.announce(holdings);
    let mut last = [0; 32];
    last[..4].copy_from_slice(&999u32.to_le_bytes());
    let mut b = Node::new(&server).await;
    // Until the announcement is through, nobody is a parent for the last blob of it.
    b.open(BlobDigest::new(last), 400);
    let id = a.id();
    b.until(
        |event| matches!(event, Event::Parents { peers, .. } if peers.iter().any(|p| p.node == id)),
    )
    .await;
}
