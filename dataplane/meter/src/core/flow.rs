//! The rate that one direction of a path delivers when more is wanted than it delivers.
//!
//! Bytes are put into windows; a window in which more was wanted throughout is a measurement of the path,
//! any other only says that the path delivers at least so much. Windows are long enough that the batches in
//! which the kernel counts do not blur them, and short enough for several within two seconds.

use std::time::Duration;

/// A window holds at least this much, so that a batch more or less is 3 %.
const WINDOW_BYTES: u64 = 2 << 20;
/// The kernel counts in batches of up to this much.
const BATCH_BYTES: f64 = 65_536.0;
/// No window is shorter: tokens that a shaper had saved up, and the timing of the reader, count for less.
const WINDOW_MIN: Duration = Duration::from_millis(100);
/// No window is longer, however little it holds.
const WINDOW_MAX: Duration = Duration::from_millis(500);
/// The beginning of a busy time is left out: windows of senders open, and shapers give what they saved.
const SETTLE: Duration = Duration::from_millis(200);
/// In about this time a changed rate is believed.
const MEMORY: Duration = Duration::from_millis(400);
/// In this time without a measurement, an estimate loses all its credit.
const CREDIT: Duration = Duration::from_secs(60);

/// How much was wanted of the path since the reading before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// More than it delivered, all the time.
    Full,
    /// At times nothing, or it is not known.
    Partial,
}

/// A rate and how far it may be off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Bytes a second, with the headers of IP and UDP.
    pub bytes_per_s: f64,
    /// The expected error, as a part of the rate: 0 to 1.
    pub error_ratio: f64,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    from: Duration,
    from_bytes: u64,
    is_full: bool,
}

/// One direction of a path.
#[derive(Debug, Clone, Default)]
pub struct Flow {
    last: Option<(Duration, u64)>,
    /// Since when more has been wanted without a pause.
    full_since: Option<Duration>,
    window: Option<Window>,
    rate: Option<f64>,
    deviation: f64,
    blur: f64,
    measured_at: Duration,
}

impl Flow {
    /// Takes a reading of `bytes` in all at `at`. One that is no later than the one before is passed over;
    /// fewer bytes than before mean that counting began anew.
    pub fn take(&mut self, at: Duration, bytes: u64, demand: Demand) {
        let Some((last_at, last_bytes)) = self.last else {
            self.last = Some((at, bytes));
            return;
        };
        if at <= last_at {
            return;
        }
        self.last = Some((at, bytes));
        if bytes < last_bytes {
            self.window = None;
            self.full_since = None;
            return;
        }
        match demand {
            Demand::Full => {
                let since = *self.full_since.get_or_insert(last_at);
                let settled = last_at.saturating_sub(since) >= SETTLE;
                if self.window.is_some_and(|window| window.is_full != settled) {
                    self.window = None;
                }
                self.extend(at, bytes, (last_at, last_bytes), settled);
            }
            Demand::Partial => {
                self.full_since = None;
                if self.window.is_some_and(|window| window.is_full) {
                    self.window = None;
                }
                self.extend(at, bytes, (last_at, last_bytes), false);
            }
        }
    }

    /// The next reading is of another counter.
    pub fn restart(&mut self) {
        self.last = None;
        self.window = None;
        self.full_since = None;
    }

    fn extend(&mut self, at: Duration, bytes: u64, last: (Duration, u64), is_full: bool) {
        let window = *self.window.get_or_insert(Window {
            from: last.0,
            from_bytes: last.1,
            is_full,
        });
        let took = at.saturating_sub(window.from);
        let held = bytes.saturating_sub(window.from_bytes);
        if took < WINDOW_MIN || took < WINDOW_MAX && held < WINDOW_BYTES {
            return;
        }
        self.window = None;
        let sample = held as f64 / took.as_secs_f64();
        if is_full {
            self.measure(at, took, held, sample);
        } else if self.rate.is_some_and(|rate| sample > rate) {
            // The path has just delivered more than it was thought to.
            self.rate = Some(sample);
        }
    }

    fn measure(&mut self, at: Duration, took: Duration, held: u64, sample: f64) {
        let blur = (BATCH_BYTES / held.max(1) as f64).min(1.0);
        // An estimate of a busy time long ago says less than one window of now.
        let is_fresh = at.saturating_sub(self.measured_at) < WINDOW_MAX * 4;
        match self.rate.filter(|rate| is_fresh && *rate > 0.0) {
            Some(rate) => {
                let weight = took.as_secs_f64() / (took + MEMORY).as_secs_f64();
                self.rate = Some(rate + (sample - rate) * weight);
                let off = ((sample - rate) / rate).abs().min(1.0);
                self.deviation += (off - self.deviation) * weight;
                self.blur += (blur - self.blur) * weight;
            }
            None => {
                self.rate = Some(sample);
                // One window alone is worth half a word.
                self.deviation = 0.5;
                self.blur = blur;
            }
        }
        self.measured_at = at;
    }

    /// What the path is thought to deliver, if it was ever measured.
    pub fn rate(&self, now: Duration) -> Option<Rate> {
        let age = now.saturating_sub(self.measured_at);
        let aged = age.as_secs_f64() / CREDIT.as_secs_f64();
        self.rate.map(|bytes_per_s| Rate {
            bytes_per_s,
            error_ratio: (self.deviation + self.blur + aged).min(1.0),
        })
    }

    /// Since when more has been wanted without a pause, as of the last reading.
    pub fn busy_since(&self) -> Option<Duration> {
        self.full_since
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// Lets `rate` bytes a second arrive in batches, for `ticks` readings from `at` on.
    fn run(flow: &mut Flow, at: &mut Duration, bytes: &mut f64, rate: f64, ticks: u32) {
        for _ in 0..ticks {
            *at += TICK;
            *bytes += rate * TICK.as_secs_f64();
            let counted = (*bytes / BATCH_BYTES).floor() * BATCH_BYTES;
            flow.take(*at, counted as u64, Demand::Full);
        }
    }

    #[test]
    fn a_rate_is_known_to_a_tenth_within_two_seconds_from_50_mbit_to_5_gbit() {
        for mbit in [50.0, 200.0, 1000.0, 5000.0] {
            let rate = mbit * 125_000.0;
            let mut flow = Flow::default();
            let (mut at, mut bytes) = (Duration::ZERO, 0.0);
            flow.take(at, 0, Demand::Partial);
            run(&mut flow, &mut at, &mut bytes, rate, 20);
            let found = flow.rate(at).expect("measured");
            let error = (found.bytes_per_s / rate - 1.0).abs();
            assert!(error < 0.1, "{mbit} Mbit/s: {found:?}");
            assert!(found.error_ratio < 0.6, "{mbit} Mbit/s: {found:?}");
        }
    }

    #[test]
    fn a_rate_that_changes_is_followed_within_two_seconds() {
        let mut flow = Flow::default();
        let (mut at, mut bytes) = (Duration::ZERO, 0.0);
        flow.take(at, 0, Demand::Partial);
        run(&mut flow, &mut at, &mut bytes, 100e6, 30);
        run(&mut flow, &mut at, &mut bytes, 20e6, 20);
        let found = flow.rate(at).expect("measured").bytes_per_s;
        assert!((found / 20e6 - 1.0).abs() < 0.1, "{found}");
    }

    #[test]
    fn what_was_not_wanted_says_nothing_against_a_path() {
        let mut flow = Flow::default();
        let (mut at, mut bytes) = (Duration::ZERO, 0.0);
        flow.take(at, 0, Demand::Partial);
        run(&mut flow, &mut at, &mut bytes, 100e6, 30);
        let before = flow.rate(at).expect("measured");
        for _ in 0..20 {
            at += TICK;
            bytes += 1000.0;
            flow.take(at, bytes as u64, Demand::Partial);
        }
        let after = flow.rate(at).expect("measured");
        assert_eq!(after.bytes_per_s, before.bytes_per_s);
        assert!(after.error_ratio > before.error_ratio, "its credit fades");
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_and_counts_that_begin_anew_do_no_harm() {
        let mut flow = Flow::default();
        let (mut at, mut bytes) = (Duration::from_secs(5), 0.0);
        flow.take(at, 0, Demand::Partial);
        run(&mut flow, &mut at, &mut bytes, 100e6, 30);
        let before = flow.rate(at).expect("measured").bytes_per_s;
        flow.take(at, u64::MAX, Demand::Full);
        flow.take(Duration::from_secs(1), u64::MAX, Demand::Full);
        flow.take(at + TICK, 0, Demand::Full);
        assert_eq!(flow.rate(at).expect("measured").bytes_per_s, before);
    }

    proptest! {
        #[test]
        fn no_readings_make_an_estimate_that_is_no_number(
            readings in prop::collection::vec((0_u64..10_000, any::<u64>(), any::<bool>()), 0..200)
        ) {
            let mut flow = Flow::default();
            for (at_ms, bytes, full) in readings {
                let demand = if full { Demand::Full } else { Demand::Partial };
                flow.take(Duration::from_millis(at_ms), bytes, demand);
                if let Some(rate) = flow.rate(Duration::from_millis(at_ms)) {
                    prop_assert!(rate.bytes_per_s.is_finite() && rate.bytes_per_s >= 0.0);
                    prop_assert!((0.0..=1.0).contains(&rate.error_ratio));
                }
            }
        }
    }
}
