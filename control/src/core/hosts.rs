//! How much the whole cluster asks of one registry.
//!
//! Each registry host has a budget of leases that may be under way at once, and of leases a second once
//! it has said that there were too many. Both learn: every lease that ends well makes room for a little
//! more, and a 429 or 503 that a node reports halves the first, takes the second below what was asked
//! lately, and stops all leases until the time that the registry named. Who is turned away is told when
//! to come again, each at another moment.
//!
//! Whose source has no name is not counted. Nodes that go to a source without a lease are not seen here:
//! they keep their own budgets.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use super::config::{
    HOST_LEASES_MAX, HOST_LEASES_START, HOST_NAME_LEN_MAX, HOST_PAUSE_DEFAULT, HOST_PAUSE_MAX,
    HOSTS_MAX,
};
use super::nodes::Slot;
use super::parents::mix;
use super::tasks::TaskId;

/// A host's place in the table; nothing for a source without a name.
pub(super) type HostId = u32;

/// Reports that come this soon after one that was heeded are about the same excess.
const SAME_EXCESS: Duration = Duration::from_secs(1);
/// What is left of the leases after a report.
const LEASES_DECREASE: f64 = 0.5;
/// What is left of the leases a second that were given lately.
const RATE_DECREASE: f64 = 0.7;
/// How much more a second without a report allows.
const RATE_GROWTH_PER_S: f64 = 0.05;
/// The fewest leases a second that are ever allowed.
const RATE_MIN: f64 = 1.0;
/// When this many times as many are allowed as are asked for, the bound is no bound any more.
const RATE_LIFTED: f64 = 4.0;
/// The wait for one whom the budget has no room for; it is told earlier when there is some.
const ROOM_WAIT: Duration = Duration::from_secs(2);
/// The spread of those who come again after a pause, at least.
const SPREAD_MIN: Duration = Duration::from_millis(500);

struct Host {
    name: String,
    /// Members that name it as their source.
    member_count: usize,
    /// Leases under way.
    open: usize,
    /// Leases that may be under way.
    leases_max: f64,
    /// It has complained before, so that growth is careful.
    has_complained: bool,
    heeded_at: Option<Duration>,
    paused_until: Duration,
    /// Leases a second that are allowed; nothing while it has not complained.
    rate_max: Option<f64>,
    /// Leases that may be given now under that bound.
    tokens: f64,
    /// Leases a second that were given lately.
    rate: f64,
    counted_at: Duration,
    /// Tasks with members that were turned away.
    starved: VecDeque<TaskId>,
    starving: BTreeSet<TaskId>,
}

/// What a registry host is allowed, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct HostStatus {
    /// The host, with its port where it is not the usual one.
    pub name: String,
    /// Leases under way.
    pub leases: usize,
    /// Leases that may be under way.
    pub leases_max: usize,
    /// Leases a second that are allowed, where the host has complained.
    pub leases_per_s_max: Option<f64>,
    /// How long no lease is given, because the host said so.
    pub paused_for: Duration,
}

#[derive(Default)]
pub(super) struct Hosts {
    by_name: HashMap<String, HostId>,
    slab: Vec<Option<Host>>,
    free: Vec<HostId>,
}

impl Hosts {
    fn get(&self, id: HostId) -> Option<&Host> {
        self.slab.get(id as usize)?.as_ref()
    }
    fn get_mut(&mut self, id: HostId) -> Option<&mut Host> {
        self.slab.get_mut(id as usize)?.as_mut()
    }
    pub(super) fn find(&self, name: &str) -> Option<HostId> {
        self.by_name.get(name).copied()
    }

    /// A member's source is this host; nothing where the name is none, or there are too many.
    pub(super) fn enter(&mut self, name: &str, now: Duration) -> Option<HostId> {
        if let Some(id) = self.find(name) {
            self.get_mut(id)?.member_count += 1;
            return Some(id);
        }
        if name.is_empty() || name.len() > HOST_NAME_LEN_MAX || self.by_name.len() >= HOSTS_MAX {
            return None;
        }
        let host = Host {
            name: name.to_owned(),
            member_count: 1,
            open: 0,
            leases_max: HOST_LEASES_START,
            has_complained: false,
            heeded_at: None,
            paused_until: Duration::ZERO,
            rate_max: None,
            tokens: 0.0,
            rate: 0.0,
            counted_at: now,
            starved: VecDeque::new(),
            starving: BTreeSet::new(),
        };
        let id = self.free.pop().unwrap_or(self.slab.len() as HostId);
        if id as usize == self.slab.len() {
            self.slab.push(Some(host));
        } else {
            self.slab[id as usize] = Some(host);
        }
        self.by_name.insert(name.to_owned(), id);
        Some(id)
    }

    pub(super) fn leave(&mut self, id: HostId) {
        if let Some(host) = self.get_mut(id) {
            host.member_count -= 1;
        }
        self.tidy(id);
    }

    fn tidy(&mut self, id: HostId) {
        if let Some(host) = self.get(id)
            && host.member_count == 0
            && host.open == 0
        {
            self.by_name.remove(&host.name.clone());
            self.slab[id as usize] = None;
            self.free.push(id);
        }
    }

    /// Whether a lease may be given on this host now; if not, when `who` is to ask again.
    pub(super) fn may_lease(
        &mut self,
        id: HostId,
        now: Duration,
        who: Slot,
    ) -> Result<(), Duration> {
        let Some(host) = self.get_mut(id) else {
            return Ok(());
        };
        host.pass(now);
        if now < host.paused_until {
            return Err(host.comes_again(now, who));
        }
        if host.open >= host.leases_max as usize {
            return Err(ROOM_WAIT);
        }
        if let Some(rate) = host.rate_max
            && host.tokens < 1.0
        {
            return Err(Duration::from_secs_f64((1.0 - host.tokens) / rate).max(SPREAD_MIN));
        }
        Ok(())
    }

    /// A lease was given.
    pub(super) fn leased(&mut self, id: HostId, now: Duration) {
        if let Some(host) = self.get_mut(id) {
            host.pass(now);
            host.open += 1;
            host.rate += 1.0;
            host.tokens -= 1.0;
        }
    }

    /// A lease has ended; `is_done`: all of its pieces were fetched.
    pub(super) fn ended(&mut self, id: HostId, is_done: bool) {
        if let Some(host) = self.get_mut(id) {
            host.open -= 1;
            if is_done {
                let step = if host.has_complained {
                    1.0 / host.leases_max
                } else {
                    1.0
                };
                host.leases_max = (host.leases_max + step).min(HOST_LEASES_MAX);
            }
        }
        self.tidy(id);
    }

    /// The host said that it is asked too much.
    pub(super) fn complained(&mut self, id: HostId, now: Duration, retry_after: Option<Duration>) {
        let Some(host) = self.get_mut(id) else {
            return;
        };
        host.pass(now);
        let pause = retry_after
            .unwrap_or(HOST_PAUSE_DEFAULT)
            .min(HOST_PAUSE_MAX);
        host.paused_until = host.paused_until.max(now + pause);
        if host.heeded_at.is_some_and(|at| now < at + SAME_EXCESS) {
            return;
        }
        host.heeded_at = Some(now);
        host.has_complained = true;
        // What was under way was too much, not what might have been.
        let under_way = (host.open as f64).clamp(1.0, host.leases_max);
        host.leases_max = (under_way * LEASES_DECREASE).max(1.0);
        let rate = host.rate_max.map_or(host.rate, |rate| rate.min(host.rate));
        host.rate_max = Some((rate * RATE_DECREASE).max(RATE_MIN));
        host.tokens = 0.0;
    }

    /// A task's members were turned away for want of room.
    pub(super) fn starve(&mut self, id: HostId, task: TaskId) {
        if let Some(host) = self.get_mut(id)
            && host.starving.insert(task)
        {
            host.starved.push_back(task);
        }
    }

    /// The next task that may have the room that there is now.
    pub(super) fn next_starved(&mut self, id: HostId, now: Duration) -> Option<TaskId> {
        let host = self.get_mut(id)?;
        if now < host.paused_until || host.open >= host.leases_max as usize {
            return None;
        }
        let task = host.starved.pop_front()?;
        host.starving.remove(&task);
        Some(task)
    }

    pub(super) fn status(&self, now: Duration) -> Vec<HostStatus> {
        let mut all: Vec<HostStatus> = self
            .slab
            .iter()
            .flatten()
            .map(|host| HostStatus {
                name: host.name.clone(),
                leases: host.open,
                leases_max: host.leases_max as usize,
                leases_per_s_max: host.rate_max,
                paused_for: host.paused_until.saturating_sub(now),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

impl Host {
    /// Takes the time since the last event into account.
    fn pass(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.counted_at).as_secs_f64();
        self.counted_at = now;
        // A mean over about a second.
        self.rate /= 1.0 + seconds;
        if let Some(rate) = &mut self.rate_max {
            *rate *= 1.0 + RATE_GROWTH_PER_S * seconds.min(60.0);
            self.tokens = (self.tokens + *rate * seconds).min(rate.max(1.0));
            if *rate >= RATE_LIFTED * self.rate.max(RATE_MIN)
                && now >= self.paused_until + HOST_PAUSE_MAX
            {
                self.rate_max = None;
            }
        }
    }

    /// The end of the pause, and for each another moment after it: the longer the pause, the more wait.
    fn comes_again(&self, now: Duration, who: Slot) -> Duration {
        let left = self.paused_until.saturating_sub(now);
        let spread = SPREAD_MIN.max(left / 4).as_millis() as u64;
        let salt = self.paused_until.as_millis() as u64;
        left + Duration::from_millis(mix(salt ^ (u64::from(who) << 32)) % spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn lease_all(hosts: &mut Hosts, id: HostId, now: Duration) -> usize {
        let mut count = 0;
        while hosts.may_lease(id, now, 0).is_ok() && count < 10_000 {
            hosts.leased(id, now);
            count += 1;
        }
        count
    }

    #[test]
    fn a_host_that_never_complains_is_given_more_with_every_lease_that_ends_well() {
        let mut hosts = Hosts::default();
        let id = hosts.enter("registry", S).unwrap();
        assert_eq!(lease_all(&mut hosts, id, S), HOST_LEASES_START as usize);
        for _ in 0..100 {
            hosts.ended(id, true);
            lease_all(&mut hosts, id, S);
        }
        assert_eq!(
            hosts.status(S)[0].leases_max,
            HOST_LEASES_START as usize + 100
        );
    }

    #[test]
    fn a_complaint_stops_all_leases_until_its_time_and_halves_what_comes_after() {
        let mut hosts = Hosts::default();
        let id = hosts.enter("registry", S).unwrap();
        let under_way = lease_all(&mut hosts, id, S);
        hosts.complained(id, S, Some(S * 10));
        hosts.complained(id, S, Some(S * 10));
        for _ in 0..under_way {
            hosts.ended(id, false);
        }
        let waits: BTreeSet<Duration> = (0..100)
            .map(|who| hosts.may_lease(id, S * 10, who).unwrap_err())
            .collect();
        assert!(waits.len() > 50, "all come again together: {waits:?}");
        assert!(
            waits.iter().all(|wait| (S..S * 4).contains(wait)),
            "{waits:?}"
        );
        assert_eq!(hosts.status(S)[0].leases_max, under_way / 2);
        let after = lease_all(&mut hosts, id, S * 12);
        assert!(
            (1..=under_way / 2).contains(&after),
            "{after} after the pause"
        );
    }

    #[test]
    fn an_absurd_pause_is_cut_and_the_bound_on_the_rate_is_lifted_in_the_end() {
        let mut hosts = Hosts::default();
        let id = hosts.enter("registry", S).unwrap();
        hosts.leased(id, S);
        hosts.complained(id, S, Some(Duration::MAX));
        assert_eq!(hosts.status(S)[0].paused_for, HOST_PAUSE_MAX);
        hosts.ended(id, true);
        let later = S * 1000;
        assert!(hosts.may_lease(id, later, 0).is_ok());
        assert_eq!(hosts.status(later)[0].leases_per_s_max, None);
        hosts.leave(id);
        assert!(hosts.status(later).is_empty());
    }
}
