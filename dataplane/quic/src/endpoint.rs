//! The node's place on the piece plane: it takes connections in and opens them.

use std::net::SocketAddr;
use std::sync::Arc;

use pantala_wire::NodeId;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{Instrument, debug, info_span};

use crate::admission::Admission;
use crate::config::{DriverReport, EndpointConfig, Limits, SeeSockets};
use crate::connection::Connection;
use crate::driver;
use crate::error::{BindError, CloseReason, Error};
use crate::identity::{Tls, node_of};
use crate::link::Link;

/// Admitted connections that wait for [`Endpoint::accept`]; when it is full, handshakes wait, and more of
/// them are refused.
const ACCEPT_QUEUE_MAX: usize = 64;

/// A UDP socket on which this node meets others; clones share it.
#[derive(Debug, Clone)]
pub struct Endpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Connection>>,
}

/// What the endpoint and its tasks share.
#[derive(Debug)]
struct Shared {
    driver: driver::Endpoint,
    node: NodeId,
    limits: Limits,
    report: DriverReport,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    admission: Admission<Arc<Link>>,
    /// Handshakes under way, in both directions.
    handshakes: usize,
}

/// Counts a handshake for as long as it lasts.
struct Handshake(Arc<Shared>);

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.state.lock().handshakes -= 1;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.driver.close(CloseReason::ShuttingDown);
    }
}

impl Endpoint {
    /// Binds the socket and starts to take connections in. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`]: limits or identity that are of no use, or no socket.
    pub fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        Self::bind_seen(config, None)
    }

    /// As [`Self::bind`]; `see` is shown the sockets, and may steer them otherwise than is done without privilege.
    ///
    /// # Errors
    /// As [`Self::bind`], and that of `see`.
    pub fn bind_seen(
        config: EndpointConfig,
        see: Option<SeeSockets<'_>>,
    ) -> Result<Self, BindError> {
        config.limits.validate()?;
        let tls = Tls::new(&config.identity)?;
        let node = tls.node;
        let (driver, report) =
            driver::Endpoint::bind(config.driver, config.listen, &config.limits, &tls, see)
                .map_err(|source| BindError::Socket {
                    address: config.listen,
                    source,
                })?;
        let shared = Arc::new(Shared {
            driver,
            node,
            state: Mutex::new(State {
                admission: Admission::new(config.limits.clone()),
                handshakes: 0,
            }),
            limits: config.limits,
            report,
        });
        let (sender, accepted) = mpsc::channel(ACCEPT_QUEUE_MAX);
        tokio::spawn(take_in(shared.clone(), sender).instrument(info_span!("peers")));
        Ok(Self(Arc::new(Inner {
            shared,
            accepted: tokio::sync::Mutex::new(accepted),
        })))
    }

    /// This node, as its certificate says.
    pub fn node(&self) -> NodeId {
        self.0.shared.node
    }

    /// The address that the socket is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.shared.driver.local_addr()
    }

    /// What moves this endpoint's packets, and why.
    pub fn driver(&self) -> &DriverReport {
        &self.0.shared.report
    }

    /// Connections that are open.
    pub fn connection_count(&self) -> usize {
        self.0.shared.state.lock().admission.len()
    }

    /// Connects to `expected` at `address`; ready when the peer has admitted this node.
    ///
    /// # Errors
    /// [`Error::WrongNode`] where another node of the cluster answers, [`Error::Identity`] where somebody
    /// else does, [`Error::ClosedByPeer`] or [`Error::IdentityRefused`] where the peer does not admit this
    /// node, [`Error::TimedOut`] where nobody answers in [`Limits::handshake_timeout`].
    pub async fn connect(
        &self,
        address: SocketAddr,
        expected: NodeId,
    ) -> Result<Connection, Error> {
        let shared = &self.0.shared;
        let handshake = shared.begin_handshake(Some(expected))?;
        let establish = async {
            let connection = shared.driver.connect(address).await?;
            let connection = shared.identify(connection, Some(expected))?;
            connection.link().driver.await_admission().await?;
            Ok(connection)
        };
        let result = tokio::time::timeout(shared.limits.handshake_timeout, establish).await;
        drop(handshake);
        result.unwrap_or(Err(Error::TimedOut))
    }

    /// The next connection that a node opened to this one, identified and admitted; `None` once the
    /// endpoint is closed.
    pub async fn accept(&self) -> Option<Connection> {
        self.0.accepted.lock().await.recv().await
    }

    /// Closes all connections of `nodes` and admits no more of them, nor opens any, until
    /// [`Self::readmit`]. Nodes shut out before stay so.
    pub fn shut_out(&self, nodes: &[NodeId]) {
        let gone = self.0.shared.state.lock().admission.shut_out(nodes);
        for link in &gone {
            link.driver.close(CloseReason::ShutOut);
        }
        if !gone.is_empty() {
            self.0.shared.share_windows();
        }
    }

    /// Takes back [`Self::shut_out`].
    pub fn readmit(&self, nodes: &[NodeId]) {
        self.0.shared.state.lock().admission.readmit(nodes);
    }

    /// Closes all connections, takes no more in, and waits a moment for the peers to be told.
    pub async fn close(&self) {
        self.0.shared.driver.close(CloseReason::ShuttingDown);
        self.0.shared.driver.drained().await;
    }
}

impl Shared {
    /// Counts a handshake, or says why none may begin.
    fn begin_handshake(self: &Arc<Self>, expected: Option<NodeId>) -> Result<Handshake, Error> {
        let mut state = self.state.lock();
        if let Some(node) = expected.filter(|node| state.admission.is_shut_out(node)) {
            return Err(Error::ShutOut(node));
        }
        if !state.admission.has_room(state.handshakes) {
            return Err(Error::TooManyConnections(self.limits.connections_max));
        }
        state.handshakes += 1;
        drop(state);
        Ok(Handshake(self.clone()))
    }

    /// Turns an encrypted connection into one with an admitted node, or closes it.
    fn identify(
        self: &Arc<Self>,
        driver: driver::Connection,
        expected: Option<NodeId>,
    ) -> Result<Connection, Error> {
        let node = match node_of(&driver.certificates()) {
            Ok(node) => node,
            Err(error) => {
                driver.close(CloseReason::WrongNode);
                return Err(Error::Identity(error.to_string()));
            }
        };
        if let Some(expected) = expected.filter(|expected| *expected != node) {
            driver.close(CloseReason::WrongNode);
            return Err(Error::WrongNode {
                expected,
                got: node,
            });
        }
        let mut state = self.state.lock();
        let link = Link::new(driver, state.admission.windows());
        let admitted = state.admission.admit(node, link.clone());
        drop(state);
        let key = match admitted {
            Ok(key) => key,
            Err(reason) => {
                link.driver.close(reason);
                return Err(match reason {
                    CloseReason::ShutOut => Error::ShutOut(node),
                    _ => Error::TooManyConnections(self.limits.connections_max),
                });
            }
        };
        self.share_windows();
        let shared = self.clone();
        let watched = link.driver.clone();
        tokio::spawn(async move {
            let error = watched.closed().await;
            debug!(peer = %node.short(), %error, "connection over");
            shared.state.lock().admission.remove(key);
            shared.share_windows();
        });
        Ok(Connection::new(link, node))
    }

    /// Gives every connection its share of the budgets.
    fn share_windows(&self) {
        let state = self.state.lock();
        let windows = state.admission.windows();
        for link in state.admission.entries() {
            link.set_windows(windows);
        }
    }
}

/// Takes connections in until the endpoint is closed.
async fn take_in(shared: Arc<Shared>, accepted: mpsc::Sender<Connection>) {
    let mut handshakes = JoinSet::new();
    while let Some(incoming) = shared.driver.accept().await {
        while handshakes.try_join_next().is_some() {}
        let under_way = handshakes.len();
        if under_way >= shared.limits.handshakes_max {
            incoming.refuse();
            continue;
        }
        if under_way >= shared.limits.handshakes_max / 2 && !incoming.is_address_validated() {
            incoming.validate_address();
            continue;
        }
        let Ok(handshake) = shared.begin_handshake(None) else {
            incoming.refuse();
            continue;
        };
        let shared = shared.clone();
        let accepted = accepted.clone();
        handshakes.spawn(async move {
            let address = incoming.remote_addr();
            let establish =
                tokio::time::timeout(shared.limits.handshake_timeout, incoming.establish());
            let connection = establish
                .await
                .unwrap_or(Err(Error::TimedOut))
                .and_then(|connection| shared.identify(connection, None));
            drop(handshake);
            match connection {
                Ok(connection) => {
                    connection.link().driver.announce_admission();
                    // Nobody accepts any more: the connection is closed by being dropped.
                    let _ = accepted.send(connection).await;
                }
                Err(error) => debug!(%address, %error, "connection not admitted"),
            }
        });
    }
}
