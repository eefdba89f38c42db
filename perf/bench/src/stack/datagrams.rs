//! Bare UDP with segmentation and coalescing: what the kernel asks for moving datagrams, and no more.
//!
//! There is no encryption, no acknowledgement and no order. A window of two pieces keeps the receiver's
//! kernel buffer from overflowing; where a datagram is lost all the same, the pieces under way are asked
//! for again after [`LOST`], so that a loss costs time and is never counted as a success.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::{REQUEST_BYTES, Request, SOCKET_BUFFER_BYTES, WARM_UP_PIECES};
use crate::file::{Sink, Source};
use crate::{FetchArguments, ServeArguments, lead};

/// Pieces asked for and not here.
const WINDOW_PIECES: usize = 2;
/// Silence after which what is under way counts as lost.
const LOST: Duration = Duration::from_millis(100);
/// Silences in a row after which the server counts as gone.
const LOST_MAX: u32 = 20;
/// Most bytes of one call, in either direction.
const CALL_BYTES_MAX: usize = 65_000;
const RECEIVE_BYTES: usize = 65_536;

struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    fn bind(address: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind(address)?;
        let state = UdpSocketState::new((&socket).into())?;
        // Without privilege the kernel gives what it gives.
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
        Ok(Self { socket, state })
    }

    /// Waits until the socket can be read or written; whether it can.
    fn wait(&self, what: PollFlags, limit: Option<Duration>) -> Result<bool> {
        let limit = limit.map(Timespec::try_from).transpose()?;
        let mut polled = [PollFd::new(&self.socket, what)];
        loop {
            match poll(&mut polled, limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }

    fn send(&self, destination: SocketAddr, contents: &[u8], payload: usize) -> Result<()> {
        let transmit = Transmit {
            destination,
            ecn: None,
            contents,
            segment_size: (contents.len() > payload).then_some(payload),
            src_ip: None,
        };
        loop {
            match self.state.try_send((&self.socket).into(), &transmit) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, None)?;
                }
                sent => return Ok(sent?),
            }
        }
    }
}

/// A request and the payload that the answer's datagrams are to have.
const ASK_BYTES: usize = REQUEST_BYTES + 2;

pub(super) fn serve(arguments: &ServeArguments, source: Source) -> Result<SocketAddr> {
    let socket = Socket::bind(arguments.listen)?;
    let listening = socket.socket.local_addr()?;
    std::thread::spawn(move || {
        if let Err(error) = answer(&socket, &source) {
            eprintln!("serving failed: {error:#}");
        }
    });
    Ok(listening)
}

fn answer(socket: &Socket, source: &Source) -> Result<()> {
    loop {
        let mut asked = [0; ASK_BYTES];
        let (length, client) = match socket.socket.recv_from(&mut asked) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                socket.wait(PollFlags::IN, None)?;
                continue;
            }
            received => received?,
        };
        ensure!(length == ASK_BYTES, "a request of {length} bytes");
        let request = Request::decode(&asked)?;
        let payload = usize::from(u16::from_le_bytes([
            asked[REQUEST_BYTES],
            asked[REQUEST_BYTES + 1],
        ]));
        let segments = (CALL_BYTES_MAX / payload).min(socket.state.max_gso_segments());
        let piece = source.piece(request.offset, request.length as usize)?;
        for call in piece.chunks(segments * payload) {
            socket.send(client, call, payload)?;
        }
    }
}

/// Asks for pieces and writes them to the file in one thread.
pub(super) struct Client {
    arguments: FetchArguments,
    sink: Sink,
    socket: Option<Socket>,
    buffers: Vec<Vec<u8>>,
    losses: u64,
}

impl Client {
    pub(super) fn new(arguments: &FetchArguments) -> Result<Self> {
        Ok(Self {
            sink: Sink::open(&arguments.file, arguments.bytes)?,
            arguments: arguments.clone(),
            socket: None,
            buffers: vec![vec![0; RECEIVE_BYTES]; BATCH_SIZE],
            losses: 0,
        })
    }

    fn ask(&self, socket: &Socket, index: u64, bytes: u64) -> Result<()> {
        let Some(request) = Request::piece(index, self.arguments.piece, bytes) else {
            return Ok(());
        };
        let mut ask = request.encode().to_vec();
        ask.extend_from_slice(&self.arguments.payload.to_le_bytes());
        socket.send(self.arguments.server, &ask, ask.len())
    }

    fn fetch(&mut self, bytes: u64) -> Result<u64> {
        let socket = self.socket.take().context("not connected")?;
        let result = self.fetch_on(&socket, bytes);
        self.socket = Some(socket);
        result
    }

    /// Bytes come in the order in which they were asked for, unless some are lost.
    fn fetch_on(&mut self, socket: &Socket, bytes: u64) -> Result<u64> {
        let piece = u64::from(self.arguments.piece);
        let mut fetched = 0;
        let mut silences = 0;
        let mut asked = 0;
        let mut meta = [RecvMeta::default(); BATCH_SIZE];
        while fetched < bytes {
            while asked < fetched / piece + WINDOW_PIECES as u64 {
                self.ask(socket, asked, bytes)?;
                asked += 1;
            }
            let mut parts: Vec<IoSliceMut<'_>> = self
                .buffers
                .iter_mut()
                .map(|buffer| IoSliceMut::new(buffer))
                .collect();
            let received = match socket
                .state
                .recv((&socket.socket).into(), &mut parts, &mut meta)
            {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if socket.wait(PollFlags::IN, Some(LOST))? {
                        continue;
                    }
                    silences += 1;
                    self.losses += 1;
                    if silences > LOST_MAX {
                        bail!("the server is silent after {fetched} bytes");
                    }
                    // From the start of the piece in which something is missing.
                    fetched -= fetched % piece;
                    asked = fetched / piece;
                    continue;
                }
                received => received?,
            };
            silences = 0;
            let slices: Vec<&[u8]> = meta[..received]
                .iter()
                .zip(&self.buffers)
                .map(|(meta, buffer)| &buffer[..meta.len])
                .collect();
            let length: usize = slices.iter().map(|slice| slice.len()).sum();
            ensure!(
                fetched + length as u64 <= bytes,
                "more came than was asked for"
            );
            self.sink.write_slices(fetched, &slices)?;
            fetched += length as u64;
        }
        Ok(fetched)
    }
}

impl lead::Client for Client {
    fn connect(&mut self) -> Result<()> {
        ensure!(
            self.arguments.server.is_ipv4(),
            "the rig's networks are IPv4"
        );
        self.socket = Some(Socket::bind(SocketAddr::from(([0, 0, 0, 0], 0)))?);
        let warm_up = WARM_UP_PIECES * u64::from(self.arguments.piece);
        self.fetch(warm_up.min(self.arguments.bytes))?;
        Ok(())
    }

    fn sink(&mut self) -> &mut Sink {
        &mut self.sink
    }

    fn run(&mut self) -> Result<u64> {
        self.losses = 0;
        let fetched = self.fetch(self.arguments.bytes)?;
        if self.losses > 0 {
            eprintln!("{} silences after lost datagrams", self.losses);
        }
        Ok(fetched)
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.arguments.payload)
    }

    fn close(&mut self) -> Result<()> {
        self.socket = None;
        Ok(())
    }
}
