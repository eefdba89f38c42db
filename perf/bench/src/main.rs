//! `pantala-perf`: both ends of every transfer that `cargo xtask perf` measures.
//!
//! Each side is a process of its own, so that processor time and memory can be told apart, and is led
//! by lines on its standard input: see [`lead`]. It is no tool for people; `cargo xtask perf` is.

#![forbid(unsafe_code)]

mod control;
mod file;
mod identities;
mod latency;
mod lead;
mod meter;
mod ranges;
mod resources;
mod soak;
mod stack;
mod store;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use stack::Stack;

/// The allocator of `pantala` itself.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Both ends of every transfer that `cargo xtask perf` measures.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Write the certificates of a cluster of COUNT nodes
    Identities {
        dir: PathBuf,
        #[arg(long, default_value_t = 2)]
        count: usize,
    },
    /// Write a file of noise
    Noise { file: PathBuf, bytes: u64 },
    /// Overwrite a file with zeros, allocated and in the page cache
    Blank { file: PathBuf, bytes: u64 },
    /// Fail unless two files hold the same
    Compare { one: PathBuf, other: PathBuf },
    /// Serve a file
    Serve(ServeArguments),
    /// Fetch a file from `serve`
    Fetch(FetchArguments),
    /// Ask a node's mirror for ranges
    Ranges(ranges::RangesArguments),
    /// Load a node by many peers
    Soak(soak::SoakArguments),
    /// Measure the core of control
    Control(control::ControlArguments),
    /// Measure the meter: counts, estimates, steering, giving way
    Meter(meter::MeterArguments),
    /// Measure the store
    Store(store::StoreArguments),
}

/// What a server is told.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArguments {
    #[arg(long)]
    stack: Stack,
    #[arg(long)]
    listen: SocketAddr,
    /// What to serve
    #[arg(long)]
    file: PathBuf,
    /// Where the certificates are
    #[arg(long)]
    identities: PathBuf,
}

/// What a client is told.
#[derive(Debug, Clone, Args)]
pub(crate) struct FetchArguments {
    #[arg(long)]
    stack: Stack,
    #[arg(long)]
    server: SocketAddr,
    /// What to write to; exists in its full size
    #[arg(long)]
    file: PathBuf,
    /// What the server calls it, over HTTP
    #[arg(long, default_value = "")]
    name: String,
    /// Bytes to fetch
    #[arg(long)]
    bytes: u64,
    /// Bytes of one request
    #[arg(long, default_value_t = 1 << 20)]
    piece: u32,
    /// Requests outstanding
    #[arg(long, default_value_t = 8)]
    streams: usize,
    /// Where the certificates are
    #[arg(long)]
    identities: PathBuf,
    /// The largest UDP payload of the path; only the bare UDP stack must be told
    #[arg(long, default_value_t = 1452)]
    payload: u16,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Identities { dir, count } => identities::write(&dir, count),
        Task::Noise { file, bytes } => file::write_noise(&file, bytes),
        Task::Blank { file, bytes } => file::write_blank(&file, bytes),
        Task::Compare { one, other } => file::compare(&one, &other),
        Task::Serve(arguments) => stack::serve(&arguments),
        Task::Fetch(arguments) => stack::fetch(&arguments),
        Task::Ranges(arguments) => ranges::run(&arguments),
        Task::Soak(arguments) => soak::run(&arguments),
        Task::Control(arguments) => control::run(&arguments),
        Task::Meter(arguments) => meter::run(&arguments),
        Task::Store(arguments) => store::run(&arguments),
    }
}
