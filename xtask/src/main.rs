//! `cargo xtask`: the demo, the tests and the benchmarks of Pantala.
//!
//! `cargo xtask demo` shows the main job on real programs, `cargo xtask test` runs everything that
//! must pass, `cargo xtask perf` measures, `cargo xtask sim` simulates. All of them set up the same [`rig`].

#![forbid(unsafe_code)]

mod cargo;
mod check;
mod demo;
mod e2e;
mod ebpf;
mod kernel;
mod packages;
mod perf;
mod rig;
#[cfg(test)]
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Pull a real image on several nodes at once and show where the bytes came from
    Demo(demo::Options),
    /// Run everything that must pass
    Test(check::Options),
    /// Run the end-to-end tests alone
    E2e(e2e::Options),
    /// Run the fuzz targets
    Fuzz(check::fuzz::Options),
    /// Run the tests of lazy mounts: on this kernel, and in an emulated machine
    KernelTest(kernel::Options),
    /// Build the kernel programs and replace the committed object
    Ebpf(ebpf::Options),
    /// Measure, side by side with a baseline
    #[command(subcommand)]
    Perf(perf::Benchmark),
    /// Run the cores in virtual time: `cargo xtask sim help`
    Sim(perf::sim::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    rig::http::install_tls_provider();
    let outcome = match arguments.task {
        Task::Demo(options) => demo::main(&options),
        Task::Test(options) => check::main(&options),
        Task::E2e(options) => e2e::main(&options),
        Task::Fuzz(options) => check::fuzz::main(&options),
        Task::KernelTest(options) => kernel::main(&options),
        Task::Ebpf(options) => ebpf::main(&options),
        Task::Perf(benchmark) => perf::main(&benchmark),
        Task::Sim(options) => perf::sim::main(&options),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
