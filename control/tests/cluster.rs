//! A real server and real clients over loopback.
//!
//! No test waits for a fixed time where an event tells the same: [`WAIT`] only bounds a failure.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use pantala_control::{
    ClientConfig, Command, ControlClient, ControlHandle, Event, Identity, IdentityError,
    JoinTarget, JoinToken, RefusedReason, Server, ServerConfig, TaskReport,
};
use pantala_wire::{BlobDigest, NodeId, PieceDigest, PieceIndex, PieceRun, PieceSet};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Far longer than anything here takes, on however slow a machine.
const WAIT: Duration = Duration::from_secs(60);
const PIECE: u64 = 1 << 20;

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn config(dir: &Path) -> ServerConfig {
    ServerConfig::new(dir.to_owned(), loopback(0))
}

async fn server(dir: &Path) -> Server {
    Server::start(config(dir)).await.unwrap()
}

fn target(server: &Server) -> JoinTarget {
    JoinTarget {
        address: server.local_addr().to_string(),
        token: server.join_token().clone(),
    }
}

struct Node {
    _dir: TempDir,
    identity: Identity,
    handle: ControlHandle,
    events: mpsc::Receiver<Event>,
}

impl Node {
    async fn new(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_join(dir.path(), &target(server))
            .await
            .unwrap();
        Self::with_identity(server, dir, identity).await
    }
    async fn with_identity(server: &Server, dir: TempDir, identity: Identity) -> Self {
        let address = server.local_addr().to_string();
        let config = ClientConfig::new(address, identity.clone(), loopback(65003));
        let (handle, events) = ControlClient::start(config);
        let mut node = Self {
            _dir: dir,
            identity,
            handle,
            events,
        };
        node.until(|event| matches!(event, Event::Connected)).await;
        node.announce(Vec::new());
        node
    }
    fn id(&self) -> NodeId {
        self.identity.node_id()
    }
    fn announce(&self, holdings: Vec<TaskReport>) {
        let last = true;
        self.handle
            .send(Command::Announce { holdings, last })
            .unwrap();
    }
    fn open(&self, digest: BlobDigest, piece_count: u32) {
        self.handle
            .send(Command::OpenTask {
                digest,
                size_bytes: u64::from(piece_count) * PIECE,
                has_source: true,
                held: Vec::new(),
                complete: false,
            })
            .unwrap();
    }
    fn ask(&self, digest: BlobDigest, first: u32, count: u32) {
        self.handle
            .send(Command::AskLease {
                digest,
                wanted: vec![PieceRun { first, count }],
                urgent: None,
            })
            .unwrap();
    }
    async fn next(&mut self) -> Event {
        timeout(WAIT, self.events.recv())
            .await
            .expect("an event in time")
            .expect("the client runs")
    }
    async fn until(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Event {
        loop {
            let event = self.next().await;
            if wanted(&event) {
                return event;
            }
        }
    }
    async fn lease(&mut self) -> PieceRun {
        loop {
            match self.next().await {
                Event::Lease { pieces, .. } => return pieces,
                Event::LeaseWait { .. } => panic!("no lease"),
                _ => {}
            }
        }
    }
}

fn blob(number: u8) -> BlobDigest {
    BlobDigest::new([number; 32])
}

#[tokio::test]
async fn a_node_joins_with_the_token_and_keeps_its_name_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let node_dir = tempfile::tempdir().unwrap();
    let target = target(&server);
    let first = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap();
    server.shutdown().await;
    // The second start needs no control.
    let second = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap();
    assert_eq!(first.node_id(), second.node_id());
    let digest = PieceDigest([3; 32]);
    let claim = second.sign_claim(&blob(1), PieceIndex(4), &digest);
    assert_eq!(claim.author, first.node_id());
    assert!(claim.verify(&blob(1), PieceIndex(4)).is_ok());
}

#[tokio::test]
async fn secrets_are_readable_by_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let node_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    for path in [
        dir.path().join("control/ca-key.pem"),
        dir.path().join("control/join-token"),
        node_dir.path().join("identity/key.pem"),
    ] {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
    let text = format!("{:?} {:?}", server.join_token(), target(&server));
    let secret = server.join_token().reveal();
    assert!(!text.contains(&secret["pantala-join-1.".len()..][..20]));
}

#[tokio::test]
async fn a_wrong_secret_is_refused_and_a_foreign_token_does_not_trust_this_control() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = server(dir.path()).await;
    let other = Server::start(config(other_dir.path())).await.unwrap();
    let node_dir = tempfile::tempdir().unwrap();

    // Right CA, wrong secret: the text form begins with the 32 bytes of the secret.
    let mut text = server.join_token().reveal();
    let at = "pantala-join-1.".len();
    let flipped = if &text[at..=at] == "A" { "B" } else { "A" };
    text.replace_range(at..=at, flipped);
    let wrong: JoinToken = text.parse().unwrap();
    let address = server.local_addr().to_string();
    let error = Identity::load_or_join(
        node_dir.path(),
        &JoinTarget {
            address: address.clone(),
            token: wrong,
        },
    )
    .await
    .unwrap_err();
    assert!(matches!(error, IdentityError::Refused { .. }), "{error}");
    assert!(!error.is_retryable());

    let foreign = JoinTarget {
        address,
        token: other.join_token().clone(),
    };
    let error = Identity::load_or_join(node_dir.path(), &foreign)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("join token"), "{error}");
    assert!(!error.is_retryable(), "{error}");

    // The same key may still join where it is let in; after that, not another cluster.
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    let error = Identity::load_or_join(node_dir.path(), &target(&other))
        .await
        .unwrap_err();
    assert!(matches!(error, IdentityError::WrongCluster(_)), "{error}");
}

#[tokio::test]
async fn a_join_without_anybody_there_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let target = target(&server);
    server.shutdown().await;
    let node_dir = tempfile::tempdir().unwrap();
    let error = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn damaged_identity_files_are_named_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let other_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(other_dir.path(), &target(&server))
        .await
        .unwrap();
    for (file, content) in [
        ("key.pem", Some(&b"rubbish"[..])),
        ("key.pem", None),
        ("ca.pem", Some(b"")),
        (
            "certificate.pem",
            Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n"),
        ),
    ] {
        let node_dir = tempfile::tempdir().unwrap();
        Identity::load_or_join(node_dir.path(), &target(&server))
            .await
            .unwrap();
        let path = node_dir.path().join("identity").join(file);
        match content {
            Some(content) => std::fs::write(&path, content).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = Identity::load(node_dir.path()).unwrap_err();
        assert!(
            matches!(error, IdentityError::Corrupt { .. }),
            "{file}: {error}"
        );
        assert!(error.to_string().contains("restore"), "{error}");
    }
    // The certificate of another node.
    let node_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    std::fs::copy(
        other_dir.path().join("identity/certificate.pem"),
        node_dir.path().join("identity/certificate.pem"),
    )
    .unwrap();
    assert!(Identity::load(node_dir.path()).is_err());
}

#[tokio::test]
async fn a_certificate_of_another_cluster_opens_no_session() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = server(dir.path()).await;
    let other = Server::start(config(other_dir.path())).await.unwrap();
    let node_dir = tempfile::tempdir().unwrap();
    let stranger = Identity::load_or_join(node_dir.path(), &target(&other))
        .await
        .unwrap();
    let (handle, mut events) = ControlClient::start(ClientConfig::new(
        server.local_addr().to_string(),
        stranger,
        loopback(1),
    ));
    let event = timeout(WAIT, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::Disconnected { .. }), "{event:?}");
    assert!(!handle.is_connected());
}

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
async fn garbage_at_the_port_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut held = Vec::new();
    for number in 0..100u32 {
        let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
        let garbage: Vec<u8> = (0..2000u32)
            .map(|i| (i.wrapping_mul(number + 7) >> 3) as u8)
            .collect();
        // The server may have hung up at the first bytes already.
        stream.write_all(&garbage).await.ok();
        held.push(stream);
    }
    // HTTP/2 without TLS, and a handshake that is announced and never comes.
    let mut plain = TcpStream::connect(server.local_addr()).await.unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    timeout(WAIT, plain.read_to_end(&mut answer))
        .await
        .expect("the server hangs up")
        .ok();
    let mut node = Node::new(&server).await;
    node.open(blob(1), 3);
    node.ask(blob(1), 0, 3);
    node.lease().await;
}

#[tokio::test]
async fn a_message_over_the_limit_ends_the_session_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut bystander = Node::new(&server).await;
    let mut node = Node::new(&server).await;
    node.handle
        .send(Command::AskLease {
            digest: blob(1),
            wanted: vec![PieceRun { first: 1, count: 1 }; 300_000],
            urgent: None,
        })
        .unwrap();
    node.until(|event| matches!(event, Event::Disconnected { .. }))
        .await;
    node.until(|event| matches!(event, Event::Connected)).await;
    bystander.open(blob(2), 1);
    bystander.ask(blob(2), 0, 1);
    bystander.lease().await;
}

#[tokio::test]
async fn a_node_that_does_not_read_is_disconnected_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.outbound_max = 8;
    let server = Server::start(config).await.unwrap();
    let mut slow = Node::new(&server).await;
    let mut quick = Node::new(&server).await;
    slow.open(blob(1), 1);
    // Each of these is answered; nobody reads the answers, until the session is cut.
    let cut = async {
        loop {
            if slow.handle.send(Command::AskLease {
                digest: blob(1),
                wanted: vec![PieceRun { first: 0, count: 1 }],
                urgent: None,
            }) == Err(pantala_control::client::Unsent::Disconnected)
            {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::spawn(async move {
        quick.open(blob(2), 1);
        quick.ask(blob(2), 0, 1);
        quick.lease().await;
    })
    .await
    .unwrap();
    timeout(WAIT, cut).await.expect("the slow node is cut off");
    slow.until(|event| matches!(event, Event::Disconnected { .. }))
        .await;
    slow.until(|event| matches!(event, Event::Connected)).await;
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
