//! quinn on tokio as it comes: its own socket, its own batches, its own path MTU discovery (up to 1452).
//!
//! Only the windows and kernel buffers are larger than its defaults, and the cipher is the one of the
//! other stacks: all that costs it nothing and could otherwise be held against the comparison.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use pantala_quic::SERVER_NAME;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use rustix::net::sockopt;

use super::{REQUEST_BYTES, Request, SOCKET_BUFFER_BYTES, streams, tls};
use crate::file::Source;
use crate::{FetchArguments, ServeArguments};

const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
const SEND_WINDOW_BYTES: u64 = 16 << 20;

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES);
    Arc::new(transport)
}

fn bind(listen: SocketAddr, server: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind(listen).with_context(|| format!("binding {listen}"))?;
    // Without privilege the kernel gives what it gives; quinn works with that too.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
    Ok(Endpoint::new(
        EndpointConfig::default(),
        server,
        socket,
        Arc::new(TokioRuntime),
    )?)
}

pub(super) fn serve(arguments: &ServeArguments, source: Source) -> Result<SocketAddr> {
    let tls = QuicServerConfig::try_from(tls::server_config(&arguments.identities)?)?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(transport());
    let endpoint = bind(arguments.listen, Some(config))?;
    let listening = endpoint.local_addr()?;
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let source = source.clone();
            tokio::spawn(async move {
                match incoming.await {
                    Ok(connection) => serve_connection(connection, source).await,
                    Err(error) => eprintln!("a handshake failed: {error}"),
                }
            });
        }
    });
    Ok(listening)
}

async fn serve_connection(connection: Connection, source: Source) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let source = source.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(send, recv, source).await {
                eprintln!("a request failed: {error:#}");
            }
        });
    }
}

async fn answer(mut send: quinn::SendStream, mut recv: RecvStream, source: Source) -> Result<()> {
    let mut asked = [0; REQUEST_BYTES];
    recv.read_exact(&mut asked).await?;
    let request = Request::decode(&asked)?;
    let piece =
        tokio::task::spawn_blocking(move || source.piece(request.offset, request.length as usize))
            .await??;
    send.write_chunk(piece).await?;
    send.finish()?;
    Ok(())
}

fn client_config(dir: &Path) -> Result<ClientConfig> {
    let tls = QuicClientConfig::try_from(tls::client_config(dir)?)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(transport());
    Ok(config)
}

/// A client's connection.
#[derive(Clone)]
pub(super) struct Peer(Connection);

impl streams::Peer for Peer {
    type Endpoint = Endpoint;
    type Answer = RecvStream;

    fn bind(arguments: &FetchArguments) -> Result<Endpoint> {
        ensure!(arguments.server.is_ipv4(), "the rig's networks are IPv4");
        bind(SocketAddr::from(([0, 0, 0, 0], 0)), None)
    }

    async fn connect(endpoint: Endpoint, arguments: &FetchArguments) -> Result<Self> {
        let config = client_config(&arguments.identities)?;
        let connection = endpoint
            .connect_with(config, arguments.server, SERVER_NAME)?
            .await?;
        Ok(Self(connection))
    }

    async fn ask(&self, request: Request) -> Result<RecvStream> {
        let (mut send, recv) = self.0.open_bi().await?;
        send.write_all(&request.encode()).await?;
        send.finish()?;
        Ok(recv)
    }

    async fn read(answer: &mut RecvStream, bytes: usize) -> Result<Vec<Bytes>> {
        let (mut slices, mut missing) = (Vec::new(), bytes);
        while missing > 0 {
            let Some(chunk) = answer.read_chunk(missing, true).await? else {
                break;
            };
            missing -= chunk.bytes.len();
            slices.push(chunk.bytes);
        }
        Ok(slices)
    }

    fn mtu(&self) -> u16 {
        self.0.stats().path.current_mtu
    }

    fn close(self) {
        self.0.close(VarInt::from_u32(0), b"");
    }
}
