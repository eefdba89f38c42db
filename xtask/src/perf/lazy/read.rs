//! Reading files and the time that it takes. These calls block.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};

/// What `cp` and `sha256sum` read at a time, or near it; as much as the kernel reads ahead by default.
const SEQUENTIAL_BYTES: usize = 128 << 10;
/// At a time, where two files are compared.
const COMPARED_BYTES: usize = 1 << 20;

/// Opens a file to be read.
pub(super) fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

/// Drops the pages that the page cache holds of this file; those of the file behind a mount stay.
pub(super) fn forget(file: &File) -> Result<()> {
    fadvise(file, 0, None, Advice::DontNeed).context("dropping pages from the page cache")
}

/// Reads the file from its start to its end, and returns how many bytes it had.
pub(super) fn whole(file: &File) -> Result<u64> {
    let mut buffer = vec![0; SEQUENTIAL_BYTES];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(offset),
            count => offset += count as u64,
        }
    }
}

/// Reads the file from its start to its end, and returns MiB a second.
pub(super) fn sequential(file: &File) -> Result<f64> {
    let start = Instant::now();
    let bytes = whole(file)?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(bytes > 0, "nothing to read");
    Ok(bytes as f64 / f64::from(1 << 20) / seconds)
}

/// Reads `bytes` at each of `offsets`, one after the other, and returns how long each took.
pub(super) fn random(file: &File, bytes: usize, offsets: &[u64]) -> Result<Vec<Duration>> {
    let mut buffer = vec![0; bytes];
    let mut took = Vec::with_capacity(offsets.len());
    for offset in offsets {
        let start = Instant::now();
        file.read_exact_at(&mut buffer, *offset)?;
        took.push(start.elapsed());
    }
    Ok(took)
}

/// Reads a second.
pub(super) fn rate(took: &[Duration]) -> f64 {
    took.len() as f64 / took.iter().sum::<Duration>().as_secs_f64()
}

/// The time in milliseconds that `share` of the reads were within.
pub(super) fn percentile_ms(took: &[Duration], share: f64) -> f64 {
    let mut sorted = took.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() as f64 * share) as usize;
    sorted
        .get(index.min(sorted.len().saturating_sub(1)))
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

/// Fails unless both files hold the same.
pub(super) fn compare(one: &Path, other: &Path) -> Result<()> {
    let (left, right) = (open(one)?, open(other)?);
    let (mut left_buffer, mut right_buffer) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    let size = left.metadata()?.len();
    ensure!(
        size == right.metadata()?.len(),
        "{} and {} differ in size",
        one.display(),
        other.display()
    );
    let mut offset = 0;
    while offset < size {
        let count = COMPARED_BYTES.min((size - offset) as usize);
        left.read_exact_at(&mut left_buffer[..count], offset)?;
        right.read_exact_at(&mut right_buffer[..count], offset)?;
        ensure!(
            left_buffer[..count] == right_buffer[..count],
            "{} and {} differ after byte {offset}",
            one.display(),
            other.display()
        );
        offset += count as u64;
    }
    Ok(())
}

/// `count` places of `bytes` each in a file of `file_bytes`, or as many as there are, no two the same, in no order.
pub(super) fn places(file_bytes: u64, bytes: u64, count: usize, seed: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = (0..file_bytes / bytes).map(|place| place * bytes).collect();
    Noise::new(seed).shuffle(&mut offsets);
    offsets.truncate(count);
    offsets
}

/// One place of `bytes` in each of `count` parts of `part_bytes`, or of as many as there are, in no order.
pub(super) fn places_apart(
    file_bytes: u64,
    part_bytes: u64,
    bytes: u64,
    count: usize,
    seed: u64,
) -> Vec<u64> {
    let mut noise = Noise::new(!seed);
    let parts = places(file_bytes, part_bytes, count, seed);
    let within = |part: u64| part + (noise.next() >> 16) % (part_bytes / bytes) * bytes;
    parts.into_iter().map(within).collect()
}

/// Numbers without a pattern, the same for the same seed (xorshift64*).
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = (self.next() >> 16) % (last as u64 + 1);
            items.swap(last, other as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_all_different_and_the_same_for_the_same_seed() {
        let places_of = |seed| places(1 << 20, 4096, 100, seed);
        let mut sorted = places_of(7);
        assert_eq!(sorted, places_of(7));
        assert_ne!(sorted, places_of(8));
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 100);
        assert!(sorted.iter().all(|at| at % 4096 == 0 && *at < 1 << 20));
    }

    #[test]
    fn places_apart_are_one_in_each_part() {
        let mut parts: Vec<u64> = places_apart(8 << 20, 1 << 20, 64 << 10, 20, 3)
            .into_iter()
            .inspect(|at| assert_eq!(at % (64 << 10), 0))
            .map(|at| at >> 20)
            .collect();
        parts.sort_unstable();
        assert_eq!(parts, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn files_that_differ_in_one_byte_are_not_the_same() {
        let dir = tempfile::tempdir().expect("a folder");
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        let mut bytes = vec![7; COMPARED_BYTES + 9];
        std::fs::write(&one, &bytes).expect("written");
        std::fs::write(&other, &bytes).expect("written");
        assert!(compare(&one, &other).is_ok());
        bytes[COMPARED_BYTES + 3] = 8;
        std::fs::write(&other, &bytes).expect("written");
        assert!(compare(&one, &other).is_err());
    }
}
