//! `cargo xtask perf`: measurements against a baseline in the same run, interleaved, medians.

mod figures;
mod first_byte;
mod hit;
mod memory;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::cargo::{Profile, Programs};
use crate::packages;
use crate::rig::{Rig, enclosure};
use figures::Figures;

/// Options of `cargo xtask perf`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// What to measure
    benchmark: Benchmark,
    /// Write the figures to this file as `{"metrics": {name: number}}`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rounds, each of which measures both sides
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    rounds: u32,
    /// Size of the blob in MiB [default: 8 for first-byte, 1024 for hit, 3072 for memory]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: Option<u64>,
    /// Keep the figures in perf/results/, with what they were measured on
    #[arg(long)]
    record: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Benchmark {
    /// A cold pull's first byte through Pantala, and straight from the registry
    FirstByte,
    /// A local hit, and nginx with sendfile serving the same file
    Hit,
    /// The memory of a node that serves a large blob to three peers and a client
    Memory,
}

impl Benchmark {
    fn name(self) -> &'static str {
        match self {
            Self::FirstByte => "first-byte",
            Self::Hit => "hit",
            Self::Memory => "memory",
        }
    }

    fn default_size_mib(self) -> u64 {
        match self {
            Self::FirstByte => 8,
            Self::Hit => 1024,
            Self::Memory => 3072,
        }
    }

    /// Copies of the blob on the disk at one time.
    fn copies(self, rounds: u32) -> u64 {
        match self {
            // A blob of its own for each round: in the layout, the registry and the node.
            Self::FirstByte => 3 * u64::from(rounds + first_byte::WARM_UP_ROUNDS),
            Self::Hit => 3,
            Self::Memory => 6,
        }
    }
}

impl Options {
    fn size_bytes(&self) -> u64 {
        self.size
            .unwrap_or_else(|| self.benchmark.default_size_mib())
            << 20
    }
}

/// Installs, builds, and measures inside a rig.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    if let Some(rig) = Rig::enter()? {
        return enclosure::run_until_signal(measure(&rig, options));
    }
    let mut lists = vec![packages::BASE, packages::PERF];
    if enclosure::is_root() {
        lists.push(packages::ROOT);
    }
    packages::ensure(&lists)?;
    println!("building pantala and pantala-control (release)");
    Programs::build(Profile::Release)?;
    let mut arguments = vec!["perf".to_owned(), options.benchmark.name().to_owned()];
    arguments.push(format!("--rounds={}", options.rounds));
    if let Some(size) = options.size {
        arguments.push(format!("--size={size}"));
    }
    if let Some(path) = &options.json {
        arguments.push(format!("--json={}", std::path::absolute(path)?.display()));
    }
    if options.record {
        arguments.push("--record".into());
    }
    let space = options.size_bytes() * options.benchmark.copies(options.rounds);
    // A part of the blobs' files is larger than asked.
    enclosure::run_inside(&arguments, space + space / 8)
}

async fn measure(rig: &Rig, options: &Options) -> Result<ExitCode> {
    let programs = Programs::locate(Profile::Release);
    let figures: Figures = match options.benchmark {
        Benchmark::FirstByte => first_byte::measure(rig, &programs, options).await?,
        Benchmark::Hit => hit::measure(rig, &programs, options).await?,
        Benchmark::Memory => memory::measure(rig, &programs, options).await?,
    };
    figures.print();
    if let Some(path) = &options.json {
        std::fs::write(path, figures.to_json())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if options.record {
        let path = figures.record(options.benchmark.name())?;
        println!("kept in {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
