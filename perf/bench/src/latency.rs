//! How long requests took.

use std::time::Duration;

use serde::Serialize;

/// The latencies of many requests, and how fast they went in all.
#[derive(Debug, Serialize)]
pub(crate) struct Latencies {
    requests: usize,
    requests_per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Latencies {
    /// Of `took`, which ran side by side in `whole`.
    pub(crate) fn of(mut took: Vec<Duration>, whole: Duration) -> Self {
        took.sort_unstable();
        let at = |share: f64| {
            let index = (took.len() as f64 * share) as usize;
            took.get(index.min(took.len().saturating_sub(1)))
                .map_or(f64::NAN, |duration| duration.as_secs_f64() * 1e3)
        };
        Self {
            requests: took.len(),
            requests_per_s: took.len() as f64 / whole.as_secs_f64(),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
        }
    }
}

/// Numbers without a pattern, the same in each run.
#[derive(Debug, Clone)]
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let took = (1..=100).rev().map(Duration::from_millis).collect();
        let latencies = Latencies::of(took, Duration::from_secs(2));
        assert_eq!(latencies.requests_per_s, 50.0);
        assert_eq!(latencies.p50_ms, 51.0);
        assert_eq!(latencies.p99_ms, 100.0);
    }
}
