//! The `pantala` program. Everything is in the library, where tests reach it.

#![forbid(unsafe_code)]

/// Buffers are filled on one thread and freed on another all day long; the system allocator keeps
/// an arena a thread and gives little of that back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    pantala_node::cli::main()
}
