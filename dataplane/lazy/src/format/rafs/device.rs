//! One blob of a nydus image as a device: a sparse file that fills with the uncompressed chunks.
//!
//! The shell around [`ChunkMap`] and [`Decoder`]: it fetches what is missing, verifies it, writes it, and
//! only then says that it is there. A chunk is fetched once, however many fills want it, unless one of
//! them is more urgent than the fetch under way. What it remembers over a restart is what [`RafsDevice::persist`]
//! has put on the disk. It ends when its last clone is dropped; fetches under way finish by themselves.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use pantala_wire::{ByteRange, Priority};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::decode::Decoder;
use super::map::ChunkMap;
use super::record::{ChunkBits, Record};
use crate::device::{Device, FillError};

/// Bytes of a blob fetched in one request: enough that a round trip costs little next to them.
const RUN_LEN_MAX: u64 = 1 << 20;
/// Bytes between two chunks that are fetched along rather than asked around.
const RUN_GAP_MAX: u64 = 16 << 10;
/// Requests that one fill has under way; a longer fill goes on as they end.
const RUNS_PER_FILL_MAX: usize = 16;
/// Requests under way for readers that wait. Each holds up to a chunk and what it unpacks to.
const URGENT_RUNS_MAX: usize = 64;
/// Requests under way that nobody waits for: they must not take the memory of those that somebody does.
const BACKGROUND_RUNS_MAX: usize = 8;
/// Bytes that may be fetched again after a crash.
const UNSAFE_BYTES_MAX: u64 = 64 << 20;

/// Where the bytes of a blob come from.
pub trait BlobRanges: Send + Sync + 'static {
    /// Exactly the bytes `range` of the blob. Ends in bounded time.
    fn read(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<Bytes, FillError>>;
}

/// A device behind a sparse file.
#[derive(Clone)]
pub struct RafsDevice(Arc<Inner>);

struct Inner {
    map: ChunkMap,
    path: PathBuf,
    file: File,
    record: Record,
    blob: Arc<dyn BlobRanges>,
    runtime: Handle,
    urgent: Semaphore,
    background: Semaphore,
    state: Mutex<State>,
    /// Held while the record is written, so that an older one never replaces a newer.
    persisting: Mutex<()>,
}

struct State {
    present: ChunkBits,
    flights: HashMap<usize, Flight>,
    flight_count: u64,
    /// Bytes written since the record was.
    unsafe_bytes: u64,
}

/// Chunks on their way.
#[derive(Clone)]
struct Flight {
    id: u64,
    urgency: Priority,
    landed: Shared<BoxFuture<'static, Result<(), FillError>>>,
}

/// Chunks that one request brings.
struct Run {
    packed: ByteRange,
    chunks: Vec<usize>,
}

impl RafsDevice {
    /// Opens the device `name` below `dir`, or makes an empty one. The files are `NAME.data`, as long as the device, and
    /// `NAME.chunks`. Nobody else may have it open.
    ///
    /// # Errors
    /// Where the disk fails.
    pub fn open(
        dir: &Path,
        name: &str,
        map: ChunkMap,
        blob: Arc<dyn BlobRanges>,
        runtime: Handle,
    ) -> Result<Self, FillError> {
        let path = dir.join(format!("{name}.data"));
        let fail = |e: std::io::Error| disk(&path, &e);
        let record = Record::new(dir.join(format!("{name}.chunks")), map.fingerprint());
        let (file, is_new) = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => (file, false),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // A record of a file that is gone must not speak for the new one.
                record.remove().map_err(fail)?;
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&path)
                    .map_err(fail)?;
                (file, true)
            }
            Err(e) => return Err(fail(e)),
        };
        let len = file.metadata().map_err(fail)?.len();
        let present = match !is_new && len == map.device_len() {
            true => record.read(&file, map.chunks().len()).map_err(fail)?,
            false => {
                record.remove().map_err(fail)?;
                file.set_len(0)
                    .and_then(|()| file.set_len(map.device_len()))
                    .map_err(fail)?;
                ChunkBits::none(map.chunks().len())
            }
        };
        Ok(Self(Arc::new(Inner {
            state: Mutex::new(State {
                present,
                flights: HashMap::new(),
                flight_count: 0,
                unsafe_bytes: 0,
            }),
            map,
            path,
            file,
            record,
            blob,
            runtime,
            urgent: Semaphore::new(URGENT_RUNS_MAX),
            background: Semaphore::new(BACKGROUND_RUNS_MAX),
            persisting: Mutex::new(()),
        })))
    }

    /// Puts on the disk what is there, so that a crash does not cost it. Blocks.
    ///
    /// # Errors
    /// Where the disk fails; what was not put there is fetched again after a crash.
    pub fn persist(&self) -> Result<(), FillError> {
        self.0.persist()
    }

    /// Bytes of the device that are present, without padding.
    pub fn present_bytes(&self) -> u64 {
        let state = self.0.state.lock();
        let chunks = self.0.map.chunks().iter().enumerate();
        chunks
            .filter(|(index, _)| state.present.has(*index))
            .map(|(_, chunk)| chunk.unpacked.len())
            .sum()
    }

    /// The chunks of the blob.
    pub fn map(&self) -> &ChunkMap {
        &self.0.map
    }
}

impl Device for RafsDevice {
    fn size_bytes(&self) -> u64 {
        self.0.map.device_len()
    }
    fn path(&self) -> &Path {
        &self.0.path
    }
    fn file(&self) -> &File {
        &self.0.file
    }
    fn is_complete(&self) -> bool {
        self.0.state.lock().present.missing() == 0
    }

    // Bytes between chunks need nothing: they are no file's, or the image would have been refused.
    fn fill(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<(), FillError>> {
        let size_bytes = self.size_bytes();
        async move {
            if range.end() > size_bytes {
                return Err(FillError::OutOfRange {
                    first: range.start(),
                    count: range.len(),
                    size_bytes,
                });
            }
            let mut chunks = self.0.map.chunks_of(range);
            while !chunks.is_empty() {
                let (flights, next) = self.0.start(chunks.clone(), urgency);
                // All are waited for: the caller may try again at once where one has failed.
                let landed = futures_util::future::join_all(flights).await;
                landed.into_iter().collect::<Result<(), _>>()?;
                chunks.start = next;
            }
            Ok(())
        }
        .boxed()
    }
}

type Landed = Shared<BoxFuture<'static, Result<(), FillError>>>;

impl Inner {
    /// Starts what is missing of `chunks`, as far as one fill may at a time. Returns what to wait for, and
    /// the chunk to go on with.
    fn start(
        self: &Arc<Self>,
        chunks: std::ops::Range<usize>,
        urgency: Priority,
    ) -> (Vec<Landed>, usize) {
        let mut state = self.state.lock();
        let mut joined: HashMap<u64, Landed> = HashMap::new();
        let mut runs: Vec<Run> = Vec::new();
        let mut next = chunks.end;
        for index in chunks {
            if state.present.has(index) || runs.iter().rev().any(|run| run.chunks.contains(&index))
            {
                continue;
            }
            match state.flights.get(&index) {
                // `Priority` orders the urgent first.
                Some(flight) if flight.urgency <= urgency => {
                    joined.insert(flight.id, flight.landed.clone());
                }
                _ if runs.len() + joined.len() >= RUNS_PER_FILL_MAX
                    && !self.extends(runs.last(), index) =>
                {
                    next = index;
                    break;
                }
                _ => self.add_to(&mut runs, index, &state.present),
            }
        }
        let started = runs
            .into_iter()
            .map(|run| self.launch(&mut state, run, urgency));
        let flights = started
            .collect::<Vec<_>>()
            .into_iter()
            .chain(joined.into_values());
        (flights.collect(), next)
    }

    /// True where the chunk can be fetched with the run.
    fn extends(&self, run: Option<&Run>, index: usize) -> bool {
        let packed = self.map.chunks()[index].packed;
        run.is_some_and(|run| {
            packed == run.packed
                || (packed.start() >= run.packed.end()
                    && packed.start() - run.packed.end() <= RUN_GAP_MAX
                    && packed.end() - run.packed.start() <= RUN_LEN_MAX)
        })
    }

    fn add_to(&self, runs: &mut Vec<Run>, index: usize, present: &ChunkBits) {
        let chunks = self.map.chunks();
        let packed = chunks[index].packed;
        // Whoever fetches one chunk of a batch has them all.
        let siblings = |other: &usize| chunks[*other].packed == packed && !present.has(*other);
        let before = (0..index)
            .rev()
            .take_while(|other| chunks[*other].packed == packed);
        let after = (index + 1..chunks.len()).take_while(|other| chunks[*other].packed == packed);
        let family = before.chain(after).filter(siblings).chain([index]);
        match runs.last_mut() {
            Some(run) if self.extends(Some(run), index) => {
                run.chunks.extend(family);
                run.packed = ByteRange::new(run.packed.start(), packed.end()).unwrap_or(packed);
            }
            _ => runs.push(Run {
                packed,
                chunks: family.collect(),
            }),
        }
    }

    fn launch(self: &Arc<Self>, state: &mut State, run: Run, urgency: Priority) -> Landed {
        let id = state.flight_count;
        state.flight_count += 1;
        let landing = Landing {
            inner: self.clone(),
            id,
            chunks: run.chunks.clone(),
        };
        let inner = self.clone();
        let what = format!("{:?} of {}", run.packed, self.path.display());
        let chunks = run.chunks.clone();
        let task = self.runtime.spawn(async move {
            let _landing = landing;
            inner.fly(run, urgency).await
        });
        let landed = async move {
            // A task is cancelled only with its runtime.
            task.await.unwrap_or_else(|e| {
                Err(FillError::Unavailable {
                    what,
                    why: format!("the node is shutting down ({e})"),
                })
            })
        }
        .boxed()
        .shared();
        for chunk in chunks {
            let flight = Flight {
                id,
                urgency,
                landed: landed.clone(),
            };
            state.flights.insert(chunk, flight);
        }
        landed
    }

    async fn fly(self: Arc<Self>, run: Run, urgency: Priority) -> Result<(), FillError> {
        let lanes = match urgency {
            Priority::Fault | Priority::Client => &self.urgent,
            Priority::Bulk | Priority::Prefetch => &self.background,
        };
        let Ok(_permit) = lanes.acquire().await else {
            unreachable!("nobody closes these semaphores");
        };
        let bytes = self.blob.read(run.packed, urgency).await?;
        if bytes.len() as u64 != run.packed.len() {
            return Err(FillError::Unavailable {
                what: self.name(run.packed),
                why: format!("{} bytes came", bytes.len()),
            });
        }
        let inner = self.clone();
        let what = self.name(run.packed);
        let stored = self
            .runtime
            .spawn_blocking(move || inner.store(&run, &bytes))
            .await;
        stored.unwrap_or_else(|e| {
            Err(FillError::Disk {
                what,
                why: e.to_string(),
            })
        })
    }

    /// Unpacks, verifies and writes each chunk of a run. One that is wrong does not cost the others.
    fn store(&self, run: &Run, bytes: &[u8]) -> Result<(), FillError> {
        let mut decoder = Decoder::new(self.map.compressor(), self.map.digester());
        let mut result = Ok(());
        for &index in &run.chunks {
            let chunk = &self.map.chunks()[index];
            let start = (chunk.packed.start() - run.packed.start()) as usize;
            let packed = &bytes[start..start + chunk.packed.len() as usize];
            let written = match decoder.decode(chunk, packed) {
                Err(e) => Err(FillError::Corrupt {
                    what: self.name(chunk.unpacked),
                    why: e.to_string(),
                }),
                Ok(unpacked) => self
                    .file
                    .write_all_at(&unpacked, chunk.unpacked.start())
                    .map_err(|e| disk(&self.path, &e)),
            };
            match written {
                Ok(()) => {
                    let mut state = self.state.lock();
                    state.present.set(index);
                    state.unsafe_bytes += chunk.unpacked.len();
                }
                Err(e) => result = result.and(Err(e)),
            }
        }
        let is_time = {
            let state = self.state.lock();
            state.unsafe_bytes >= UNSAFE_BYTES_MAX
                || (state.present.missing() == 0 && state.unsafe_bytes > 0)
        };
        match is_time {
            true => result.and(self.persist()),
            false => result,
        }
    }

    fn persist(&self) -> Result<(), FillError> {
        let _one_at_a_time = self.persisting.lock();
        let (present, unsafe_bytes) = {
            let mut state = self.state.lock();
            (
                state.present.clone(),
                std::mem::take(&mut state.unsafe_bytes),
            )
        };
        if unsafe_bytes == 0 {
            return Ok(());
        }
        // The data first: a bit on the disk must never be ahead of it.
        let written = self
            .file
            .sync_data()
            .and_then(|()| self.record.write(&self.file, &present));
        written.map_err(|e| {
            self.state.lock().unsafe_bytes += unsafe_bytes;
            disk(&self.path, &e)
        })
    }

    fn name(&self, range: ByteRange) -> String {
        format!("{range:?} of {}", self.path.display())
    }
}

/// Takes chunks off the list of those on their way, however their flight ends.
struct Landing {
    inner: Arc<Inner>,
    id: u64,
    chunks: Vec<usize>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock();
        for chunk in &self.chunks {
            // A more urgent flight may have taken its place.
            if state
                .flights
                .get(chunk)
                .is_some_and(|flight| flight.id == self.id)
            {
                state.flights.remove(chunk);
            }
        }
    }
}

fn disk(path: &Path, error: &std::io::Error) -> FillError {
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => ": free some space on its file system",
        _ => "",
    };
    FillError::Disk {
        what: path.display().to_string(),
        why: format!("{error}{hint}"),
    }
}
