//! What the clients of all QUIC stacks have in common: requests side by side, one stream each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::{Request, WARM_UP_PIECES, WRITE_BYTES};
use crate::file::Sink;
use crate::latency::{Latencies, Noise};
use crate::lead::Small;
use crate::{FetchArguments, lead};

/// Longest that a stream may take to open, or its next bytes to come.
const STEP_MAX: Duration = Duration::from_secs(20);

/// One end of a QUIC connection.
pub(crate) trait Peer: Clone + Send + Sync + 'static {
    /// What connections are made from: there is one as long as the process lives.
    type Endpoint: Clone;
    /// What an answer is read from.
    type Answer: Send;

    /// Opens an endpoint, within a runtime.
    fn bind(arguments: &FetchArguments) -> Result<Self::Endpoint>;
    /// Connects to the server that `arguments` name.
    fn connect(
        endpoint: Self::Endpoint,
        arguments: &FetchArguments,
    ) -> impl Future<Output = Result<Self>> + Send;
    /// Sends `request` on a stream of its own.
    fn ask(&self, request: Request) -> impl Future<Output = Result<Self::Answer>> + Send;
    /// The next `bytes` bytes of the answer, less at its end, in the parts in which they were decrypted.
    fn read(
        answer: &mut Self::Answer,
        bytes: usize,
    ) -> impl Future<Output = Result<Vec<Bytes>>> + Send;
    /// The path's largest UDP payload.
    fn mtu(&self) -> u16;
    /// Ends the connection.
    fn close(self);
}

/// A client that fetches a file by pieces.
pub(crate) struct Client<P: Peer> {
    runtime: Runtime,
    endpoint: P::Endpoint,
    arguments: FetchArguments,
    sink: Sink,
    peer: Option<P>,
}

impl<P: Peer> Client<P> {
    pub(crate) fn new(arguments: &FetchArguments) -> Result<Self> {
        let runtime = super::runtime()?;
        let endpoint = {
            let _inside = runtime.enter();
            P::bind(arguments)?
        };
        Ok(Self {
            runtime,
            endpoint,
            sink: Sink::open(&arguments.file, arguments.bytes)?,
            arguments: arguments.clone(),
            peer: None,
        })
    }

    fn fetch(&self, bytes: u64) -> Result<u64> {
        let peer = self.peer.as_ref().context("not connected")?;
        self.runtime.block_on(async {
            let next = Arc::new(AtomicU64::new(0));
            let mut workers = JoinSet::new();
            for _ in 0..self.arguments.streams {
                let (peer, sink, next) = (peer.clone(), self.sink.clone(), next.clone());
                let piece = self.arguments.piece;
                workers.spawn(async move {
                    let mut fetched = 0;
                    while let Some(request) =
                        Request::piece(next.fetch_add(1, Ordering::Relaxed), piece, bytes)
                    {
                        fetched += fetch_piece(&peer, &sink, request).await?;
                    }
                    anyhow::Ok(fetched)
                });
            }
            let mut fetched = 0;
            while let Some(worker) = workers.join_next().await {
                fetched += worker??;
            }
            Ok(fetched)
        })
    }
}

/// What `step` yields, unless the stack has lost it.
async fn within<T>(what: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(STEP_MAX, step)
        .await
        .with_context(|| format!("{what} has not ended within {STEP_MAX:?}"))?
}

/// Writes where blocking does no harm, as the node does.
async fn fetch_piece<P: Peer>(peer: &P, sink: &Sink, request: Request) -> Result<u64> {
    let mut answer = within("asking", peer.ask(request)).await?;
    let mut fetched = 0;
    while fetched < u64::from(request.length) {
        let slices = within("reading", P::read(&mut answer, WRITE_BYTES)).await?;
        let length: usize = slices.iter().map(Bytes::len).sum();
        ensure!(length > 0, "the answer ended after {fetched} bytes");
        let (sink, offset) = (sink.clone(), request.offset + fetched);
        tokio::task::spawn_blocking(move || sink.write_slices(offset, &slices)).await??;
        fetched += length as u64;
    }
    Ok(fetched)
}

impl<P: Peer> lead::Client for Client<P> {
    fn connect(&mut self) -> Result<()> {
        let peer = self
            .runtime
            .block_on(P::connect(self.endpoint.clone(), &self.arguments))?;
        self.peer = Some(peer);
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

    fn small(&mut self, small: Small) -> Result<Latencies> {
        let peer = self.peer.as_ref().context("not connected")?;
        let places = self.arguments.bytes / u64::from(small.length);
        self.runtime.block_on(async {
            let asked = Arc::new(AtomicU64::new(0));
            let start = Instant::now();
            let mut workers = JoinSet::new();
            for worker in 0..small.outstanding {
                let (peer, asked) = (peer.clone(), asked.clone());
                let mut noise = Noise::new(worker as u64 + 1);
                workers.spawn(async move {
                    let mut took = Vec::new();
                    while asked.fetch_add(1, Ordering::Relaxed) < small.requests {
                        let request = Request {
                            offset: noise.below(places) * u64::from(small.length),
                            length: small.length,
                        };
                        let start = Instant::now();
                        let mut answer = within("asking", peer.ask(request)).await?;
                        let read = P::read(&mut answer, small.length as usize);
                        let slices = within("reading", read).await?;
                        let length: usize = slices.iter().map(Bytes::len).sum();
                        ensure!(length == small.length as usize, "{length} bytes came");
                        took.push(start.elapsed());
                    }
                    anyhow::Ok(took)
                });
            }
            let mut took = Vec::new();
            while let Some(worker) = workers.join_next().await {
                took.extend(worker??);
            }
            Ok(Latencies::of(took, start.elapsed()))
        })
    }

    fn mtu(&self) -> Option<u16> {
        self.peer.as_ref().map(Peer::mtu)
    }

    fn close(&mut self) -> Result<()> {
        if let Some(peer) = self.peer.take() {
            peer.close();
        }
        Ok(())
    }
}
