//! The client of nginx: one GET of the whole file over a connection that is open already.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};

use super::{Stack, WARM_UP_PIECES, WRITE_BYTES, tls};
use crate::file::Sink;
use crate::{FetchArguments, lead};

/// Longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Reads and writes; TLS or not.
enum Stream {
    Plain(BufReader<TcpStream>),
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, TcpStream>>),
}

/// Fetches with GET and writes to the file in one thread.
pub(super) struct Client {
    arguments: FetchArguments,
    sink: Sink,
    stream: Option<Stream>,
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
        let head = format!(
            "GET /{} HTTP/1.1\r\nHost: nginx\r\nRange: bytes=0-{}\r\n\r\n",
            self.arguments.name,
            bytes - 1
        );
        match self.stream.as_mut().context("not connected")? {
            Stream::Plain(stream) => {
                stream.get_mut().write_all(head.as_bytes())?;
                receive(stream, &self.sink, bytes)
            }
            Stream::Tls(stream) => {
                stream.write_all(head.as_bytes())?;
                receive(&mut **stream, &self.sink, bytes)
            }
        }
    }
}

fn receive(stream: &mut impl BufRead, sink: &Sink, bytes: u64) -> Result<u64> {
    let mut head = String::new();
    let mut limited = stream.take(HEAD_BYTES_MAX as u64);
    while !head.ends_with("\r\n\r\n") {
        ensure!(
            limited.read_line(&mut head)? > 0,
            "the answer has no end of its head"
        );
    }
    if !head.starts_with("HTTP/1.1 206 ") {
        bail!("nginx says: {}", head.lines().next().unwrap_or_default());
    }
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .context("nginx does not say how long it is")?;
    ensure!(
        length.parse::<u64>()? == bytes,
        "nginx sends {length} bytes"
    );
    let mut fetched = 0;
    while fetched < bytes {
        let part = match stream.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            part => part?,
        };
        ensure!(!part.is_empty(), "nginx hung up after {fetched} bytes");
        let length = (part.len() as u64).min(bytes - fetched);
        sink.write(fetched, &part[..length as usize])?;
        stream.consume(length as usize);
        fetched += length;
    }
    Ok(fetched)
}

impl lead::Client for Client {
    fn connect(&mut self) -> Result<()> {
        let server = self.arguments.server;
        self.stream = Some(if self.arguments.stack == Stack::Https {
            Stream::Tls(Box::new(tls::connect(server, &self.arguments.identities)?))
        } else {
            let socket =
                TcpStream::connect(server).with_context(|| format!("connecting to {server}"))?;
            Stream::Plain(BufReader::with_capacity(WRITE_BYTES, socket))
        });
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
        self.stream = None;
        Ok(())
    }
}
