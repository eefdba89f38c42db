//! `cargo xtask perf`: measurements against a baseline in the same run, interleaved, medians.

mod figures;
mod first_byte;
mod hit;
mod memory;
mod plot;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::cargo::{Profile, Programs};
use crate::packages;
use crate::rig::{Rig, enclosure};
use figures::Figures;

/// What `cargo xtask perf` measures.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Benchmark {
    /// A cold pull's first byte through Pantala, and straight from the registry
    FirstByte(Options),
    /// A local hit, and nginx with sendfile serving the same file
    Hit(Options),
    /// The memory of a node that serves a large blob to three peers and a client
    Memory(Options),
    /// One peer to another, page cache to file, against what people would use instead
    Transfer(transfer::Options),
}

/// Options of the benchmarks that pull a blob.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures both sides
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    rounds: u32,
    /// Size of the blob in MiB [default: 8 for first-byte, 1024 for hit, 3072 for memory]
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
            Self::Memory(_) => "memory",
            Self::Transfer(_) => "transfer",
        }
    }

    fn keep(&self) -> &Keep {
        match self {
            Self::FirstByte(options) | Self::Hit(options) | Self::Memory(options) => &options.keep,
            Self::Transfer(options) => &options.keep,
        }
    }

    fn set_default_size(&mut self) {
        match self {
            Self::FirstByte(options) => options.default_size_mib = 8,
            Self::Hit(options) => options.default_size_mib = 1024,
            Self::Memory(options) => options.default_size_mib = 3072,
            Self::Transfer(_) => {}
        }
    }

    /// Bytes on the disk at one time.
    fn space_bytes(&self) -> u64 {
        match self {
            // A blob of its own for each round: in the layout, the registry and the node.
            Self::FirstByte(options) => {
                options.size_bytes() * 3 * u64::from(options.rounds + first_byte::WARM_UP_ROUNDS)
            }
            Self::Hit(options) => options.size_bytes() * 3,
            Self::Memory(options) => options.size_bytes() * 6,
            Self::Transfer(options) => options.space_bytes(),
        }
    }

    fn build(&self) -> Result<()> {
        match self {
            Self::FirstByte(_) | Self::Hit(_) | Self::Memory(_) => {
                println!("building pantala and pantala-control (release)");
                Programs::build(Profile::Release).map(drop)
            }
            Self::Transfer(_) => {
                println!("building pantala-perf (release)");
                crate::cargo::build_release(&["pantala-perf"])
            }
        }
    }

    fn packages(&self) -> Vec<&'static [packages::Needed]> {
        let mut lists = match self {
            Self::Transfer(_) => vec![packages::TRANSFER],
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
    if let Some(rig) = Rig::enter()? {
        return enclosure::run_until_signal(measure(&rig, &benchmark));
    }
    packages::ensure(&benchmark.packages())?;
    benchmark.build()?;
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
        Benchmark::Memory(options) => memory::measure(rig, &programs, options).await?,
        Benchmark::Transfer(options) => transfer::measure(rig, options).await?,
    };
    figures.print();
    let keep = benchmark.keep();
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
