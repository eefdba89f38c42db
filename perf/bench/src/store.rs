//! What the store adds to the file below it: writing verified groups, and lending them out again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use pantala_store::{Store, StoreConfig};
use pantala_wire::tree::group_digests;
use pantala_wire::{BlobDigest, ByteRange, GROUP_SIZE, GroupDigest};
use serde_json::json;

use crate::file::Sink;
use crate::resources::Used;

/// Bytes of one write, as the node makes them.
const WRITE_BYTES: usize = 4 * GROUP_SIZE as usize;
/// Bytes of one lent slice: a piece.
const READ_BYTES: u64 = 1 << 20;
/// Bytes of a slice as QUIC decrypts it, on a path of MTU 1500.
const SLICE_BYTES: usize = 1_411;

/// What to write.
#[derive(Debug, Clone, Args)]
pub(crate) struct StoreArguments {
    /// A directory to write in
    dir: PathBuf,
    #[arg(long)]
    bytes: u64,
    #[arg(long)]
    rounds: usize,
}

/// One way through the bytes.
struct Pass {
    name: &'static str,
    seconds: f64,
    cpu_s: f64,
}

fn timed(name: &'static str, work: impl FnOnce() -> Result<()>) -> Result<Pass> {
    let (before, start) = (Used::now()?, Instant::now());
    work().with_context(|| name.to_owned())?;
    Ok(Pass {
        name,
        seconds: start.elapsed().as_secs_f64(),
        cpu_s: Used::now()?.since(before).cpu_s,
    })
}

/// Measures and prints one line for each round.
pub(crate) fn run(arguments: &StoreArguments) -> Result<()> {
    let window: Vec<u8> = {
        let mut noise = crate::latency::Noise::new(7);
        (0..WRITE_BYTES).map(|_| noise.below(256) as u8).collect()
    };
    let whole = Bytes::from(window);
    let slices: Vec<Bytes> = (0..WRITE_BYTES)
        .step_by(SLICE_BYTES)
        .map(|at| whole.slice(at..WRITE_BYTES.min(at + SLICE_BYTES)))
        .collect();
    let bytes = arguments.bytes / WRITE_BYTES as u64 * WRITE_BYTES as u64;
    // A group's digest depends on its place.
    let expected: Vec<Vec<GroupDigest>> = (0..bytes)
        .step_by(WRITE_BYTES)
        .map(|offset| group_digests(offset, &whole))
        .collect();
    for round in 0..=arguments.rounds {
        let passes = [
            timed("hash", || {
                for offset in (0..bytes).step_by(WRITE_BYTES) {
                    std::hint::black_box(group_digests(offset, &whole));
                }
                Ok(())
            })?,
            bare(&arguments.dir, bytes, &slices)?,
        ];
        let of_store = of_store(&arguments.dir, round, bytes, &slices, &expected)?;
        let line: serde_json::Map<String, serde_json::Value> = passes
            .iter()
            .chain(&of_store)
            .map(|pass| {
                let figures = json!({"seconds": pass.seconds, "cpu_s": pass.cpu_s});
                (pass.name.to_owned(), figures)
            })
            .collect();
        // The first round is for the warm-up.
        if round > 0 {
            println!("{}", json!({"bytes": bytes, "passes": line}));
        }
    }
    Ok(())
}

/// The same slices into a fresh, preallocated file, neither hashed nor recorded.
fn bare(dir: &Path, bytes: u64, slices: &[Bytes]) -> Result<Pass> {
    let path = dir.join("bare");
    let file = fs::File::create(&path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    let sink = Sink::open(&path, bytes)?;
    let pass = timed("bare_write", || {
        for offset in (0..bytes).step_by(WRITE_BYTES) {
            sink.write_slices(offset, slices)?;
        }
        Ok(())
    })?;
    fs::remove_file(&path)?;
    Ok(pass)
}

fn of_store(
    dir: &Path,
    round: usize,
    bytes: u64,
    slices: &[Bytes],
    expected: &[Vec<GroupDigest>],
) -> Result<[Pass; 2]> {
    let store = Store::open(StoreConfig::new(dir.join("store"), 4 * bytes))?;
    let mut name = [0; 32];
    name[..8].copy_from_slice(&(round as u64).to_le_bytes());
    let digest = BlobDigest::try_from(&name[..])?;
    let blob = store.create(&digest, bytes)?;
    let write = timed("verified_write", || {
        for (offset, expected) in (0..bytes).step_by(WRITE_BYTES).zip(expected) {
            blob.write_verified_slices(offset, slices, expected)?;
        }
        Ok(())
    })?;
    let lend = timed("lend", || {
        for start in (0..bytes).step_by(READ_BYTES as usize) {
            let range = ByteRange::new(start, bytes.min(start + READ_BYTES)).context("no range")?;
            let lent = blob.slice(range)?.context("written and not readable")?;
            // One byte of each page: lending promises that they are in memory.
            std::hint::black_box(lent.iter().step_by(4096).fold(0_u8, |sum, byte| sum ^ byte));
        }
        Ok(())
    })?;
    drop(blob);
    store.remove(&digest)?;
    Ok([write, lend])
}
