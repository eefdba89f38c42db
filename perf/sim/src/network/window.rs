//! The highest mean rate of a link over windows of a fixed width: what a monitoring system would plot.

use super::NANOS_PER_S;

#[derive(Clone, Debug)]
pub(super) struct Window {
    width_ns: u64,
    /// The start of the present window, and what it has carried up to `settled_ns`.
    start_ns: u64,
    settled_ns: u64,
    bytes: f64,
    peak: f64,
}

impl Window {
    pub(super) fn new(now_ns: u64, width_ns: u64) -> Self {
        Self {
            width_ns,
            start_ns: now_ns,
            settled_ns: now_ns,
            bytes: 0.0,
            peak: 0.0,
        }
    }

    /// Counts `load` bytes per second from the last call up to `now_ns`.
    pub(super) fn settle(&mut self, now_ns: u64, load: f64) {
        let end_ns = self.start_ns + self.width_ns;
        if now_ns >= end_ns {
            self.bytes += load * seconds(end_ns - self.settled_ns);
            self.peak = self.peak.max(self.bytes / seconds(self.width_ns));
            let whole = (now_ns - end_ns) / self.width_ns;
            if whole > 0 {
                self.peak = self.peak.max(load);
            }
            self.start_ns = end_ns + whole * self.width_ns;
            self.settled_ns = self.start_ns;
            self.bytes = 0.0;
        }
        self.bytes += load * seconds(now_ns.saturating_sub(self.settled_ns));
        self.settled_ns = now_ns;
    }

    /// The peak up to `now_ns`; the present window counts with what it has so far over its whole width.
    pub(super) fn peak(&self, now_ns: u64, load: f64) -> f64 {
        let mut now = self.clone();
        now.settle(now_ns, load);
        now.peak.max(now.bytes / seconds(now.width_ns))
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / NANOS_PER_S
}
