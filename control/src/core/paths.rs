//! What a parent is predicted to deliver to a child: what its path has delivered lately, within the
//! share of the parent's uplink that is left for one more child. Where nothing is measured, distance
//! stands in.
//!
//! Nodes report what they got from each parent, and only reports on parents that control named to them
//! count. All estimates fade to the prior: what was slow an hour ago is worth another try. The
//! arithmetic is plain, so that it gives the same on every machine.

use std::time::Duration;

use super::config::{
    CHILD_SHARE_BYTES_PER_S, CHILDREN_HARD_MAX, CHILDREN_MIN, CHILDREN_PER_NODE_MAX,
    CHILDREN_SOFT_MAX, HARD_FACTOR, PATH_BUSY_MAX, PATH_RATE_MAX, PATHS_PER_NODE_MAX,
    UPLINK_MIN_BYTES_PER_S, UPLINK_PRIOR_BYTES_PER_S,
};
use super::message::PathReport;
use super::nodes::{Distance, Node, Nodes, Slot};
use super::standing::Standing;

/// In this time, what was measured loses half of its weight against the prior.
const PATH_HALF_LIFE: Duration = Duration::from_secs(60);
/// How long a measurement may stand beside others for a comparison.
const COMPARABLE: Duration = Duration::from_secs(30);
/// Paths that must have been measured lately before one of them counts as slow against the others.
const COMPARED_MIN: usize = 3;
/// Reports on one path that come sooner after each other than this say nothing new; nodes take four times
/// as long.
const REPORT_MIN: Duration = Duration::from_millis(500);
/// What a new sample weighs against the estimate before it.
const SAMPLE_WEIGHT: f64 = 0.5;
/// How long an uplink is watched for one sample of it.
const UPLINK_WINDOW: Duration = Duration::from_secs(2);
/// A child that gets this much more elsewhere could take more from this parent: the parent's uplink
/// is what limits.
const LIMITED_RATIO: f64 = 0.5;
/// How much an uplink that limits nobody is thought to grow in one window.
const UPLINK_GROWTH: f64 = 1.1;
/// What is expected of a path that nobody has measured, by distance, as a part of the uplink's share:
/// links between racks and zones are shared by many.
const PRIORS: [(Distance, f64); 4] = [
    (Distance::Host, 1.0),
    (Distance::Rack, 1.0),
    (Distance::Zone, 0.7),
    (Distance::Far, 0.4),
];

/// Halves `value` for every `half_life` in `age`; between two halvings it goes down evenly.
pub(super) fn decayed(value: f64, age: Duration, half_life: Duration) -> f64 {
    let halves = (age.as_secs_f64() / half_life.as_secs_f64()).min(60.0);
    let whole = halves as u32;
    value / (1_u64 << whole) as f64 * (1.0 - (halves - f64::from(whole)) / 2.0)
}

/// A report that cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Absurd {
    /// Faster than any network, or more time than there was.
    Speed,
    /// Again, before there can be anything new.
    TooOften,
    /// Control never named that node to the reporter as a parent.
    Stranger,
}

/// What one parent delivers to one child.
#[derive(Debug, Clone, Copy)]
struct Path {
    /// The parent's serial number.
    parent: u32,
    /// Bytes a second; nothing while not measured.
    rate: Option<f32>,
    /// When it was measured, or named, in tenths of a second.
    at: u32,
}

fn tenths(time: Duration) -> u32 {
    (time.as_millis() / 100) as u32
}

impl Path {
    fn age(&self, now: Duration) -> Duration {
        Duration::from_millis(u64::from(tenths(now).saturating_sub(self.at)) * 100)
    }
}

/// What a node's parents deliver to it; the one that was heard of longest ago makes room.
#[derive(Debug, Default)]
pub(super) struct Paths(Vec<Path>);

impl Paths {
    /// Control has named this parent.
    pub(super) fn named(&mut self, parent: u32, now: Duration) {
        if self.0.iter().any(|path| path.parent == parent) {
            return;
        }
        let path = Path {
            parent,
            rate: None,
            at: tenths(now),
        };
        if self.0.len() < PATHS_PER_NODE_MAX {
            self.0.push(path);
        } else if let Some(oldest) = self.0.iter_mut().min_by_key(|path| path.at) {
            *oldest = path;
        }
    }

    pub(super) fn knows(&self, parent: u32) -> bool {
        self.0.iter().any(|path| path.parent == parent)
    }

    fn rate(&self, parent: u32, now: Duration) -> Option<(f64, Duration)> {
        let path = self.0.iter().find(|path| path.parent == parent)?;
        path.rate.map(|rate| (f64::from(rate), path.age(now)))
    }

    /// Takes a sample; the estimate with it.
    fn measure(&mut self, parent: u32, sample: f64, now: Duration) -> Option<f64> {
        let path = self.0.iter_mut().find(|path| path.parent == parent)?;
        let rate = match path.rate {
            Some(before) if path.age(now) < COMPARABLE => {
                f64::from(before) * (1.0 - SAMPLE_WEIGHT) + sample * SAMPLE_WEIGHT
            }
            _ => sample,
        };
        path.rate = Some(rate as f32);
        path.at = tenths(now);
        Some(rate)
    }

    /// The median of what was measured lately, where that is enough to say something.
    fn median(&self, now: Duration) -> Option<f64> {
        let mut rates: Vec<f32> = self
            .0
            .iter()
            .filter(|path| path.age(now) < COMPARABLE)
            .filter_map(|path| path.rate)
            .collect();
        rates.sort_by(f32::total_cmp);
        (rates.len() >= COMPARED_MIN).then(|| f64::from(rates[rates.len() / 2]))
    }
}

/// What a node delivers to all of its children together.
#[derive(Debug)]
pub(super) struct Delivery {
    /// What its operator says, bytes a second.
    configured: Option<f64>,
    /// What it seems to deliver at most, bytes a second.
    uplink: f64,
    window_from: Duration,
    window_bytes: u64,
    /// Reports in the window, and those of children that get more elsewhere.
    reports: u32,
    limited: u32,
    pub(super) standing: Standing,
}

impl Delivery {
    pub(super) fn new(configured_bytes_per_s: Option<u64>) -> Self {
        let mut delivery = Self {
            configured: None,
            uplink: UPLINK_PRIOR_BYTES_PER_S,
            window_from: Duration::ZERO,
            window_bytes: 0,
            reports: 0,
            limited: 0,
            standing: Standing::default(),
        };
        delivery.configure(configured_bytes_per_s);
        delivery
    }

    pub(super) fn configure(&mut self, bytes_per_s: Option<u64>) {
        let configured =
            bytes_per_s.map(|rate| (rate as f64).clamp(UPLINK_MIN_BYTES_PER_S, PATH_RATE_MAX));
        if configured != self.configured {
            self.configured = configured;
            self.uplink = configured.unwrap_or(UPLINK_PRIOR_BYTES_PER_S);
        }
    }

    /// Bytes a second that it can deliver, as far as is known.
    pub(super) fn uplink(&self) -> f64 {
        self.uplink
    }

    /// Children in one task that it takes readily.
    pub(super) fn children_soft(&self, now: Duration) -> usize {
        if let Some(max) = self.standing.children_max(now) {
            return max;
        }
        let fair = (self.uplink / CHILD_SHARE_BYTES_PER_S) as usize;
        fair.clamp(CHILDREN_MIN, CHILDREN_SOFT_MAX)
    }

    /// Children in one task that it takes for nodes that would else have too few parents.
    pub(super) fn children_hard(&self, now: Duration) -> usize {
        match self.standing.children_max(now) {
            Some(max) => max,
            None => (self.children_soft(now) * HARD_FACTOR).min(CHILDREN_HARD_MAX),
        }
    }

    /// A child got `bytes`; `is_limited`: it gets more from others.
    fn delivered(&mut self, now: Duration, bytes: u64, is_limited: bool) {
        let open_for = now.saturating_sub(self.window_from);
        if open_for >= UPLINK_WINDOW {
            // A window that nobody reported in says nothing.
            if open_for < UPLINK_WINDOW * 2 {
                self.learn(self.window_bytes as f64 / open_for.as_secs_f64());
            }
            self.window_from = now;
            self.window_bytes = 0;
            self.reports = 0;
            self.limited = 0;
        }
        self.window_bytes = self.window_bytes.saturating_add(bytes);
        self.reports += 1;
        self.limited += u32::from(is_limited);
    }

    fn learn(&mut self, sample: f64) {
        let prior = self.configured.unwrap_or(UPLINK_PRIOR_BYTES_PER_S);
        let most = self.configured.unwrap_or(PATH_RATE_MAX);
        self.uplink = if self.reports >= 2 && self.limited * 2 > self.reports {
            self.uplink * (1.0 - SAMPLE_WEIGHT) + sample * SAMPLE_WEIGHT
        } else {
            sample.max((self.uplink * UPLINK_GROWTH).min(prior.max(self.uplink)))
        }
        .clamp(UPLINK_MIN_BYTES_PER_S, most);
    }
}

impl Node {
    /// Whether it may get another child at all.
    pub(super) fn has_room(&self) -> bool {
        (self.child_count as usize) < CHILDREN_PER_NODE_MAX
    }
}

impl Nodes {
    /// Bytes a second that `parent` is predicted to deliver to `child`; `is_linked`: the child is
    /// already one of those that share its uplink.
    pub(super) fn predicted(
        &self,
        now: Duration,
        child: &Node,
        parent: Slot,
        is_linked: bool,
    ) -> f64 {
        let Some(source) = self.get(parent) else {
            return 0.0;
        };
        let others = source.child_count.saturating_sub(u32::from(is_linked));
        let share = source.delivery.uplink() / f64::from(others + 1);
        let distance = child.place.distance(&source.place);
        let factor = PRIORS
            .iter()
            .find(|(other, _)| *other == distance)
            .map_or(1.0, |&(_, factor)| factor);
        let prior = share * factor;
        let expected = match child.paths.rate(source.serial, now) {
            Some((rate, age)) => {
                let weight = decayed(1.0, age, PATH_HALF_LIFE);
                let measured = if is_linked { rate } else { rate.min(share) };
                measured * weight + prior * (1.0 - weight)
            }
            None => prior,
        };
        expected * source.delivery.standing.trust(now)
    }

    /// Takes the speed that `child` says it got from `parent`, where the report can be true.
    pub(super) fn measure(
        &mut self,
        now: Duration,
        child: Slot,
        parent: Slot,
        report: &PathReport,
    ) -> Result<(), Absurd> {
        let bytes = report.bytes as f64;
        let busy_s = report.busy.as_secs_f64();
        if report.busy > PATH_BUSY_MAX || bytes > PATH_RATE_MAX * busy_s {
            return Err(Absurd::Speed);
        }
        let serial = self.get(parent).ok_or(Absurd::Stranger)?.serial;
        let own = self.get_mut(child).map(|node| &mut node.paths);
        let own = own.filter(|paths| paths.knows(serial));
        let own = own.ok_or(Absurd::Stranger)?;
        if own
            .rate(serial, now)
            .is_some_and(|(_, age)| age < REPORT_MIN)
        {
            return Err(Absurd::TooOften);
        }
        if !report.busy.is_zero() {
            own.measure(serial, bytes / busy_s, now);
        }
        Ok(())
    }

    /// The middle one of the speeds at which `child` is served, where enough of them are known.
    pub(super) fn median(&self, now: Duration, child: Slot) -> Option<f64> {
        self.get(child)?.paths.median(now)
    }

    /// Compares what was measured; true if the parent is to be demoted now.
    pub(super) fn judge(
        &mut self,
        now: Duration,
        child: Slot,
        parent: Slot,
        report: &PathReport,
        median: Option<f64>,
    ) -> bool {
        let serial = self.get(parent).map(|node| node.serial);
        let rate = serial
            .zip(self.get(child))
            .and_then(|(serial, node)| node.paths.rate(serial, now))
            .map(|(rate, _)| rate)
            .filter(|_| !report.busy.is_zero());
        let ratio = median
            .zip(rate)
            .map(|(median, rate)| rate / median.max(1.0));
        let Some(source) = self.get_mut(parent) else {
            return false;
        };
        let fair = source.delivery.uplink() / f64::from(source.child_count.max(1));
        let is_limited = ratio.is_some_and(|ratio| ratio < LIMITED_RATIO);
        source.delivery.delivered(now, report.bytes, is_limited);
        // Slow against the child's other parents, and against what its own uplink would give.
        let against_fair = rate.map_or(1.0, |rate| rate / fair.max(1.0));
        let standing = &mut source.delivery.standing;
        let slow =
            ratio.is_some_and(|ratio| standing.compared(now, child, ratio.max(against_fair)));
        let failing = report.failures > 0 && standing.failed(now, child);
        slow || failing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_loses_half_of_its_weight_in_each_half_life() {
        let minute = Duration::from_secs(60);
        assert_eq!(decayed(8.0, Duration::ZERO, minute), 8.0);
        assert_eq!(decayed(8.0, minute / 2, minute), 6.0);
        assert_eq!(decayed(8.0, minute, minute), 4.0);
        assert_eq!(decayed(8.0, minute * 3, minute), 1.0);
        assert!(decayed(8.0, minute * 100_000, minute) < 1e-9);
    }

    #[test]
    fn the_limit_of_children_follows_the_uplink() {
        let now = Duration::ZERO;
        let gbit = 125_000_000;
        let limits = |uplink| {
            let delivery = Delivery::new(uplink);
            (delivery.children_soft(now), delivery.children_hard(now))
        };
        assert_eq!(limits(Some(gbit)), (2, 8));
        assert_eq!(limits(Some(10 * gbit)), (16, 64));
        assert_eq!(limits(None), (16, 64));
        assert_eq!(
            limits(Some(100 * gbit)),
            (CHILDREN_SOFT_MAX, CHILDREN_HARD_MAX)
        );
        assert_eq!(
            limits(Some(u64::MAX)),
            (CHILDREN_SOFT_MAX, CHILDREN_HARD_MAX)
        );
        assert_eq!(limits(Some(0)), (2, 8));
    }

    #[test]
    fn an_uplink_that_limits_its_children_is_learned_and_recovers() {
        let mut delivery = Delivery::new(None);
        let mut now = Duration::ZERO;
        for _ in 0..40 {
            for _ in 0..4 {
                delivery.delivered(now, 31_250_000 / 2, true);
            }
            now += Duration::from_millis(500);
        }
        // Four children, each with a quarter of 1 Gbit/s.
        assert!(
            (delivery.uplink() - 125e6).abs() < 15e6,
            "{}",
            delivery.uplink()
        );
        for _ in 0..400 {
            delivery.delivered(now, 1, false);
            now += Duration::from_millis(500);
        }
        assert_eq!(delivery.uplink(), UPLINK_PRIOR_BYTES_PER_S);
    }
}
