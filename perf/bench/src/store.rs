//! What the store adds to the file below it: writing verified groups, and lending them out again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use clap::Args;
use pantala_store::{Blob, Store, StoreConfig};
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

/// What is written in a round: the same bytes in each write, as they would come out of the same warm
/// receive buffers.
struct Content {
    slices: Vec<Bytes>,
    /// Of each write: a group's digest depends on its place.
    digests: Vec<Vec<GroupDigest>>,
}

impl Content {
    fn new(seed: u64, bytes: u64) -> Self {
        let mut noise = crate::latency::Noise::new(seed);
        let whole: Bytes = (0..WRITE_BYTES).map(|_| noise.below(256) as u8).collect();
        Self {
            slices: (0..WRITE_BYTES)
                .step_by(SLICE_BYTES)
                .map(|at| whole.slice(at..WRITE_BYTES.min(at + SLICE_BYTES)))
                .collect(),
            digests: offsets(bytes)
                .map(|offset| group_digests(offset, &whole))
                .collect(),
        }
    }

    /// The bytes of a write, copied into fresh memory.
    fn joined(&self) -> Bytes {
        let mut joined = BytesMut::with_capacity(WRITE_BYTES);
        for slice in &self.slices {
            joined.extend_from_slice(slice);
        }
        joined.freeze()
    }
}

fn offsets(bytes: u64) -> impl Iterator<Item = u64> {
    (0..bytes).step_by(WRITE_BYTES)
}

/// Measures and prints one line for each round. Files and their memory are made once and overwritten: what
/// the first touch of a page costs is the machine's, not the store's.
pub(crate) fn run(arguments: &StoreArguments) -> Result<()> {
    let bytes = arguments.bytes / WRITE_BYTES as u64 * WRITE_BYTES as u64;
    // In turn: the store does not write a group again that it has.
    let contents = [Content::new(7, bytes), Content::new(8, bytes)];
    let bare = Bare::create(&arguments.dir, bytes)?;
    let store = Store::open(StoreConfig::new(arguments.dir.join("store"), 4 * bytes))?;
    let blob = store.create(&BlobDigest::new([7; 32]), bytes)?;
    // The first rounds are for the warm-up: one for each content.
    for round in 0..arguments.rounds + contents.len() {
        let content = &contents[round % contents.len()];
        let passes = [
            timed("hash", || {
                let joined = content.joined();
                for offset in offsets(bytes) {
                    std::hint::black_box(group_digests(offset, &joined));
                }
                Ok(())
            })?,
            bare.write(content)?,
            bare.copy_and_write(content)?,
            write(&blob, content)?,
            read(&blob)?,
            lend(&blob)?,
        ];
        if round < contents.len() {
            continue;
        }
        let line: serde_json::Map<String, serde_json::Value> = passes
            .iter()
            .map(|pass| {
                let figures = json!({"seconds": pass.seconds, "cpu_s": pass.cpu_s});
                (pass.name.to_owned(), figures)
            })
            .collect();
        println!("{}", json!({"bytes": bytes, "passes": line}));
    }
    Ok(())
}

/// A preallocated file without a store.
struct Bare {
    file: File,
    sink: Sink,
    bytes: u64,
}

impl Bare {
    fn create(dir: &Path, bytes: u64) -> Result<Self> {
        let path = dir.join("bare");
        let file = File::create(&path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
        let sink = Sink::open(&path, bytes)?;
        Ok(Self { file, sink, bytes })
    }

    /// The slices as they are, by vectored writes, not hashed.
    fn write(&self, content: &Content) -> Result<Pass> {
        timed("bare_write", || {
            offsets(self.bytes)
                .try_for_each(|offset| self.sink.write_slices(offset, &content.slices))
        })
    }

    /// The obvious way: copied into a buffer, hashed there, written.
    fn copy_and_write(&self, content: &Content) -> Result<Pass> {
        timed("plain_write", || {
            for (offset, digests) in offsets(self.bytes).zip(&content.digests) {
                let joined = content.joined();
                ensure!(group_digests(offset, &joined) == *digests, "a wrong digest");
                self.file.write_all_at(&joined, offset)?;
            }
            Ok(())
        })
    }
}

fn write(blob: &Blob, content: &Content) -> Result<Pass> {
    let bytes = blob.layout().blob_size();
    timed("verified_write", || {
        for (offset, digests) in offsets(bytes).zip(&content.digests) {
            blob.write_verified_slices(offset, &content.slices, digests)?;
        }
        Ok(())
    })
}

/// One byte of each page: lending promises that they are in memory.
fn touch(bytes: &[u8]) {
    std::hint::black_box(
        bytes
            .iter()
            .step_by(4096)
            .fold(0_u8, |sum, byte| sum ^ byte),
    );
}

/// Into fresh memory, as one must that hands its bytes on and keeps none.
fn read(blob: &Blob) -> Result<Pass> {
    timed("read", || {
        for offset in offsets(blob.layout().blob_size()) {
            let mut buffer = vec![0; WRITE_BYTES];
            ensure!(
                blob.read_at(offset, &mut buffer)? == WRITE_BYTES,
                "written and not readable"
            );
            touch(&buffer);
        }
        Ok(())
    })
}

fn lend(blob: &Blob) -> Result<Pass> {
    let bytes = blob.layout().blob_size();
    timed("lend", || {
        for start in (0..bytes).step_by(READ_BYTES as usize) {
            let range = ByteRange::new(start, bytes.min(start + READ_BYTES)).context("no range")?;
            touch(&blob.slice(range)?.context("written and not readable")?);
        }
        Ok(())
    })
}
