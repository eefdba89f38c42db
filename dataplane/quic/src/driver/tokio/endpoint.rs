//! The socket's owner, and how quinn is set up.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{TokioRuntime, VarInt};

use super::connection::Connection;
use super::socket;
use crate::config::{Limits, SeeSockets};
use crate::driver::errors::{connect_error, connection_error};
use crate::driver::setup::{DRAIN_MAX, Setup};
use crate::error::{CloseReason, Error};
use crate::identity::SERVER_NAME;

#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    quinn: quinn::Endpoint,
    setup: Arc<Setup>,
    local_addr: SocketAddr,
}

impl Endpoint {
    pub(in crate::driver) fn bind(
        listen: SocketAddr,
        limits: &Limits,
        setup: Setup,
        see: Option<SeeSockets<'_>>,
    ) -> io::Result<Self> {
        let socket = socket::bind(listen, limits, see)?;
        let local_addr = quinn::AsyncUdpSocket::local_addr(&*socket)?;
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            setup.endpoint(0, 1)?,
            Some(setup.server()),
            socket,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self {
            quinn,
            setup: Arc::new(setup),
            local_addr,
        })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Result<Connection, Error> {
        let connecting = self
            .quinn
            .connect_with(self.setup.client(address), address, SERVER_NAME)
            .map_err(connect_error)?;
        connecting.await.map(Connection).map_err(connection_error)
    }

    pub(crate) async fn accept(&self) -> Option<Incoming> {
        let quinn = self.quinn.accept().await?;
        Some(Incoming {
            quinn,
            setup: self.setup.clone(),
        })
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        self.quinn.close(VarInt::from_u32(reason as u32), b"");
    }

    pub(crate) async fn drained(&self) {
        // What is not drained by then ends with its peers' idle timeout.
        let _ = tokio::time::timeout(DRAIN_MAX, self.quinn.wait_idle()).await;
    }
}

/// A handshake that a peer has begun.
pub(crate) struct Incoming {
    quinn: quinn::Incoming,
    setup: Arc<Setup>,
}

impl Incoming {
    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.quinn.remote_address()
    }

    pub(crate) fn is_address_validated(&self) -> bool {
        self.quinn.remote_address_validated()
    }

    pub(crate) fn validate_address(self) {
        // Fails only for an address that is validated already.
        let _ = self.quinn.retry();
    }

    pub(crate) fn refuse(self) {
        self.quinn.refuse();
    }

    pub(crate) async fn establish(self) -> Result<Connection, Error> {
        let config = self.setup.server_for(self.quinn.remote_address());
        let connecting = self
            .quinn
            .accept_with(Arc::new(config))
            .map_err(connection_error)?;
        connecting.await.map(Connection).map_err(connection_error)
    }
}
