//! How a task comes along: when its members will have the blob, and which lease holds the others up.

use std::time::Duration;

use pantala_wire::{BlobDigest, PieceRun};

use super::config::{ESTIMATE_SAMPLED, LEASES_COMPARED};
use super::member::MemberId;
use super::nodes::Nodes;
use super::paths::decayed;
use super::task::Task;

/// A lease whose next piece takes this many times as long as its peers' is slow.
const SLOW_FACTOR: u32 = 4;
/// And no sooner than this: a source may pause for a moment.
const SLOW_MIN: Duration = Duration::from_secs(2);
/// What a new sample weighs.
const SAMPLE_WEIGHT: f64 = 0.2;
/// In this time, a rate without new pieces falls to a half.
const RATE_HALF_LIFE: Duration = Duration::from_secs(5);

/// When a task's members will have the blob, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEstimate {
    /// The blob.
    pub digest: BlobDigest,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// Members that download it.
    pub wanted: usize,
    /// Members that hold all of it.
    pub complete: usize,
    /// Bytes that those who download it still lack, all together.
    pub missing_bytes: u64,
    /// Bytes a second that they get, all together.
    pub bytes_per_s: u64,
    /// When they will have it on average; nothing while nothing arrives.
    pub completes_in: Option<Duration>,
}

/// What is measured of a task.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Time that one leased piece takes.
    piece_time_s: Option<f64>,
    /// Pieces a second that members get.
    rate: f64,
    at: Duration,
}

impl Progress {
    /// Leased pieces came, `took` after the ones before them.
    pub(super) fn fetched(&mut self, count: u32, took: Duration) {
        let sample = took.as_secs_f64() / f64::from(count.max(1));
        let before = self.piece_time_s.unwrap_or(sample);
        self.piece_time_s = Some(before * (1.0 - SAMPLE_WEIGHT) + sample * SAMPLE_WEIGHT);
    }

    /// Members have got so many pieces.
    pub(super) fn gained(&mut self, now: Duration, count: u32) {
        let age = now.saturating_sub(self.at);
        // Between two halvings it fades evenly: one piece in each of many short times adds up to twice
        // the half-life.
        let per_piece = 0.5 / RATE_HALF_LIFE.as_secs_f64();
        self.rate = decayed(self.rate, age, RATE_HALF_LIFE) + f64::from(count) * per_piece;
        self.at = now;
    }

    fn rate(&self, now: Duration) -> f64 {
        decayed(self.rate, now.saturating_sub(self.at), RATE_HALF_LIFE)
    }

    /// How long a lease may bring nothing before others may have its rest; nothing while no lease has
    /// shown what is usual.
    fn patience(&self) -> Option<Duration> {
        let piece = Duration::try_from_secs_f64(self.piece_time_s?).ok()?;
        Some(piece.saturating_mul(SLOW_FACTOR).max(SLOW_MIN))
    }
}

impl Task {
    pub(super) fn estimate(&self, now: Duration) -> TaskEstimate {
        let all = self.members.all();
        let step = (all.len() / ESTIMATE_SAMPLED).max(1);
        let (mut missing, mut seen) = (0_u64, 0_u64);
        for member in all
            .iter()
            .step_by(step)
            .filter_map(|&id| self.members.get(id))
        {
            if member.wanted {
                missing += u64::from(self.piece_count().saturating_sub(member.held_count()));
                seen += 1;
            }
        }
        let piece_bytes = self.size_bytes / u64::from(self.piece_count().max(1));
        let wanted = self.wanted_count as u64;
        let missing = missing * wanted / seen.max(1);
        let rate = self.progress.rate(now);
        let completes_in = (rate > 0.01)
            .then(|| Duration::try_from_secs_f64(missing as f64 / rate).ok())
            .flatten();
        TaskEstimate {
            digest: self.digest,
            size_bytes: self.size_bytes,
            wanted: self.wanted_count,
            complete: self.members.complete().len(),
            missing_bytes: missing.saturating_mul(piece_bytes),
            bytes_per_s: (rate * piece_bytes as f64) as u64,
            completes_in,
        }
    }

    /// Cuts the lease that has brought nothing for longest, if it is slow against its peers, so that
    /// somebody else can have its rest: what was cut, and from whom. The piece that its holder is at
    /// stays with it: half of it may be here, and would be paid for twice.
    pub(super) fn cut_slowest(
        &mut self,
        now: Duration,
        ttl: Duration,
        nodes: &Nodes,
        asking: MemberId,
    ) -> Option<(MemberId, PieceRun)> {
        let patience = self.progress.patience()?;
        let found = self
            .expiries
            .iter()
            .take(LEASES_COMPARED)
            .find_map(|&(expires, id)| {
                let quiet = now.saturating_sub(expires.saturating_sub(ttl));
                let lease = self.leases.get(&id)?;
                let holder = self.members.get(lease.holder)?;
                // A node without a session could not be told.
                let is_live = nodes
                    .get(holder.slot)
                    .is_some_and(|node| node.away_until.is_none());
                let is_slow = quiet >= patience && lease.remaining > 1;
                (is_slow && is_live && lease.holder != asking).then_some(id)
            });
        let id = found?;
        let lease = *self.leases.get(&id)?;
        let first = lease
            .run
            .range()
            .filter(|&piece| self.is_leased_by(piece, id))
            .nth(1)?;
        // Pieces that came out of turn, or were given back, may be another's by now.
        let count = (first..lease.run.range().end)
            .take_while(|&piece| self.is_leased_by(piece, id))
            .count() as u32;
        let cut = PieceRun { first, count };
        self.release(lease.holder, &[cut]);
        Some((lease.holder, cut))
    }
}
