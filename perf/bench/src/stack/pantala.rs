//! Pantala's own QUIC, on either driver, with the limits that a node has by default.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;
use pantala_quic::{
    Connection, DriverChoice, DriverKind, Endpoint, EndpointConfig, Limits, RecvStream, SendStream,
};
use pantala_wire::Priority;
use std::path::Path;

use super::{REQUEST_BYTES, Request, Stack, streams};
use crate::file::Source;
use crate::{FetchArguments, ServeArguments, identities};

/// The server's certificate among those of the cluster.
const SERVER: usize = 0;
/// The client's.
const CLIENT: usize = 1;

/// An endpoint on the driver that `stack` names, and on no other.
fn bind(stack: Stack, listen: SocketAddr, dir: &Path, number: usize) -> Result<Endpoint> {
    let driver = match stack {
        Stack::Ring => DriverChoice::Ring,
        _ => DriverChoice::Tokio,
    };
    let endpoint = Endpoint::bind(EndpointConfig {
        listen,
        identity: identities::read(dir, number)?,
        limits: Limits::default(),
        driver,
    })?;
    let report = endpoint.driver();
    let is_ring = matches!(report.kind, DriverKind::Ring { .. });
    ensure!(
        is_ring == (driver == DriverChoice::Ring),
        "asked for {driver:?} and got {:?}: {}",
        report.kind,
        report.why
    );
    Ok(endpoint)
}

pub(super) async fn serve(arguments: &ServeArguments, source: Source) -> Result<SocketAddr> {
    let endpoint = bind(
        arguments.stack,
        arguments.listen,
        &arguments.identities,
        SERVER,
    )?;
    let listening = endpoint.local_addr();
    tokio::spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            tokio::spawn(serve_connection(connection, source.clone()));
        }
    });
    Ok(listening)
}

async fn serve_connection(connection: Connection, source: Source) {
    while let Ok((send, recv)) = connection.accept().await {
        let source = source.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(send, recv, source).await {
                eprintln!("a request failed: {error:#}");
            }
        });
    }
}

async fn answer(mut send: SendStream, mut recv: RecvStream, source: Source) -> Result<()> {
    let asked = recv.read_slices(REQUEST_BYTES).await?.concat();
    let request = Request::decode(&asked)?;
    let piece =
        tokio::task::spawn_blocking(move || source.piece(request.offset, request.length as usize))
            .await??;
    send.write_bytes(piece).await?;
    send.finish()?;
    Ok(())
}

/// A client's connection.
#[derive(Clone)]
pub(super) struct Peer(Connection);

impl streams::Peer for Peer {
    type Endpoint = Arc<Endpoint>;
    type Answer = RecvStream;

    fn bind(arguments: &FetchArguments) -> Result<Arc<Endpoint>> {
        let any = match arguments.server {
            SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
            SocketAddr::V6(_) => SocketAddr::from(([0_u16; 8], 0)),
        };
        bind(arguments.stack, any, &arguments.identities, CLIENT).map(Arc::new)
    }

    async fn connect(endpoint: Arc<Endpoint>, arguments: &FetchArguments) -> Result<Self> {
        let server = identities::node_id(&arguments.identities, SERVER)?;
        Ok(Self(endpoint.connect(arguments.server, server).await?))
    }

    async fn ask(&self, request: Request) -> Result<RecvStream> {
        let (mut send, recv) = self.0.open(Priority::Bulk).await?;
        send.write_bytes(Bytes::copy_from_slice(&request.encode()))
            .await?;
        send.finish()?;
        Ok(recv)
    }

    async fn read(answer: &mut RecvStream, bytes: usize) -> Result<Vec<Bytes>> {
        Ok(answer.read_slices(bytes).await?)
    }

    fn mtu(&self) -> u16 {
        self.0.stats().udp_payload_bytes
    }

    fn close(self) {
        drop(self.0);
    }
}
