//! Spaces what is sent so that it keeps to a rate.

use std::time::Duration;

/// Turns that are given out ahead of time, at most: whoever comes then waits this long and asks again, so that
/// a rate that rises is felt at once.
const AHEAD_MAX: Duration = Duration::from_secs(1);

/// Turns at a rate. The time is given by the caller, and goes only forward.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    bytes_per_s: Option<f64>,
    free_at: Duration,
}

/// What to do before sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Wait for so long, then send.
    After(Duration),
    /// Wait for so long, then ask again.
    AskAfter(Duration),
}

impl Pace {
    /// At most so many bytes a second from now on; nothing for no limit. True if that is another than before.
    pub fn set(&mut self, bytes_per_s: Option<f64>) -> bool {
        let is_other = self.bytes_per_s != bytes_per_s;
        self.bytes_per_s = bytes_per_s;
        is_other
    }

    /// A turn for `bytes` bytes at `now`.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Turn {
        let Some(rate) = self.bytes_per_s else {
            self.free_at = now;
            return Turn::After(Duration::ZERO);
        };
        let wait = self.free_at.saturating_sub(now);
        if wait > AHEAD_MAX {
            // Turns given out under another rate may lie far ahead.
            self.free_at = self.free_at.min(now + AHEAD_MAX * 2);
            return Turn::AskAfter(AHEAD_MAX);
        }
        let takes = Duration::from_secs_f64((bytes as f64 / rate.max(1.0)).min(3600.0));
        self.free_at = self.free_at.max(now) + takes;
        Turn::After(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes sent within `for_` by senders that always have more.
    fn sent(pace: &mut Pace, from: Duration, for_: Duration) -> u64 {
        let (mut now, mut sent) = (from, 0);
        while now < from + for_ {
            match pace.take(now, 100_000) {
                Turn::After(wait) => {
                    now += wait;
                    sent += 100_000;
                }
                Turn::AskAfter(wait) => now += wait,
            }
        }
        sent
    }

    #[test]
    fn a_rate_is_kept_to_and_a_change_of_it_is_felt() {
        let mut pace = Pace::default();
        assert!(pace.set(Some(1e6)));
        assert!(!pace.set(Some(1e6)));
        let second = Duration::from_secs(1);
        let slow = sent(&mut pace, Duration::ZERO, second * 10);
        assert!((9_900_000..=10_200_000).contains(&slow), "{slow}");
        pace.set(Some(10e6));
        let fast = sent(&mut pace, second * 10, second * 10);
        assert!((98_000_000..=102_000_000).contains(&fast), "{fast}");
    }

    #[test]
    fn without_a_rate_nobody_waits_whatever_was_before() {
        let mut pace = Pace::default();
        pace.set(Some(1.0));
        pace.take(Duration::ZERO, 1_000_000);
        assert!(matches!(pace.take(Duration::ZERO, 1), Turn::AskAfter(_)));
        pace.set(None);
        assert_eq!(pace.take(Duration::ZERO, 1), Turn::After(Duration::ZERO));
    }
}
