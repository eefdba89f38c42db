//! A mount that was lazy and is complete, against the same two files mounted by the kernel alone.

use std::collections::BTreeMap;
use std::fs::File;

use anyhow::Result;

use super::images::SEQUENTIAL;
use super::{SEED, Scene, blocking, read};
use crate::perf::figures::{Figures, median};
use crate::rig::lazy::MountPoint;

/// Times that the file is read from start to end in a round, by each side in turn; the median counts.
const PASSES: u32 = 7;
/// Random reads of a round: kind, bytes of each, and how many at most.
const RANDOM: [(&str, usize, usize); 2] = [
    ("random_64k", 64 << 10, 2_000),
    ("random_4k", 4 << 10, 20_000),
];

/// Who provides the file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Lazy,
    Local,
}

/// Rates of one round: each kind of reading, lazy and local.
type Rates = BTreeMap<&'static str, (f64, f64)>;

/// Both sides, and what they have done.
pub(super) struct Part {
    lazy: File,
    local: File,
    _local_mount: MountPoint,
    samples: BTreeMap<&'static str, Vec<(f64, f64)>>,
}

impl Part {
    pub(super) fn new(scene: &Scene<'_>, held: &MountPoint) -> Result<Self> {
        let local_mount = MountPoint::new(scene.rig)?;
        let image = &scene.images.files;
        let [metadata, data] = [0, 1].map(|layer| image.path_of(&image.layers[layer]));
        local_mount.mount_files(&metadata, &data)?;
        Ok(Self {
            lazy: read::open(&held.0.join(SEQUENTIAL))?,
            local: read::open(&local_mount.0.join(SEQUENTIAL))?,
            _local_mount: local_mount,
            samples: BTreeMap::new(),
        })
    }

    pub(super) async fn round(&mut self, round: u32, counts: bool) -> Result<()> {
        let (lazy, local) = (self.lazy.try_clone()?, self.local.try_clone()?);
        let rates = blocking(move || rates(&lazy, &local, round)).await?;
        for (kind, (lazy, local)) in rates {
            println!("round {round}  complete {kind:<12} lazy {lazy:>10.0}  local {local:>10.0}");
            if counts {
                self.samples.entry(kind).or_default().push((lazy, local));
            }
        }
        Ok(())
    }

    pub(super) fn report(&self, figures: &mut Figures) {
        for (kind, rounds) in &self.samples {
            let unit = if kind.starts_with("random") {
                "per_s"
            } else {
                "mib_per_s"
            };
            let mut set = |name: String, of: fn(&(f64, f64)) -> f64| {
                figures.set_median(&name, &rounds.iter().map(of).collect::<Vec<_>>());
            };
            set(format!("lazy_complete_{kind}_{unit}"), |pair| pair.0);
            set(format!("local_{kind}_{unit}"), |pair| pair.1);
            set(format!("lazy_complete_{kind}_vs_local"), |pair| {
                pair.0 / pair.1
            });
        }
        figures.note(
            "complete: a mount that was filled in the background and unmarked, against the same metadata and data as plain files mounted without a node. read, random_64k, random_4k: the pages of the mounted file are dropped before, those of the files behind it are in the page cache, for both sides alike; no disk is measured. cached_read: the pages of the mounted file are in the page cache too. A round is the median of passes in turn, ratios are medians of the ratios within each round",
        );
    }
}

/// One round: the sides strictly in turn, another first in each round. A pass that follows one of its own side
/// finds other free pages than one that follows the other's, so both sides' pages are dropped before each.
fn rates(lazy: &File, local: &File, round: u32) -> Result<Rates> {
    let file = |side| if side == Side::Lazy { lazy } else { local };
    let mut order = [Side::Lazy, Side::Local];
    if round % 2 == 1 {
        order.reverse();
    }
    let forget = || read::forget(lazy).and_then(|()| read::forget(local));
    let mut rates = Rates::new();
    for (kind, cached) in [("read", false), ("cached_read", true)] {
        let mut passes = (Vec::new(), Vec::new());
        for _ in 0..PASSES {
            for side in order {
                if !cached {
                    forget()?;
                }
                of(&mut passes, side).push(read::sequential(file(side))?);
            }
        }
        rates.insert(kind, (median(&passes.0), median(&passes.1)));
        // What the next kind finds cached.
        read::whole(lazy).and(read::whole(local))?;
    }
    let bytes = lazy.metadata()?.len();
    for (kind, size, count) in RANDOM {
        let offsets = read::places(bytes, size as u64, count, SEED + u64::from(round));
        let mut pair = (0.0, 0.0);
        for side in order {
            forget()?;
            *of(&mut pair, side) = read::rate(&read::random(file(side), size, &offsets)?);
        }
        rates.insert(kind, pair);
    }
    Ok(rates)
}

fn of<T>(pair: &mut (T, T), side: Side) -> &mut T {
    match side {
        Side::Lazy => &mut pair.0,
        Side::Local => &mut pair.1,
    }
}
