//! When a transfer is tried again, and when it is given up: the state machine of one transfer.
//!
//! It decides and does nothing: the shell asks for [`Transfer::wanted`], reports what came with
//! [`Transfer::received`] and what failed with [`Transfer::failed`], and obeys the [`Next`] it gets.
//! Time is passed in, measured from any fixed point; jitter comes from a seed.

use std::time::Duration;

use pantala_wire::ByteRange;

use crate::error::SourceError;

/// Wait before the first retry: long enough for a process to be restarted or a queue to drain,
/// short enough that nobody sees it.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Longest wait that no origin asked for.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// So many new bytes show that an origin works, and give all retries back. Fewer do not, or one
/// that cuts after every byte would keep a transfer busy for ever.
const PROGRESS_BYTES: u64 = 1 << 20;

/// The bounds of retrying.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryPolicy {
    /// Failures in a row that are tolerated.
    pub(crate) retries_max: u32,
    /// Time without a byte that is tolerated.
    pub(crate) patience: Duration,
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask again, from the first missing byte, after this long.
    Retry {
        /// How long to wait first.
        wait: Duration,
    },
    /// Tell the caller of the failure.
    GiveUp,
}

/// Bytes `offset..end` are still wanted; so many retries are used up; since then nothing came.
#[derive(Debug)]
pub(crate) struct Transfer {
    policy: RetryPolicy,
    offset: u64,
    end: u64,
    retries_count: u32,
    retries_total: u64,
    fresh_bytes: u64,
    quiet_since: Duration,
    random: u64,
}

impl Transfer {
    /// A transfer of `range` that starts now.
    pub(crate) fn new(policy: RetryPolicy, range: ByteRange, seed: u64, now: Duration) -> Self {
        Self {
            policy,
            offset: range.start(),
            end: range.end(),
            retries_count: 0,
            retries_total: 0,
            fresh_bytes: 0,
            quiet_since: now,
            random: seed,
        }
    }

    /// What is still missing; `None` once all is there.
    pub(crate) fn wanted(&self) -> Option<ByteRange> {
        ByteRange::new(self.offset, self.end)
    }

    /// How often the origin was asked again so far.
    pub(crate) fn retries_total(&self) -> u64 {
        self.retries_total
    }

    /// The origin sends, if only bytes that are not wanted.
    pub(crate) fn alive(&mut self, now: Duration) {
        self.quiet_since = now;
    }

    /// The next `len` wanted bytes came.
    pub(crate) fn received(&mut self, len: u64, now: Duration) {
        debug_assert!(self.offset + len <= self.end, "more than was wanted");
        self.offset += len;
        self.quiet_since = now;
        self.fresh_bytes += len;
        if self.fresh_bytes >= PROGRESS_BYTES {
            self.fresh_bytes = 0;
            self.retries_count = 0;
        }
    }

    /// The request, or its body, ended early.
    pub(crate) fn failed(&mut self, error: &SourceError, now: Duration) -> Next {
        if !error.is_retryable() || self.retries_count >= self.policy.retries_max {
            return Next::GiveUp;
        }
        let backoff = BACKOFF_FIRST
            .saturating_mul(1_u32.checked_shl(self.retries_count).unwrap_or(u32::MAX))
            .min(BACKOFF_MAX);
        // Half of the backoff is random: nodes that failed together come back apart.
        let spread = self.draw(backoff / 2);
        let wait = match error.retry_after() {
            Some(asked) => asked.saturating_add(spread),
            None => backoff / 2 + spread,
        };
        let quiet = now.saturating_sub(self.quiet_since);
        if quiet.saturating_add(wait) > self.policy.patience {
            return Next::GiveUp;
        }
        self.retries_count += 1;
        self.retries_total += 1;
        self.fresh_bytes = 0;
        Next::Retry { wait }
    }

    /// A random duration below `bound` (splitmix64).
    fn draw(&mut self, bound: Duration) -> Duration {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let bound_us = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(z % bound_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Lie;
    use http::StatusCode;

    const POLICY: RetryPolicy = RetryPolicy {
        retries_max: 3,
        patience: Duration::from_secs(30),
    };

    fn transfer(len: u64) -> Transfer {
        let range = ByteRange::new(100, 100 + len).unwrap();
        Transfer::new(POLICY, range, 42, Duration::ZERO)
    }

    fn cut() -> SourceError {
        SourceError::Cut {
            host: "h".into(),
            offset: 0,
            end: 1,
        }
    }

    fn limited(retry_after_s: Option<u64>) -> SourceError {
        SourceError::RateLimited {
            host: "h".into(),
            status: StatusCode::TOO_MANY_REQUESTS,
            retry_after: retry_after_s.map(Duration::from_secs),
        }
    }

    fn wait(next: Next) -> Duration {
        match next {
            Next::Retry { wait } => wait,
            Next::GiveUp => panic!("gave up"),
        }
    }

    #[test]
    fn a_cut_is_resumed_from_the_first_missing_byte() {
        let mut transfer = transfer(10);
        transfer.received(4, Duration::ZERO);
        wait(transfer.failed(&cut(), Duration::ZERO));
        assert_eq!(transfer.wanted(), ByteRange::new(104, 110));
        transfer.received(6, Duration::ZERO);
        assert_eq!(transfer.wanted(), None);
    }

    #[test]
    fn failures_in_a_row_are_counted_and_waits_grow() {
        let mut transfer = transfer(10);
        let waits: Vec<_> = (0..3)
            .map(|_| wait(transfer.failed(&cut(), Duration::ZERO)))
            .collect();
        for (i, wait) in waits.iter().enumerate() {
            let backoff = BACKOFF_FIRST * (1 << i);
            assert!(*wait >= backoff / 2 && *wait < backoff, "{waits:?}");
        }
        assert_eq!(transfer.failed(&cut(), Duration::ZERO), Next::GiveUp);
        assert_eq!(transfer.retries_total(), 3);
    }

    #[test]
    fn only_real_progress_gives_retries_back() {
        let mut transfer = transfer(1 << 30);
        let mut rounds_count = 0;
        while let Next::Retry { .. } = transfer.failed(&cut(), Duration::ZERO) {
            transfer.received(PROGRESS_BYTES - 1, Duration::ZERO);
            rounds_count += 1;
        }
        assert_eq!(rounds_count, POLICY.retries_max);
        for _ in 0..100 {
            transfer.received(PROGRESS_BYTES, Duration::ZERO);
            wait(transfer.failed(&cut(), Duration::ZERO));
        }
    }

    #[test]
    fn patience_ends_by_time_since_the_last_byte() {
        let mut transfer = transfer(1 << 20);
        let second = Duration::from_secs(1);
        transfer.received(1, second * 100);
        wait(transfer.failed(&cut(), second * 120));
        assert_eq!(transfer.failed(&cut(), second * 130), Next::GiveUp);
        transfer.alive(second * 130);
        wait(transfer.failed(&cut(), second * 131));
    }

    #[test]
    fn the_wait_that_an_origin_asks_for_is_kept_or_refused_but_never_shortened() {
        let now = Duration::ZERO;
        assert!(wait(transfer(1).failed(&limited(Some(2)), now)) >= Duration::from_secs(2));
        assert_eq!(transfer(1).failed(&limited(Some(31)), now), Next::GiveUp);
        let absurd = limited(Some(u64::MAX));
        assert_eq!(transfer(1).failed(&absurd, now), Next::GiveUp);
        wait(transfer(1).failed(&limited(None), now));
    }

    #[test]
    fn what_cannot_pass_is_given_up_at_once() {
        let lied = SourceError::Lied {
            host: "h".into(),
            lie: Lie::TooLong,
        };
        assert_eq!(transfer(1).failed(&lied, Duration::ZERO), Next::GiveUp);
    }

    #[test]
    fn one_seed_gives_one_sequence_of_waits() {
        let run = |seed| {
            let range = ByteRange::new(0, 1).unwrap();
            let mut transfer = Transfer::new(POLICY, range, seed, Duration::ZERO);
            (0..3)
                .map(|_| wait(transfer.failed(&cut(), Duration::ZERO)))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
