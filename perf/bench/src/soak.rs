//! Sixty-four peers that want everything at once, in one process: the load of `cargo xtask perf soak`.
//!
//! They are members of the node's own cluster, with certificates of its authority, and speak the peer
//! protocol; the groups of some pieces are hashed, so that wrong bytes would be seen.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use pantala_quic::{Connection, DriverChoice, Endpoint, EndpointConfig, Limits};
use pantala_wire::message::{self, refusal, request, response};
use pantala_wire::tree::{check_group_digests, group_digests};
use pantala_wire::{BlobDigest, Claim, GROUP_SIZE, NodeId, PieceIndex, PieceLayout, Priority};
use parking_lot::Mutex;
use serde_json::json;
use tokio::task::JoinSet;

use crate::identities;
use crate::latency::Noise;

/// Bytes between two looks at the clock.
const READ_BYTES: usize = GROUP_SIZE as usize;
/// One piece in so many is hashed: the load shares its processors with what it loads.
const HASHED_ONE_IN: u64 = 16;
/// Pause after the node has said that it is busy, which is no error.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Errors that are told in words.
const ERRORS_SHOWN_MAX: usize = 10;

/// What to load, and how.
#[derive(Debug, Clone, Args)]
pub(crate) struct SoakArguments {
    #[arg(long)]
    server: SocketAddr,
    /// The node behind that address
    #[arg(long)]
    node: NodeId,
    /// Control's data directory, with the cluster's authority
    #[arg(long)]
    authority: PathBuf,
    /// A blob that the node holds
    #[arg(long)]
    blob: BlobDigest,
    /// Its size
    #[arg(long)]
    bytes: u64,
    #[arg(long, default_value_t = 64)]
    peers: usize,
    /// Requests outstanding for each peer
    #[arg(long, default_value_t = 2)]
    outstanding: usize,
    #[arg(long)]
    seconds: u64,
}

/// What one peer, or one of its requests after the other, has seen.
#[derive(Debug, Default)]
struct Seen {
    bytes: u64,
    pieces: u64,
    hashed: u64,
    busy: u64,
    /// The longest that a request waited between two groups, for the first included.
    wait: Duration,
    errors: Vec<String>,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.pieces += other.pieces;
        self.hashed += other.hashed;
        self.busy += other.busy;
        self.wait = self.wait.max(other.wait);
        self.errors.extend(other.errors);
    }
}

/// When bytes came last for a peer, on any of its requests, and the longest that none did.
#[derive(Debug)]
struct Progress {
    last: Instant,
    stall: Duration,
}

impl Progress {
    fn bytes_came(&mut self) {
        self.stall = self.stall.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

/// Loads the node for the time that was asked for, and prints what its peers saw.
pub(crate) fn run(arguments: &SoakArguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(load(arguments))
}

async fn load(arguments: &SoakArguments) -> Result<()> {
    let dir = std::env::current_dir()?.join("soak-identities");
    identities::issue(&arguments.authority, &dir, arguments.peers)?;
    let layout = PieceLayout::new(arguments.bytes)?;
    let mut connections = Vec::new();
    for number in 0..arguments.peers {
        let (endpoint, connection) = connect(arguments, &dir, number).await?;
        connections.push((endpoint, connection));
    }
    println!("{}", json!({"ready": arguments.peers}));
    let start = Instant::now();
    let end = start + Duration::from_secs(arguments.seconds);
    let mut peers = JoinSet::new();
    for (number, (_, connection)) in connections.iter().enumerate() {
        let (connection, arguments) = (connection.clone(), arguments.clone());
        peers.spawn(async move {
            let mut requests = JoinSet::new();
            let progress = Arc::new(Mutex::new(Progress {
                last: Instant::now(),
                stall: Duration::ZERO,
            }));
            for index in 0..arguments.outstanding {
                let noise = Noise::new((number * arguments.outstanding + index) as u64 + 1);
                let connection = connection.clone();
                let fetcher = Fetcher {
                    connection,
                    blob: arguments.blob,
                    layout,
                    progress: progress.clone(),
                };
                requests.spawn(async move { fetcher.fetch_until(noise, end).await });
            }
            let mut seen = Seen::default();
            while let Some(request) = requests.join_next().await {
                seen.add(request.unwrap_or_else(|error| Seen {
                    errors: vec![error.to_string()],
                    ..Seen::default()
                }));
            }
            let stall = progress.lock().stall;
            (seen, stall)
        });
    }
    let mut stall = Duration::ZERO;
    let mut whole = Seen::default();
    let mut by_peer = Vec::new();
    while let Some(seen) = peers.join_next().await {
        let (seen, of_peer) = seen?;
        stall = stall.max(of_peer);
        by_peer.push(seen.bytes);
        whole.add(seen);
    }
    let seconds = start.elapsed().as_secs_f64();
    for error in whole.errors.iter().take(ERRORS_SHOWN_MAX) {
        eprintln!("{error}");
    }
    println!(
        "{}",
        json!({
            "seconds": seconds,
            "bytes": whole.bytes,
            "pieces": whole.pieces,
            "hashed": whole.hashed,
            "busy": whole.busy,
            "errors": whole.errors.len(),
            "stall_max_ms": stall.as_secs_f64() * 1e3,
            "wait_max_ms": whole.wait.as_secs_f64() * 1e3,
            "peer_bytes_min": by_peer.iter().min(),
            "peer_bytes_max": by_peer.iter().max(),
        })
    );
    for (endpoint, _) in connections {
        endpoint.close().await;
    }
    Ok(())
}

async fn connect(
    arguments: &SoakArguments,
    dir: &Path,
    number: usize,
) -> Result<(Endpoint, Connection)> {
    let endpoint = Endpoint::bind(EndpointConfig {
        listen: SocketAddr::from(([0, 0, 0, 0], 0)),
        identity: identities::read(dir, number)?,
        limits: Limits::default(),
        // Sixty-four rings with threads of their own would be a load of another kind.
        driver: DriverChoice::Tokio,
    })?;
    let connection = endpoint.connect(arguments.server, arguments.node).await?;
    Ok((endpoint, connection))
}

/// One of a peer's requests after the other.
struct Fetcher {
    connection: Connection,
    blob: BlobDigest,
    layout: PieceLayout,
    progress: Arc<Mutex<Progress>>,
}

impl Fetcher {
    async fn fetch_until(&self, mut noise: Noise, end: Instant) -> Seen {
        let mut seen = Seen::default();
        while Instant::now() < end {
            let piece = PieceIndex(noise.below(self.layout.piece_count().into()) as u32);
            let hashed = noise.below(HASHED_ONE_IN) == 0;
            match self.fetch(piece, hashed, &mut seen).await {
                Ok(true) => {}
                Ok(false) => {
                    seen.busy += 1;
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                Err(error) => {
                    seen.errors.push(format!("piece {}: {error:#}", piece.0));
                    if self.connection.is_closed() {
                        break;
                    }
                }
            }
        }
        seen
    }

    /// Fetches a piece; false where the node was busy.
    async fn fetch(&self, piece: PieceIndex, hashed: bool, seen: &mut Seen) -> Result<bool> {
        let Self {
            connection,
            blob,
            layout,
            progress,
        } = self;
        let mut last = Instant::now();
        let (mut send, mut recv) = connection.open(Priority::Bulk).await?;
        send.write_frame(&message::Request {
            digest: blob.as_bytes().to_vec().into(),
            kind: Some(request::Kind::Fetch(message::Fetch {
                piece: piece.0,
                first_group: 0,
                group_count: 0,
                priority: Priority::Bulk as u32,
            })),
        })
        .await?;
        send.finish()?;
        let answer = recv.read_frame::<message::Response>().await?;
        let head = match answer.and_then(|answer| answer.kind) {
            Some(response::Kind::Piece(head)) => head,
            Some(response::Kind::Refusal(no)) if no.reason() == refusal::Reason::Busy => {
                return Ok(false);
            }
            other => bail!("the node answers {other:?}"),
        };
        let range = layout.piece_range(piece).context("no such piece")?;
        ensure!(
            u64::from(head.length) == range.len(),
            "an answer of {} bytes",
            head.length
        );
        let expected = if hashed {
            let claim = Claim::try_from(head.claim.as_ref().context("no claim")?)?;
            claim.verify(blob, piece)?;
            Some(check_group_digests(
                layout,
                piece,
                &head.group_digests,
                &claim.piece_digest,
            )?)
        } else {
            None
        };
        let mut offset = range.start();
        while offset < range.end() {
            let slices = recv.read_slices(READ_BYTES).await?;
            let length: usize = slices.iter().map(Bytes::len).sum();
            ensure!(length > 0, "the answer ended early, at {offset}");
            seen.wait = seen.wait.max(last.elapsed());
            last = Instant::now();
            progress.lock().bytes_came();
            if let Some(expected) = &expected {
                let group = ((offset - range.start()) / GROUP_SIZE) as usize;
                let got = group_digests(offset, &slices.concat());
                ensure!(
                    expected.get(group..group + got.len()) == Some(&got[..]),
                    "wrong bytes at {offset}"
                );
            }
            offset += length as u64;
            seen.bytes += length as u64;
        }
        seen.pieces += 1;
        seen.hashed += u64::from(hashed);
        Ok(true)
    }
}
