//! Slows down whoever guesses at the join token.
//!
//! The secret cannot be guessed; this bounds what guessing costs control, and what it logs.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

/// Failures of one address in a window, after which it is refused unheard: a person who pastes the
/// wrong token over a whole rack stays below it.
const FAILURES_MAX: u32 = 30;
/// The window.
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered; the oldest goes first.
const ADDRESSES_MAX: usize = 1024;

/// Failed joins by address.
#[derive(Default)]
pub(super) struct FailedJoins {
    by_address: BTreeMap<IpAddr, (Duration, u32)>,
    order: VecDeque<IpAddr>,
}

impl FailedJoins {
    /// Whether a join from `address` is heard at `now`.
    pub(super) fn may_try(&self, address: IpAddr, now: Duration) -> bool {
        self.by_address
            .get(&address)
            .is_none_or(|&(since, count)| count < FAILURES_MAX || now >= since + WINDOW)
    }
    /// A join from `address` failed at `now`; how many did in this window.
    pub(super) fn failed(&mut self, address: IpAddr, now: Duration) -> u32 {
        let entry = self.by_address.entry(address).or_insert_with(|| {
            self.order.push_back(address);
            (now, 0)
        });
        if now >= entry.0 + WINDOW {
            *entry = (now, 0);
        }
        entry.1 += 1;
        let count = entry.1;
        if self.order.len() > ADDRESSES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_address.remove(&oldest);
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn an_address_is_unheard_after_its_failures_until_the_window_is_over() {
        let mut joins = FailedJoins::default();
        let start = Duration::from_secs(5);
        for _ in 0..FAILURES_MAX {
            assert!(joins.may_try(ADDRESS, start));
            joins.failed(ADDRESS, start);
        }
        assert!(!joins.may_try(ADDRESS, start + WINDOW - Duration::from_millis(1)));
        assert!(joins.may_try(IpAddr::V4(std::net::Ipv4Addr::BROADCAST), start));
        assert!(joins.may_try(ADDRESS, start + WINDOW));
        assert_eq!(joins.failed(ADDRESS, start + WINDOW), 1);
    }

    #[test]
    fn memory_is_bounded_whoever_tries() {
        let mut joins = FailedJoins::default();
        for number in 0..10 * ADDRESSES_MAX as u32 {
            joins.failed(IpAddr::V4(number.into()), Duration::ZERO);
        }
        assert!(joins.by_address.len() <= ADDRESSES_MAX);
        assert_eq!(joins.by_address.len(), joins.order.len());
    }
}
