//! What every backend must do, as functions over [`Backend`].
//!
//! The fault model: a device's bytes come late, in any order, for many readers at once; or not at all; the mount is taken
//! down while it is read. Whatever happens, a reader sees the source's bytes or an error, in bounded time.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "several programs include it, and not each uses all of it"
)]

pub mod device;
pub mod image;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pantala_lazy::{Backend, Device, MountSpec};

use device::LateDevice;
use image::{Entry, Image, digest_of};

/// No read may take longer than this, whatever happens. It is far more than a loaded machine needs.
pub const READ_MAX: Duration = Duration::from_secs(120);
/// Threads that read at once.
const READERS: usize = 6;

/// What a test of mounts needs.
pub struct Fixture<B> {
    /// The backend.
    pub backend: Arc<B>,
    /// What is mounted.
    pub image: Image,
    /// A folder for the devices' files and the mount points, on a disk.
    pub scratch: PathBuf,
}

/// The seed of this run: `PANTALA_SEED`, or one from the clock. Printed, so that a failure can be replayed.
pub fn seed() -> u64 {
    let seed = std::env::var("PANTALA_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(1, |since| since.as_nanos() as u64)
        });
    println!("PANTALA_SEED={seed}");
    seed
}

/// A stream of numbers from a seed (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }

    /// Any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// How a file is read.
#[derive(Debug, Clone, Copy)]
pub enum By {
    /// read(2), in pieces of some size.
    Read,
    /// Page faults.
    Mmap,
    /// A program of the image itself, in a process of its own.
    Exec,
}

/// The digest of one file of the mount at `at`.
pub fn digest(
    image: &Image,
    at: &Path,
    entry: &Entry,
    by: By,
    dice: &mut Dice,
) -> io::Result<String> {
    let path = at.join(&entry.path);
    match by {
        By::Read => {
            let mut file = File::open(&path)?;
            let mut bytes = Vec::new();
            let mut piece = vec![0; 512 + dice.below(300_000) as usize];
            loop {
                let len = file.read(&mut piece)?;
                if len == 0 {
                    return Ok(digest_of(&bytes));
                }
                bytes.extend_from_slice(&piece[..len]);
            }
        }
        By::Mmap => {
            let file = File::open(&path)?;
            // SAFETY: the file system is read-only, so that nobody changes or cuts the file.
            let map = unsafe { memmap2::Mmap::map(&file)? };
            // Backwards, where the kernel's read-ahead guesses wrong.
            let mut bytes = vec![0; map.len()];
            for page in (0..map.len().div_ceil(4096)).rev() {
                let range = page * 4096..map.len().min((page + 1) * 4096);
                bytes[range.clone()].copy_from_slice(&map[range]);
            }
            Ok(digest_of(&bytes))
        }
        By::Exec => {
            let output = Command::new(at.join(&image.digester[0]))
                .args(&image.digester[1..])
                .arg(&path)
                .output()?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(io::Error::other(format!("{}: {said}", output.status)));
            }
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.trim_start_matches('\\').chars().take(64).collect())
        }
    }
}

/// Runs `work`, which waits, beside the runtime.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("the readers do not panic")
}

/// Every way, read(2) more often.
pub const ALL_WAYS: &[By] = &[By::Read, By::Mmap, By::Read, By::Mmap, By::Exec, By::Read];
/// The ways that end in an error and not in a signal when the bytes cannot be had.
pub const WAYS_THAT_FAIL: &[By] = &[By::Read, By::Read, By::Read, By::Exec];

/// Reads every file once in a random order by a random one of `ways`, by several threads; the files that read wrong, with
/// the error.
pub fn read_all(image: &Image, at: &Path, seed: u64, ways: &[By]) -> Vec<String> {
    let mut order: Vec<&Entry> = image.entries.iter().collect();
    Dice(seed).shuffle(&mut order);
    let next = AtomicUsize::new(0);
    let wrong = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (next, wrong, order) = (&next, &wrong, &order);
            scope.spawn(move || {
                let mut dice = Dice(seed ^ (reader as u64 + 1));
                while let Some(entry) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let by = ways[dice.below(ways.len() as u64) as usize];
                    let got = digest(image, at, entry, by, &mut dice);
                    if got.as_ref().ok() != Some(&entry.digest) {
                        let mut wrong = wrong.lock().expect("nothing panics under it");
                        wrong.push(format!("{} by {by:?}: {got:?}", entry.path.display()));
                    }
                }
            });
        }
    });
    wrong.into_inner().expect("nothing panics under it")
}

impl<B: Backend> Fixture<B> {
    /// A folder to mount on, and a device of the image's blob.
    pub fn prepare(&self, name: &str, delay: Duration) -> (PathBuf, Arc<LateDevice>) {
        let at = self.scratch.join(format!("{name}.mount"));
        fs::create_dir_all(&at).expect("a folder to mount on");
        let path = self.scratch.join(format!("{name}.device"));
        let device = LateDevice::new(&path, &self.image.blob, delay).expect("a device");
        (at, Arc::new(device))
    }

    async fn mount(&self, at: &Path, device: &Arc<LateDevice>) {
        let spec = MountSpec {
            metadata: self.image.metadata.clone(),
            devices: vec![Arc::clone(device) as Arc<dyn Device>],
            at: at.to_owned(),
        };
        self.backend
            .mount(spec)
            .await
            .expect("the image is mounted");
    }

    async fn all_is_right(&self, at: &Path, seed: u64, when: &str) {
        let (image, at) = (self.image.clone(), at.to_owned());
        let wrong = beside(move || read_all(&image, &at, seed, ALL_WAYS)).await;
        assert!(wrong.is_empty(), "{when}: {wrong:#?}");
    }

    /// Cold, warm, and complete after a new mount: every file reads as its source.
    pub async fn every_file_reads_as_its_source(&self, seed: u64) {
        let (at, device) = self.prepare("whole", Duration::from_millis(2));
        self.mount(&at, &device).await;
        let cold = Instant::now();
        self.all_is_right(&at, seed, "cold").await;
        let cold = cold.elapsed();
        let fetched = device.fetched.load(Ordering::Relaxed);
        assert!(fetched > 0, "nothing was fetched: who answered?");
        self.all_is_right(&at, seed + 1, "warm").await;
        println!("cold: {cold:.1?}, {fetched} groups");
        let urgent = device.urgent.load(Ordering::Relaxed);
        assert!(urgent > 0, "no fill was as urgent as a fault");
        self.backend.unmount(&at).await.expect("unmounts");
        assert!(!at.join("odd").exists(), "still mounted");

        // The same device again: what is there is not fetched again.
        self.mount(&at, &device).await;
        self.all_is_right(&at, seed + 2, "mounted again").await;
        let again = device.fetched.load(Ordering::Relaxed);
        self.backend.unmount(&at).await.expect("unmounts");
        println!("fetched again after a remount: {}", again - fetched);
    }

    /// While the origin is down reads fail, soon and never with zeros; when it is back they succeed.
    pub async fn reads_fail_while_fills_fail_and_succeed_after(&self, seed: u64) {
        let (at, device) = self.prepare("failing", Duration::from_millis(1));
        device.origin_is_down.store(true, Ordering::Relaxed);
        self.mount(&at, &device).await;
        let image = self.image.clone();
        let place = at.clone();
        let (wrong, took) = beside(move || {
            let start = Instant::now();
            let wrong = read_all(&image, &place, seed, WAYS_THAT_FAIL);
            (wrong, start.elapsed())
        })
        .await;
        let with_data = |entry: &&Entry| entry.size_bytes > 0;
        let expected = self.image.entries.iter().filter(with_data).count();
        // Small files may lie in the metadata, which is here.
        assert!(wrong.len() >= expected / 2, "{} of {expected}", wrong.len());
        for line in &wrong {
            assert!(line.contains("Err("), "wrong bytes were read: {line}");
        }
        println!("{} files failed in {took:.1?}", wrong.len());
        assert!(took < READ_MAX, "failing took {took:?}");
        device.origin_is_down.store(false, Ordering::Relaxed);
        self.all_is_right(&at, seed + 1, "when the origin is back")
            .await;
        self.backend.unmount(&at).await.expect("unmounts");
    }

    /// Unmounting under load ends in bounded time; the readers then see errors or the right bytes, and end too.
    pub async fn unmounting_under_load_ends_the_readers(&self, seed: u64) {
        for round in 0..3 {
            let (at, device) = self.prepare("leaving", Duration::from_millis(20));
            self.mount(&at, &device).await;
            let stop = Arc::new(AtomicBool::new(false));
            let readers: Vec<_> = (0..READERS as u64)
                .map(|reader| {
                    let (image, at, stop) = (self.image.clone(), at.clone(), Arc::clone(&stop));
                    tokio::task::spawn_blocking(move || {
                        let mut dice = Dice(seed ^ reader ^ (round << 32));
                        let mut reads = 0u32;
                        while !stop.load(Ordering::Relaxed) {
                            let pick = dice.below(image.entries.len() as u64) as usize;
                            let entry = &image.entries[pick];
                            match digest(&image, &at, entry, By::Read, &mut dice) {
                                Ok(got) => assert_eq!(got, entry.digest, "{entry:?}"),
                                Err(_) if !at.join("odd").exists() => return reads,
                                Err(_) => {}
                            }
                            reads += 1;
                        }
                        reads
                    })
                })
                .collect();
            let wait_ms = Dice(seed + round).below(400);
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            let unmounted = tokio::time::timeout(READ_MAX, self.backend.unmount(&at)).await;
            unmounted.expect("unmounting ends").expect("unmounts");
            stop.store(true, Ordering::Relaxed);
            for reader in readers {
                let ended = tokio::time::timeout(READ_MAX, reader).await;
                ended.expect("a reader ends").expect("no wrong bytes");
            }
        }
    }

    /// Mounting over nonsense says so and leaves nothing; unmounting what is not ours is refused.
    pub async fn what_cannot_be_mounted_leaves_nothing_behind(&self) {
        let (at, device) = self.prepare("nonsense", Duration::ZERO);
        let nonsense = self.scratch.join("nonsense.image");
        fs::write(&nonsense, vec![7; 1 << 16]).expect("a file");
        for metadata in [nonsense, self.scratch.join("missing")] {
            let spec = MountSpec {
                metadata,
                devices: vec![Arc::clone(&device) as Arc<dyn Device>],
                at: at.clone(),
            };
            self.backend.mount(spec).await.expect_err("is no image");
        }
        self.backend.unmount(&at).await.expect_err("is not mounted");
        let mounted = fs::read_to_string("/proc/self/mountinfo").expect("a list of mounts");
        assert!(!mounted.contains("nonsense"), "{mounted}");
    }
}
