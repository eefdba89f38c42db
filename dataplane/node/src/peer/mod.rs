//! Other nodes: where they are, the connection to each, and what is served to them.

mod paths;
mod serve;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use pantala_control::Peer;
use pantala_quic::{Connection, Endpoint, Error as QuicError, PathStats};
use pantala_wire::NodeId;
use parking_lot::Mutex;

pub use paths::{Asking, PathMeter, REPORT_INTERVAL};
pub use serve::Server;

use crate::meter::{Meter, PathStatus};
use crate::metrics::Metrics;

/// Addresses remembered. Control names a handful of parents for each task; above this the book is
/// emptied of nodes without a connection.
const ADDRESSES_MAX: usize = 16 * 1024;
/// How often dead connections are swept out.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// The connection to one node, or the right to make it: who holds the lock dials, the others wait.
type Slot = Arc<tokio::sync::Mutex<Option<Connection>>>;

/// The nodes that this one talks to.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    endpoint: Endpoint,
    server: Arc<Server>,
    metrics: Arc<Metrics>,
    paths: PathMeter,
    meter: Arc<Meter>,
    addresses: Mutex<HashMap<NodeId, SocketAddr>>,
    slots: Mutex<HashMap<NodeId, Slot>>,
    connections: Mutex<Vec<Connection>>,
    /// Bounded by control, which names all of them each time.
    shut_out: Mutex<HashSet<NodeId>>,
}

/// What `status` says of a connection.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PeerSummary {
    /// The node at the other end.
    pub node: String,
    /// Where it is.
    pub address: String,
    /// Smoothed round-trip time.
    pub rtt_ms: f64,
    /// Bytes sent over UDP.
    pub sent_bytes: u64,
    /// Bytes received over UDP.
    pub received_bytes: u64,
    /// What the path to it delivers.
    #[serde(flatten)]
    pub path: Option<PathStatus>,
}

/// [`Peers`] that do not live on because of this.
#[derive(Clone)]
pub struct WeakPeers(Weak<Inner>);

impl WeakPeers {
    /// The peers, if the node still has them.
    pub fn upgrade(&self) -> Option<Peers> {
        self.0.upgrade().map(|inner| Peers { inner })
    }
}

impl Peers {
    /// Starts to take in connections on `endpoint` and to serve them by `server`.
    pub fn start(
        endpoint: Endpoint,
        server: Arc<Server>,
        metrics: Arc<Metrics>,
        meter: Arc<Meter>,
    ) -> Self {
        let peers = Self {
            inner: Arc::new(Inner {
                endpoint,
                server,
                metrics,
                paths: PathMeter::default(),
                meter,
                addresses: Mutex::default(),
                slots: Mutex::default(),
                connections: Mutex::default(),
                shut_out: Mutex::default(),
            }),
        };
        let accepting = peers.clone();
        tokio::spawn(async move {
            while let Some(connection) = accepting.inner.endpoint.accept().await {
                tracing::info!(peer = ?connection.remote_node(), address = %connection.remote_addr(), "peer connected");
                accepting.adopt(connection).await;
            }
        });
        let sweeping = Arc::downgrade(&peers.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                let Some(inner) = sweeping.upgrade() else {
                    return;
                };
                inner.sweep();
            }
        });
        peers
    }

    /// Remembers where nodes are.
    pub fn learn(&self, peers: &[Peer]) {
        let mut addresses = self.inner.addresses.lock();
        if addresses.len() + peers.len() > ADDRESSES_MAX {
            let slots = self.inner.slots.lock();
            addresses.retain(|node, _| slots.contains_key(node));
        }
        addresses.extend(peers.iter().map(|peer| (peer.node, peer.address)));
    }

    /// What each parent delivers.
    pub fn paths(&self) -> &PathMeter {
        &self.inner.paths
    }

    /// What the paths deliver, and what may be sent.
    pub fn meter(&self) -> &Meter {
        &self.inner.meter
    }

    /// These peers, without keeping them.
    pub fn downgrade(&self) -> WeakPeers {
        WeakPeers(Arc::downgrade(&self.inner))
    }

    /// Who is connected, where, and what QUIC knows of the way there.
    pub fn links(&self) -> Vec<(NodeId, SocketAddr, PathStats)> {
        // Not under the lock: asking a connection waits for the thread that has it.
        let connections = self.inner.connections.lock().clone();
        let open = connections.iter().filter(|c| !c.is_closed());
        open.map(|c| (c.remote_node(), c.remote_addr(), c.stats()))
            .collect()
    }

    /// The connection to `node`, made if there is none.
    ///
    /// # Errors
    /// That of the connection attempt; [`QuicError::TimedOut`] where the address is not known.
    pub async fn connection(&self, node: NodeId) -> Result<Connection, QuicError> {
        let slot = self.slot(node);
        let mut place = slot.lock().await;
        if let Some(connection) = place.as_ref().filter(|c| !c.is_closed()) {
            return Ok(connection.clone());
        }
        let address = self.inner.addresses.lock().get(&node).copied();
        let Some(address) = address else {
            return Err(QuicError::TimedOut);
        };
        let connection = self.inner.endpoint.connect(address, node).await?;
        tracing::info!(peer = ?node, %address, "connected to peer");
        *place = Some(connection.clone());
        drop(place);
        self.serve(connection.clone());
        Ok(connection)
    }

    /// Serves a connection that a peer made, and uses it in the other direction too.
    async fn adopt(&self, connection: Connection) {
        let slot = self.slot(connection.remote_node());
        if let Ok(mut place) = slot.try_lock()
            && place.as_ref().is_none_or(Connection::is_closed)
        {
            *place = Some(connection.clone());
        }
        self.serve(connection);
    }

    fn serve(&self, connection: Connection) {
        {
            let mut connections = self.inner.connections.lock();
            connections.push(connection.clone());
            self.inner
                .metrics
                .peers_connected
                .set(connections.len() as i64);
        }
        tokio::spawn(Arc::clone(&self.inner.server).connection(connection));
    }

    fn slot(&self, node: NodeId) -> Slot {
        Arc::clone(self.inner.slots.lock().entry(node).or_default())
    }

    /// Talks to these nodes no more.
    pub fn shut_out(&self, nodes: &[NodeId]) {
        self.inner.endpoint.shut_out(nodes);
        *self.inner.shut_out.lock() = nodes.iter().copied().collect();
    }

    /// Whether control has shut `node` out: no claim of it is believed.
    pub fn is_shut_out(&self, node: &NodeId) -> bool {
        self.inner.shut_out.lock().contains(node)
    }

    /// The open connections.
    pub fn summaries(&self) -> Vec<PeerSummary> {
        let connections = self.inner.connections.lock();
        connections
            .iter()
            .filter(|c| !c.is_closed())
            .map(|c| {
                let stats = c.stats();
                PeerSummary {
                    node: c.remote_node().to_string(),
                    address: c.remote_addr().to_string(),
                    rtt_ms: stats.rtt.as_secs_f64() * 1000.0,
                    sent_bytes: stats.sent_bytes,
                    received_bytes: stats.received_bytes,
                    path: self.inner.meter.path_status(&c.remote_addr()),
                }
            })
            .collect()
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.inner.endpoint.close().await;
    }
}

impl Inner {
    fn sweep(&self) {
        let mut connections = self.connections.lock();
        connections.retain(|c| !c.is_closed());
        self.metrics.peers_connected.set(connections.len() as i64);
        drop(connections);
        // A slot that somebody else holds is being dialled; one without a live connection is not
        // worth its memory.
        self.slots.lock().retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot
                    .try_lock()
                    .is_ok_and(|place| place.as_ref().is_some_and(|c| !c.is_closed()))
        });
    }
}
