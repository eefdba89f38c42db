//! What this node gets from each parent, summed up for control.
//!
//! Speed is measured over the time in which at least one request to the parent is under way, so that
//! requests side by side are not taken for slow ones.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pantala_control::PathReport;
use pantala_control::core::config::PATHS_PER_REPORT_MAX;
use pantala_wire::NodeId;
use parking_lot::Mutex;

/// How often control hears of it: soon enough to leave a slow parent in mid-transfer, and seldom enough for
/// a control of 100,000 nodes that all download.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// Parents that are measured at a time: far more than the downloads of a node have.
const PATHS_MAX: usize = 1024;

#[derive(Debug, Default)]
struct Path {
    bytes: u64,
    busy: Duration,
    /// As `busy`, but not taken by reports.
    busy_in_all: Duration,
    failures: u32,
    open: u32,
    busy_since: Option<Instant>,
}

impl Path {
    /// Moves the time until now into the sum.
    fn settle(&mut self, now: Instant) {
        if let Some(since) = self.busy_since.take() {
            let busy = now.saturating_duration_since(since);
            self.busy += busy;
            self.busy_in_all += busy;
        }
        if self.open > 0 {
            self.busy_since = Some(now);
        }
    }
}

/// The measured paths from parents to this node.
#[derive(Debug, Default)]
pub struct PathMeter(Mutex<HashMap<NodeId, Path>>);

/// A request that is under way; it ends when this is dropped.
#[derive(Debug)]
pub struct Asking<'a> {
    meter: &'a PathMeter,
    parent: NodeId,
}

impl PathMeter {
    /// A request to `parent` begins.
    pub fn ask(&self, parent: NodeId) -> Asking<'_> {
        let now = Instant::now();
        self.change(parent, |path| {
            path.settle(now);
            path.open += 1;
            path.settle(now);
        });
        Asking {
            meter: self,
            parent,
        }
    }

    /// `parent` has delivered verified bytes.
    pub fn received(&self, parent: NodeId, bytes: u64) {
        self.change(parent, |path| path.bytes += bytes);
    }

    /// `parent` has failed a request.
    pub fn failed(&self, parent: NodeId) {
        self.change(parent, |path| {
            path.failures = path.failures.saturating_add(1);
        });
    }

    /// How long requests to `parent` have been under way in all; less than before if it was forgotten.
    pub fn busy_in_all(&self, parent: &NodeId) -> Duration {
        let mut paths = self.0.lock();
        paths.get_mut(parent).map_or(Duration::ZERO, |path| {
            path.settle(Instant::now());
            path.busy_in_all
        })
    }

    fn change(&self, parent: NodeId, change: impl FnOnce(&mut Path)) {
        let mut paths = self.0.lock();
        if paths.len() < PATHS_MAX || paths.contains_key(&parent) {
            change(paths.entry(parent).or_default());
        }
    }

    /// What there is to say since the last time, in reports as large as control takes them. `deliverable` says
    /// how many bytes a second a parent is measured to deliver, where it is; the time that its bytes would take at
    /// that rate then stands for the time that was waited for them, which holds other waits too.
    pub fn take(&self, deliverable: impl Fn(&NodeId) -> Option<f64>) -> Vec<Vec<PathReport>> {
        let now = Instant::now();
        let mut paths = self.0.lock();
        let mut reports: Vec<PathReport> = Vec::new();
        for (&node, path) in paths.iter_mut() {
            path.settle(now);
            let bytes = std::mem::take(&mut path.bytes);
            let waited = std::mem::take(&mut path.busy);
            let busy = deliverable(&node)
                .filter(|_| bytes > 0)
                .map_or(waited, |rate| {
                    Duration::from_secs_f64(bytes as f64 / rate.max(1.0)).min(waited)
                });
            let report = PathReport {
                node,
                bytes,
                busy,
                failures: std::mem::take(&mut path.failures),
            };
            if !report.busy.is_zero() || report.failures > 0 {
                reports.push(report);
            }
        }
        paths.retain(|_, path| path.open > 0);
        reports.sort_unstable_by_key(|report| report.node);
        let batches = reports.chunks(PATHS_PER_REPORT_MAX);
        batches.map(<[PathReport]>::to_vec).collect()
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        self.meter.change(self.parent, |path| {
            path.settle(now);
            path.open = path.open.saturating_sub(1);
            path.settle(now);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_side_by_side_count_their_time_once_and_silence_is_not_reported() {
        let meter = PathMeter::default();
        let (parent, other) = (NodeId::new([1; 32]), NodeId::new([2; 32]));
        let started = Instant::now();
        let asking = [meter.ask(parent), meter.ask(parent), meter.ask(parent)];
        std::thread::sleep(Duration::from_millis(5));
        meter.received(parent, 300);
        drop(asking);
        meter.failed(other);
        let whole = started.elapsed();
        let reports = meter.take(|_| None).concat();
        let bytes: Vec<_> = reports
            .iter()
            .map(|r| (r.node, r.bytes, r.failures))
            .collect();
        assert_eq!(bytes, [(parent, 300, 0), (other, 0, 1)]);
        assert!(reports[0].busy >= Duration::from_millis(5) && reports[0].busy <= whole);
        assert!(meter.take(|_| None).is_empty());
    }

    #[test]
    fn a_rate_that_was_measured_stands_for_the_time_that_was_waited() {
        let meter = PathMeter::default();
        let parent = NodeId::new([1; 32]);
        let asking = meter.ask(parent);
        std::thread::sleep(Duration::from_millis(20));
        meter.received(parent, 1000);
        drop(asking);
        let report = meter.take(|_| Some(100_000.0)).concat()[0];
        assert_eq!(
            (report.bytes, report.busy),
            (1000, Duration::from_millis(10))
        );
    }

    #[test]
    fn a_request_that_goes_on_is_counted_in_each_report() {
        let meter = PathMeter::default();
        let _asking = meter.ask(NodeId::new([1; 32]));
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(1));
            assert!(meter.take(|_| None).concat()[0].busy >= Duration::from_millis(1));
        }
    }
}
