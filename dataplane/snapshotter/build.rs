//! Compiles containerd's schemas with a Rust compiler for them, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let schemas = ["proto/snapshots.proto", "proto/content.proto"];
    let descriptors = protox::compile(schemas, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
