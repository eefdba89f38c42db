//! The `pantala` program. Everything is in the library, where tests reach it.

#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// Buffers are filled on one thread and freed on another all day long; the system allocator keeps
/// an arena a thread and gives little of that back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long the allocator keeps what is free before it gives it to the kernel: it reads this when the
/// process starts.
const KEEP_VARIABLE: &str = "MIMALLOC_PURGE_DELAY";
/// Its default is 10 ms, so that the buffers of each pull are new pages again, which the kernel clears
/// and, in a virtual machine, asks its host for: 2 ms before the first byte. A second bridges the pauses
/// between pulls, and an idle node still gives all back.
const KEEP_MS: &str = "1000";

fn main() -> ExitCode {
    keep_memory();
    pantala_node::cli::main()
}

/// Starts a node's process anew, in place, with the allocator's setting; a setting that is there already
/// is left alone.
fn keep_memory() {
    let is_node = std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "node");
    if !is_node || std::env::var_os(KEEP_VARIABLE).is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let failed = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(KEEP_VARIABLE, KEEP_MS)
        .exec();
    // Only a failure returns, and leaves a node that is a little slower.
    eprintln!("pantala: {KEEP_VARIABLE} is not set: {failed}");
}
