//! One QUIC connection.

use std::net::SocketAddr;

use quinn::VarInt;
use rustls_pki_types::CertificateDer;

use super::stream::{RecvStream, SendStream, read_error};
use crate::driver::errors::connection_error;
use crate::error::{CloseReason, Error};

#[derive(Debug, Clone)]
pub(crate) struct Connection(pub(super) quinn::Connection);

impl Connection {
    pub(crate) fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.0
            .peer_identity()
            .and_then(|identity| identity.downcast().ok())
            .map_or_else(Vec::new, |chain| *chain)
    }

    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.0.remote_address()
    }

    pub(crate) fn announce_admission(&self) {
        let connection = self.0.clone();
        tokio::spawn(async move {
            if let Ok(mut stream) = connection.open_uni().await {
                let _ = stream.finish();
            }
        });
    }

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

    pub(crate) fn stats(&self) -> quinn::ConnectionStats {
        self.0.stats()
    }

    pub(crate) fn set_send_window(&self, bytes: u64) {
        self.0.set_send_window(bytes);
    }

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
