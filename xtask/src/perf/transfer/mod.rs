//! One peer to another, page cache to file, by all stacks and on all networks in turn.
//!
//! Each side is a process of its own, bound to a core of its own, and gives account of its own processor
//! time; a round takes every stack on every network once, in an order that rotates, so that whatever
//! changes on the machine meanwhile meets all of them.

pub(super) mod network;
mod report;
pub(super) mod side;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use super::Keep;
use super::figures::Figures;
use crate::cargo::release_program;
use crate::rig::Rig;
use crate::rig::process::run_to_end;
use network::{Network, NetworkKind};
use side::{Pair, Setup};

/// Longest that writing or comparing a file may take.
const FILE_MAX: Duration = Duration::from_secs(300);

/// Options of `cargo xtask perf transfer`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures every stack on every network; one more warms up and verifies
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// MiB that each transfer moves
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: u64,
    /// Requests of 1 MiB outstanding, each on a stream of its own
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: u32,
    /// Stacks to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Stack::value_variants().to_vec())]
    stacks: Vec<Stack>,
    /// Networks to measure on
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = NetworkKind::DEFAULT)]
    networks: Vec<NetworkKind>,
    /// What becomes of the bytes, after the first round, which always writes and compares
    #[arg(long, value_enum, default_value_t = SinkKind::File)]
    sink: SinkKind,
    /// Which processors the two sides may use
    #[arg(long, value_enum, default_value_t = Pin::Sides)]
    pin: Pin,
    #[command(flatten)]
    pub(super) keep: Keep,
}

/// Where a client puts what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SinkKind {
    /// A file that is overwritten
    File,
    /// Nowhere: what a file costs all stacks alike is left out
    Null,
}

/// Which processors a side may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Pin {
    /// The server core 0, the client core 1
    Sides,
    /// Both sides all of them
    None,
}

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Stack {
    /// Pantala's QUIC on its io_uring driver
    Ring,
    /// Pantala's QUIC on its tokio driver, the fallback
    Tokio,
    /// quinn 0.11 on tokio as it comes, with larger windows
    Quinn,
    /// rustls over TCP
    TlsTcp,
    /// nginx, plain HTTP with sendfile
    Nginx,
    /// nginx, HTTPS
    NginxTls,
    /// Bare UDP with GSO and GRO, neither encrypted nor acknowledged: the floor
    Udp,
}

impl Stack {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Tokio => "tokio",
            Self::Quinn => "quinn",
            Self::TlsTcp => "tls-tcp",
            Self::Nginx => "nginx",
            Self::NginxTls => "nginx-tls",
            Self::Udp => "udp",
        }
    }
}

impl Options {
    /// What the results are kept as.
    pub(super) fn name(&self) -> &'static str {
        match self.sink {
            SinkKind::File => "transfer",
            SinkKind::Null => "transfer-null",
        }
    }

    pub(super) fn space_bytes(&self) -> u64 {
        // What is served and what is written; and what Pantala's servers have in stores of their own.
        let stores = self.networks.len()
            * self
                .stacks
                .iter()
                .filter(|stack| matches!(stack, Stack::Ring | Stack::Tokio))
                .count();
        ((2 + stores as u64) * self.size) << 20
    }
}

/// One transfer.
#[derive(Debug, Clone, Copy)]
struct Sample {
    seconds: f64,
    server_cpu_s: f64,
    client_cpu_s: f64,
    server_peak_bytes: u64,
    client_peak_bytes: u64,
    mtu: Option<u16>,
}

/// What was measured, by network and stack, in the order of the rounds.
type Samples = BTreeMap<(NetworkKind, Stack), Vec<Sample>>;

pub(super) async fn measure(rig: &Rig, options: &Options) -> Result<Figures> {
    ensure!(
        rig.has_namespaces(),
        "perf transfer makes networks of its own, which takes root"
    );
    let files = Files::create(rig, options.size << 20).await?;
    let mut networks = Vec::new();
    for kind in &options.networks {
        networks.push(Network::create(rig, *kind)?);
    }
    let mut figures = Figures::default();
    let mut pairs = Vec::new();
    for network in &networks {
        for stack in &options.stacks {
            let setup = Setup {
                network,
                stack: *stack,
                files: &files,
                streams: options.streams,
                pin: options.pin,
            };
            match Pair::start(&setup).await {
                Ok(pair) => pairs.push(pair),
                Err(error) => {
                    let what = format!("{} on {}: {error:#}", stack.name(), network.kind.name());
                    eprintln!("{what}");
                    figures.fail(what);
                }
            }
        }
    }
    let mut samples = Samples::new();
    for round in 0..=options.rounds {
        let count = pairs.len().max(1);
        for step in 0..count {
            let index = (step + round as usize) % count;
            let Some(pair) = pairs.get_mut(index) else {
                continue;
            };
            let discard = round == 1 && options.sink == SinkKind::Null;
            match run(pair, &files, round == 0, discard).await {
                Ok(sample) => {
                    report::print_sample(round, options, pair, &sample);
                    // The first round warms up and verifies.
                    if round > 0 {
                        samples
                            .entry((pair.network, pair.stack))
                            .or_default()
                            .push(sample);
                    }
                }
                Err(error) => {
                    let what = format!(
                        "{} on {}, round {round}: {error:#}",
                        pair.stack.name(),
                        pair.network.name()
                    );
                    eprintln!("{what}");
                    figures.fail(what);
                    // A stack that failed once is out: figures of its better rounds would flatter it.
                    samples.remove(&(pair.network, pair.stack));
                    pairs.remove(index);
                    break;
                }
            }
        }
    }
    report::report(&mut figures, options, &samples);
    Ok(figures)
}

/// One transfer; in the first round the bytes that arrived are compared with those that were sent.
async fn run(pair: &mut Pair, files: &Files, verify: bool, discard: bool) -> Result<Sample> {
    if verify {
        files.blank().await?;
    }
    if discard {
        pair.discard().await?;
    }
    let sample = pair.transfer(files.bytes).await?;
    if verify {
        files.compare().await.context("wrong bytes arrived")?;
    }
    Ok(sample)
}

/// The file that is served, the one that is written, and the certificates.
#[derive(Debug)]
pub(super) struct Files {
    program: PathBuf,
    root: PathBuf,
    bytes: u64,
}

impl Files {
    const SOURCE: &str = "source";

    pub(super) async fn create(rig: &Rig, bytes: u64) -> Result<Self> {
        let files = Self {
            program: release_program("pantala-perf"),
            root: rig.scratch("files")?,
            bytes,
        };
        let bytes = files.bytes.to_string();
        files
            .helper(&["noise".as_ref(), files.source().as_ref(), bytes.as_ref()])
            .await?;
        files
            .helper(&["identities".as_ref(), files.identities().as_ref()])
            .await?;
        files.blank().await?;
        Ok(files)
    }

    fn source(&self) -> PathBuf {
        self.root.join(Self::SOURCE)
    }

    fn sink(&self) -> PathBuf {
        self.root.join("sink")
    }

    fn identities(&self) -> PathBuf {
        self.root.join("identities")
    }

    async fn blank(&self) -> Result<()> {
        let bytes = self.bytes.to_string();
        self.helper(&["blank".as_ref(), self.sink().as_ref(), bytes.as_ref()])
            .await
    }

    async fn compare(&self) -> Result<()> {
        let (source, sink) = (self.source(), self.sink());
        self.helper(&["compare".as_ref(), source.as_ref(), sink.as_ref()])
            .await
    }

    async fn helper(&self, arguments: &[&Path]) -> Result<()> {
        let mut command = std::process::Command::new(&self.program);
        command.args(arguments);
        run_to_end(command, FILE_MAX)
            .await?
            .ok("pantala-perf")
            .map(drop)
    }
}
