//! rustls over one TCP connection, in blocking threads, which cost less than tokio-rustls does.

use std::io::{BufRead, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use pantala_quic::SERVER_NAME;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::version::TLS13;
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    StreamOwned,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};

use super::{REQUEST_BYTES, Request, WARM_UP_PIECES};
use crate::file::{Sink, Source};
use crate::{FetchArguments, ServeArguments, identities, lead};

/// Plaintext encrypted before it goes to the socket: as many records as one call takes, still in the cache.
const SEND_BYTES: usize = 256 << 10;

/// AES-128-GCM and nothing else, so that all stacks encrypt alike.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .retain(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// A server that proves itself with the first certificate of the cluster.
pub(super) fn server_config(dir: &Path) -> Result<Arc<ServerConfig>> {
    let identity = identities::read(dir, 0)?;
    let chain = identity.certificate_chain_der;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(
            chain.into_iter().map(CertificateDer::from).collect(),
            PrivatePkcs8KeyDer::from(identity.key_pkcs8_der).into(),
        )?;
    Ok(Arc::new(config))
}

/// A client that trusts the cluster's authority.
pub(super) fn client_config(dir: &Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(identities::read(dir, 0)?.ca_certificate_der.into())?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A TLS connection to `server`, handshake not yet done.
pub(super) fn connect(
    server: SocketAddr,
    dir: &Path,
) -> Result<StreamOwned<ClientConnection, TcpStream>> {
    let socket = TcpStream::connect(server).with_context(|| format!("connecting to {server}"))?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(SERVER_NAME)?;
    let connection = ClientConnection::new(client_config(dir)?, name)?;
    Ok(StreamOwned::new(connection, socket))
}

pub(super) fn serve(arguments: &ServeArguments, source: Source) -> Result<SocketAddr> {
    let listener = TcpListener::bind(arguments.listen)?;
    let listening = listener.local_addr()?;
    let config = server_config(&arguments.identities)?;
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let (config, source) = (config.clone(), source.clone());
            std::thread::spawn(move || {
                let served = socket
                    .map_err(anyhow::Error::from)
                    .and_then(|socket| serve_connection(socket, config, &source));
                if let Err(error) = served {
                    eprintln!("a connection failed: {error:#}");
                }
            });
        }
    });
    Ok(listening)
}

fn serve_connection(socket: TcpStream, config: Arc<ServerConfig>, source: &Source) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut connection = ServerConnection::new(config)?;
    connection.set_buffer_limit(Some(SEND_BYTES));
    let mut stream = StreamOwned::new(connection, socket);
    let mut asked = [0; REQUEST_BYTES];
    loop {
        match stream.read_exact(&mut asked) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let request = Request::decode(&asked)?;
        let piece = source.piece(request.offset, request.length as usize)?;
        stream.write_all(&piece)?;
    }
}

/// Asks for pieces and writes them to the file in one thread.
pub(super) struct Client {
    arguments: FetchArguments,
    sink: Sink,
    stream: Option<StreamOwned<ClientConnection, TcpStream>>,
}

impl Client {
    pub(super) fn new(arguments: &FetchArguments) -> Result<Self> {
        Ok(Self {
            sink: Sink::open(&arguments.file, arguments.bytes)?,
            arguments: arguments.clone(),
            stream: None,
        })
    }

    fn fetch(&mut self, bytes: u64) -> Result<u64> {
        let stream = self.stream.as_mut().context("not connected")?;
        let mut asked = (0..).map_while(|index| Request::piece(index, self.arguments.piece, bytes));
        let expected = asked.clone();
        for request in asked.by_ref().take(self.arguments.streams) {
            stream.write_all(&request.encode())?;
        }
        let mut fetched = 0;
        for request in expected {
            let mut missing = request.length as usize;
            while missing > 0 {
                let part = stream.fill_buf()?;
                ensure!(!part.is_empty(), "the server hung up");
                let length = part.len().min(missing);
                self.sink.write(fetched, &part[..length])?;
                stream.consume(length);
                missing -= length;
                fetched += length as u64;
            }
            if let Some(next) = asked.next() {
                stream.write_all(&next.encode())?;
            }
        }
        Ok(fetched)
    }
}

impl lead::Client for Client {
    fn connect(&mut self) -> Result<()> {
        let stream = connect(self.arguments.server, &self.arguments.identities)?;
        self.stream = Some(stream);
        let warm_up = WARM_UP_PIECES * u64::from(self.arguments.piece);
        self.fetch(warm_up.min(self.arguments.bytes))?;
        Ok(())
    }

    fn sink(&mut self) -> &mut Sink {
        &mut self.sink
    }

    fn run(&mut self) -> Result<u64> {
        self.fetch(self.arguments.bytes)
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn close(&mut self) -> Result<()> {
        if let Some(mut stream) = self.stream.take() {
            stream.conn.send_close_notify();
            stream.flush()?;
        }
        Ok(())
    }
}
