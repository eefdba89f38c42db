//! A TLS connection to control, which is recognised by the cluster's CA.

use std::error::Error;
use std::io;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::authority::CONTROL_NAME;
use crate::convert::{CONNECTION_WINDOW_SIZE, STREAM_WINDOW_SIZE};
use crate::identity::Identity;
use crate::x509;

/// How long a connection, and then its handshake, may take: control is near, or it is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is asked whether it is alive.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a silent connection counts as alive after a keepalive was sent.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Control cannot be reached as it should.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The address makes no sense.
    #[error("malformed address of control {0:?}: expected \"host:port\"")]
    Address(String),
    /// Nobody there, or no way to get there.
    #[error(
        "cannot reach control at {address}: {cause}; check that it runs there and that no firewall is between"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// Somebody is there, but not this cluster's control.
    #[error(
        "what answers at {address} is not control of this node's cluster ({cause}); check the address and the join token"
    )]
    Stranger {
        /// Where.
        address: String,
        /// What the handshake says.
        cause: String,
    },
}

impl ChannelError {
    /// Whether it may pass without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    pub(crate) fn lost(address: &str, cause: &(dyn Error + 'static)) -> Self {
        Self::Unreachable {
            address: address.to_owned(),
            cause: innermost(cause),
        }
    }
}

/// Connects to control at `address`, as `identity` where there is one.
pub(crate) async fn connect(
    address: &str,
    ca: &CertificateDer<'_>,
    identity: Option<&Identity>,
) -> Result<Channel, ChannelError> {
    let malformed = || ChannelError::Address(address.chars().take(100).collect());
    let well_formed = address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !well_formed {
        return Err(malformed());
    }
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(x509::pem("CERTIFICATE", ca)))
        .domain_name(CONTROL_NAME)
        .timeout(CONNECT_TIMEOUT);
    if let Some(identity) = identity {
        tls = tls.identity(tonic::transport::Identity::from_pem(
            identity.certificate_pem(),
            identity.key_pem(),
        ));
    }
    Endpoint::from_shared(format!("https://{address}"))
        .and_then(|endpoint| endpoint.tls_config(tls))
        .map_err(|_| malformed())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_SIZE)
        .initial_connection_window_size(CONNECTION_WINDOW_SIZE)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| {
            if is_stranger(&error) {
                ChannelError::Stranger {
                    address: address.to_owned(),
                    cause: innermost(&error),
                }
            } else {
                ChannelError::lost(address, &error)
            }
        })
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The last cause in the chain: what the layers above only wrap.
fn innermost(error: &(dyn Error + 'static)) -> String {
    chain(error)
        .last()
        .map_or_else(String::new, |last| last.to_string())
}

fn is_stranger(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|cause| {
        let tls = cause.downcast_ref::<rustls::Error>().or_else(|| {
            cause
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        });
        matches!(
            tls,
            Some(
                rustls::Error::InvalidCertificate(_)
                    | rustls::Error::InvalidMessage(_)
                    | rustls::Error::PeerIncompatible(_)
            )
        )
    })
}
