//! `cargo xtask perf`: measurements against a baseline in the same run, interleaved, medians.

mod ab;
mod control;
mod figures;
mod first_byte;
mod flame;
mod hit;
mod lazy;
mod led;
mod memory;
mod meter;
mod plot;
mod profile;
pub(crate) mod sim;
mod small;
mod soak;
mod store;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::cargo::{Profile, Programs, build_release};
use crate::packages;
use crate::rig::{Rig, enclosure};
use figures::Figures;

/// What `cargo xtask perf` measures.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Benchmark {
    /// A cold pull's first byte through Pantala, and straight from the registry
    FirstByte(Options),
    /// A local hit, and nginx with sendfile serving the same file
    Hit(hit::Options),
    /// Lazy mounts: complete, through faults, and a start, against local files and a pull in full
    Lazy(lazy::Options),
    /// The memory of a node that serves a large blob to three peers and a client
    Memory(Options),
    /// One peer to another, page cache to file, against what people would use instead
    Transfer(transfer::Options),
    /// Random ranges of 64 KiB: from peer to peer, and through whole nodes
    Small(small::Options),
    /// The store: verified writes against bare ones, and lending
    Store(store::Options),
    /// The core of control: decisions a second and memory, up to 100,000 nodes
    Control(control::Options),
    /// The meter: counts, estimates, steering, cost, giving way
    Meter(meter::Options),
    /// A node under the load of 64 peers: memory, errors, stalls
    Soak(soak::Options),
    /// Run a benchmark under the kernel's profiler and draw a flame graph
    Profile(profile::Options),
    /// Compare two commits or configurations by a benchmark, in turn
    Ab(ab::Options),
}

/// Options of the benchmarks that pull a blob.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures both sides
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    rounds: u32,
    /// Size of the blob in MiB [default: 8 for first-byte, 3072 for memory]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: Option<u64>,
    /// What `size` is where it is not given.
    #[arg(skip)]
    default_size_mib: u64,
    #[command(flatten)]
    keep: Keep,
}

/// Where figures go besides the terminal.
#[derive(Debug, Clone, Args)]
pub(crate) struct Keep {
    /// Write the figures to this file as `{"metrics": {name: number}}`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep the figures in perf/results/, with what they were measured on
    #[arg(long)]
    record: bool,
}

impl Options {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(self.default_size_mib) << 20
    }
}

impl Benchmark {
    fn name(&self) -> &'static str {
        match self {
            Self::FirstByte(_) => "first-byte",
            Self::Hit(_) => "hit",
            Self::Lazy(_) => "lazy",
            Self::Memory(_) => "memory",
            Self::Transfer(options) => options.name(),
            Self::Small(_) => "small",
            Self::Store(_) => "store",
            Self::Control(_) => "control",
            Self::Meter(_) => "meter",
            Self::Soak(_) => "soak",
            Self::Profile(_) => "profile",
            Self::Ab(_) => "ab",
        }
    }

    fn keep(&self) -> Option<&Keep> {
        match self {
            Self::FirstByte(options) | Self::Memory(options) => Some(&options.keep),
            Self::Hit(options) => Some(&options.keep),
            Self::Lazy(options) => Some(&options.keep),
            Self::Transfer(options) => Some(&options.keep),
            Self::Small(options) => Some(&options.keep),
            Self::Store(options) => Some(&options.keep),
            Self::Control(options) => Some(&options.keep),
            Self::Meter(options) => Some(&options.keep),
            Self::Soak(options) => Some(&options.keep),
            Self::Profile(_) | Self::Ab(_) => None,
        }
    }

    fn set_default_size(&mut self) {
        match self {
            Self::FirstByte(options) => options.default_size_mib = 8,
            Self::Memory(options) => options.default_size_mib = 3072,
            _ => {}
        }
    }

    /// Bytes on the disk at one time.
    fn space_bytes(&self) -> u64 {
        match self {
            // A blob of its own for each round: in the layout, the registry and the node.
            Self::FirstByte(options) => {
                options.size_bytes() * 3 * u64::from(options.rounds + first_byte::WARM_UP_ROUNDS)
            }
            Self::Hit(options) => options.space_bytes(),
            Self::Lazy(options) => options.space_bytes(),
            Self::Memory(options) => options.size_bytes() * 6,
            Self::Transfer(options) => options.space_bytes(),
            Self::Small(options) => options.space_bytes(),
            Self::Store(options) => options.space_bytes(),
            Self::Soak(options) => options.space_bytes(),
            Self::Control(_) | Self::Meter(_) | Self::Profile(_) | Self::Ab(_) => 0,
        }
    }

    /// The packages of this workspace that are measured, or measure. Each group is built by itself:
    /// together they would have other features, and all would be built anew.
    fn programs(&self) -> &'static [&'static [&'static str]] {
        const NODE: &[&str] = &["pantala-node", "pantala-control"];
        const PERF: &[&str] = &["pantala-perf"];
        const SUPERVISOR: &[&str] = &["pantala-supervisor"];
        match self {
            Self::FirstByte(_) | Self::Hit(_) | Self::Memory(_) => &[NODE],
            Self::Lazy(_) => &[NODE, SUPERVISOR],
            Self::Transfer(_) | Self::Store(_) | Self::Control(_) | Self::Meter(_) => &[PERF],
            Self::Small(options) if !options.needs_nodes() => &[PERF],
            Self::Small(_) | Self::Soak(_) => &[PERF, NODE],
            Self::Profile(_) | Self::Ab(_) => &[],
        }
    }

    fn packages(&self) -> Vec<&'static [packages::Needed]> {
        let mut lists = match self {
            Self::Transfer(_) | Self::Store(_) => vec![packages::TRANSFER],
            Self::Control(_) | Self::Meter(_) => Vec::new(),
            Self::Small(_) | Self::Soak(_) => vec![packages::BASE, packages::TRANSFER],
            Self::Lazy(_) => vec![packages::BASE, packages::PERF, packages::MOUNTS],
            _ => vec![packages::BASE, packages::PERF],
        };
        if enclosure::is_root() {
            lists.push(packages::ROOT);
        }
        lists
    }
}

/// Installs, builds, and measures inside a rig.
pub(crate) fn main(benchmark: &Benchmark) -> Result<ExitCode> {
    let mut benchmark = benchmark.clone();
    benchmark.set_default_size();
    match &benchmark {
        Benchmark::Profile(options) => return profile::main(options),
        Benchmark::Ab(options) => return ab::main(options),
        _ => {}
    }
    if let Some(rig) = Rig::enter()? {
        return enclosure::run_until_signal(measure(&rig, &benchmark));
    }
    packages::ensure(&benchmark.packages())?;
    for packages in benchmark.programs() {
        println!("building {} (release)", packages.join(" and "));
        build_release(packages)?;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // A part of the blobs' files is larger than asked.
    let space = benchmark.space_bytes();
    enclosure::run_inside(&arguments, space + space / 8)
}

async fn measure(rig: &Rig, benchmark: &Benchmark) -> Result<ExitCode> {
    let programs = Programs::locate(Profile::Release);
    let figures: Figures = match benchmark {
        Benchmark::FirstByte(options) => first_byte::measure(rig, &programs, options).await?,
        Benchmark::Hit(options) => hit::measure(rig, &programs, options).await?,
        Benchmark::Lazy(options) => lazy::measure(rig, &programs, options).await?,
        Benchmark::Memory(options) => memory::measure(rig, &programs, options).await?,
        Benchmark::Transfer(options) => transfer::measure(rig, options).await?,
        Benchmark::Small(options) => small::measure(rig, &programs, options).await?,
        Benchmark::Store(options) => store::measure(rig, options).await?,
        Benchmark::Control(options) => control::measure(options).await?,
        Benchmark::Meter(options) => meter::measure(rig, options).await?,
        Benchmark::Soak(options) => soak::measure(rig, &programs, options).await?,
        Benchmark::Profile(_) | Benchmark::Ab(_) => bail!("this runs other benchmarks"),
    };
    figures.print();
    let Some(keep) = benchmark.keep() else {
        return Ok(figures.exit_code());
    };
    if let Some(path) = &keep.json {
        std::fs::write(path, figures.to_json())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if keep.record {
        for path in figures.record(benchmark.name())? {
            println!("kept in {}", path.display());
        }
    }
    Ok(figures.exit_code())
}
