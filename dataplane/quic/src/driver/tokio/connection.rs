//! One QUIC connection.

use std::net::SocketAddr;

use quinn::VarInt;
use rustls_pki_types::CertificateDer;

use super::errors::{connection_error, read_error};
use super::stream::{RecvStream, SendStream};
use crate::connection::PathStats;
use crate::error::{CloseReason, Error};

#[derive(Debug, Clone)]
pub(crate) struct Connection(pub(super) quinn::Connection);

impl Connection {
    /// The peer's certificates, verified against the authority; its own comes first.
    pub(crate) fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.0
            .peer_identity()
            .and_then(|identity| identity.downcast().ok())
            .map_or_else(Vec::new, |chain| *chain)
    }

    pub(crate) fn remote_addr(&self) -> SocketAddr {
        let mut address = self.0.remote_address();
        // A dual-stack socket shows IPv4 peers as mapped addresses.
        address.set_ip(address.ip().to_canonical());
        address
    }

    /// Tells the peer that it is admitted: the one unidirectional stream of the protocol, empty.
    pub(crate) fn announce_admission(&self) {
        let connection = self.0.clone();
        tokio::spawn(async move {
            if let Ok(mut stream) = connection.open_uni().await {
                let _ = stream.finish();
            }
        });
    }

    /// Waits for [`Self::announce_admission`] of the peer.
    pub(crate) async fn await_admission(&self) -> Result<(), Error> {
        let mut stream = self.0.accept_uni().await.map_err(connection_error)?;
        // Later versions may say something here; this one only waits for the end.
        while stream
            .read_chunk(usize::MAX, true)
            .await
            .map_err(read_error)?
            .is_some()
        {}
        Ok(())
    }

    pub(crate) async fn open(&self) -> Result<(SendStream, RecvStream), Error> {
        let (send, recv) = self.0.open_bi().await.map_err(connection_error)?;
        Ok((SendStream(send), RecvStream::new(recv)))
    }

    pub(crate) async fn accept(&self) -> Result<(SendStream, RecvStream), Error> {
        let (send, recv) = self.0.accept_bi().await.map_err(connection_error)?;
        Ok((SendStream(send), RecvStream::new(recv)))
    }

    pub(crate) fn stats(&self) -> PathStats {
        let stats = self.0.stats();
        PathStats {
            rtt: stats.path.rtt,
            cwnd: stats.path.cwnd,
            udp_payload_bytes: stats.path.current_mtu,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
        }
    }

    /// Bytes that may be written and not yet acknowledged.
    pub(crate) fn set_send_window(&self, bytes: u64) {
        self.0.set_send_window(bytes);
    }

    /// Bytes that the peer may send and that are not yet read.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        self.0
            .set_receive_window(VarInt::from_u64(bytes).unwrap_or(VarInt::MAX));
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        self.0.close(VarInt::from_u32(reason as u32), b"");
    }

    pub(crate) async fn closed(&self) -> Error {
        connection_error(self.0.closed().await)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.close_reason().is_some()
    }
}
