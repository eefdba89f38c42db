//! Servers and nodes for the tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use pantala_control::{
    ClientConfig, Command, ControlClient, ControlHandle, Event, Identity, JoinTarget, Server,
    ServerConfig, TaskReport,
};
use pantala_wire::{BlobDigest, NodeId, PieceRun};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Far longer than anything here takes, on however slow a machine.
pub(crate) const WAIT: Duration = Duration::from_secs(60);
pub(crate) const PIECE: u64 = 1 << 20;

pub(crate) fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

pub(crate) fn config(dir: &Path) -> ServerConfig {
    ServerConfig::new(dir.to_owned(), loopback(0))
}

pub(crate) async fn server(dir: &Path) -> Server {
    Server::start(config(dir)).await.unwrap()
}

pub(crate) fn target(server: &Server) -> JoinTarget {
    JoinTarget {
        address: server.local_addr().to_string(),
        token: server.join_token().clone(),
    }
}

pub(crate) struct Node {
    _dir: TempDir,
    pub(crate) identity: Identity,
    pub(crate) handle: ControlHandle,
    pub(crate) events: mpsc::Receiver<Event>,
}

impl Node {
    pub(crate) async fn new(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_join(dir.path(), &target(server))
            .await
            .unwrap();
        Self::with_identity(server, dir, identity).await
    }
    pub(crate) async fn with_identity(server: &Server, dir: TempDir, identity: Identity) -> Self {
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
    pub(crate) fn id(&self) -> NodeId {
        self.identity.node_id()
    }
    pub(crate) fn announce(&self, holdings: Vec<TaskReport>) {
        let last = true;
        self.handle
            .send(Command::Announce { holdings, last })
            .unwrap();
    }
    pub(crate) fn open(&self, digest: BlobDigest, piece_count: u32) {
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
    pub(crate) fn ask(&self, digest: BlobDigest, first: u32, count: u32) {
        self.handle
            .send(Command::AskLease {
                digest,
                wanted: vec![PieceRun { first, count }],
                urgent: None,
            })
            .unwrap();
    }
    pub(crate) async fn next(&mut self) -> Event {
        timeout(WAIT, self.events.recv())
            .await
            .expect("an event in time")
            .expect("the client runs")
    }
    pub(crate) async fn until(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Event {
        loop {
            let event = self.next().await;
            if wanted(&event) {
                return event;
            }
        }
    }
    pub(crate) async fn lease(&mut self) -> PieceRun {
        loop {
            match self.next().await {
                Event::Lease { pieces, .. } => return pieces,
                Event::LeaseWait { .. } => panic!("no lease"),
                _ => {}
            }
        }
    }
}

pub(crate) fn blob(number: u8) -> BlobDigest {
    BlobDigest::new([number; 32])
}
