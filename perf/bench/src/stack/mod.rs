//! The stacks that are measured against each other: for each, a server and a client.
//!
//! All speak the same: a request of [`REQUEST_BYTES`] names a range, the answer is its bytes and nothing
//! else. QUIC stacks use a stream a request; TCP and UDP answer in the order of the requests.

mod datagrams;
mod http;
mod pantala;
mod quinn;
mod streams;
mod tls;

use std::io;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::file::Source;
use crate::{FetchArguments, ServeArguments, lead};

/// Offset (8 bytes) and length (4 bytes) of the range that is asked for, little-endian.
pub(crate) const REQUEST_BYTES: usize = 12;
/// Bytes that a client collects before it writes them to its file.
const WRITE_BYTES: usize = 256 << 10;
/// Kernel buffers asked for, for every UDP socket here.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Pieces fetched while connecting, so that windows are open and the path's MTU is known.
const WARM_UP_PIECES: u64 = 32;

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stack {
    /// Pantala's QUIC on its io_uring driver
    Ring,
    /// Pantala's QUIC on its tokio driver
    Tokio,
    /// quinn on tokio as it comes, with larger windows
    Quinn,
    /// rustls over TCP, blocking threads
    TlsTcp,
    /// HTTP, from nginx (the client only)
    Http,
    /// HTTPS, from nginx (the client only)
    Https,
    /// UDP without encryption, acknowledgement or order
    Udp,
}

/// A range that is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    pub(crate) fn encode(self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let (offset, length) = bytes
            .split_first_chunk()
            .and_then(|(offset, rest)| Some((offset, rest.first_chunk()?)))
            .context("a short request")?;
        Ok(Self {
            offset: u64::from_le_bytes(*offset),
            length: u32::from_le_bytes(*length),
        })
    }

    /// The piece `index` of a file of `bytes`, in pieces of `piece`.
    pub(crate) fn piece(index: u64, piece: u32, bytes: u64) -> Option<Self> {
        let offset = index * u64::from(piece);
        let length = bytes.checked_sub(offset).filter(|rest| *rest > 0)?;
        Some(Self {
            offset,
            length: length.min(piece.into()) as u32,
        })
    }
}

/// The runtime that `pantala` and users of quinn have.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}

/// Serves until the harness hangs up.
pub(crate) fn serve(arguments: &ServeArguments) -> Result<()> {
    let source = match arguments.stack {
        Stack::Ring | Stack::Tokio => Source::stored(&arguments.file)?,
        _ => Source::open(&arguments.file)?,
    };
    match arguments.stack {
        Stack::Ring | Stack::Tokio => {
            let runtime = runtime()?;
            let listening = runtime.block_on(pantala::serve(arguments, source.clone()))?;
            lead::server(listening, &source)
        }
        Stack::Quinn => {
            let runtime = runtime()?;
            let listening = runtime.block_on(async { quinn::serve(arguments, source.clone()) })?;
            lead::server(listening, &source)
        }
        Stack::TlsTcp => lead::server(tls::serve(arguments, source.clone())?, &source),
        Stack::Udp => lead::server(datagrams::serve(arguments, source.clone())?, &source),
        Stack::Http | Stack::Https => anyhow::bail!("nginx serves this"),
    }
}

/// Fetches whenever the harness says so.
pub(crate) fn fetch(arguments: &FetchArguments) -> Result<()> {
    match arguments.stack {
        Stack::Ring | Stack::Tokio => {
            lead::client(streams::Client::<pantala::Peer>::new(arguments)?)
        }
        Stack::Quinn => lead::client(streams::Client::<quinn::Peer>::new(arguments)?),
        Stack::TlsTcp => lead::client(tls::Client::new(arguments)?),
        Stack::Http | Stack::Https => lead::client(http::Client::new(arguments)?),
        Stack::Udp => lead::client(datagrams::Client::new(arguments)?),
    }
}
