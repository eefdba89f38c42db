//! `pantala-sim`: runs scenarios and says what came of them. `cargo xtask sim` builds and drives it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use pantala_sim::cli::Arguments;

/// A simulation is made of small allocations: the system's allocator takes a third of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
