//! Whether a node is fit to be a parent: it is not while it delivers far less than its peers, or fails.
//!
//! One child's word is not enough to take a parent from the others, as the child itself may be at fault,
//! or lie. A parent that several children complain of is demoted at once: nobody is given it who has
//! another way. After its probation it gets a few children; it is restored when these are served well,
//! and demoted for twice as long when they are not.

use std::time::Duration;

use super::nodes::Slot;
use super::paths::decayed;

/// A parent that gives less than this part of what others give is abnormal.
const SLOW_RATIO: f64 = 0.25;
/// A child of a parent on trial that gets this much of what others give is served well.
const GOOD_RATIO: f64 = 0.5;
/// Comparisons that must agree: a child reports every two seconds.
const SLOW_SAMPLES: f64 = 4.0;
/// Failures that are too many, within about a half-life.
const FAILURES_MAX: f64 = 3.0;
/// Children that must complain.
const WITNESSES_NEEDED: usize = 2;
/// Complainants remembered.
const WITNESSES_MAX: usize = 4;
/// In this time, complaints lose half of their weight.
const COMPLAINT_HALF_LIFE: Duration = Duration::from_secs(20);
/// How long the first demotion lasts: longer than a restart, shorter than anybody notices.
const PROBATION: Duration = Duration::from_secs(20);
/// How often that doubles: to about ten minutes.
const PROBATION_DOUBLINGS_MAX: u32 = 5;
/// Children of a parent on trial.
const TRIAL_CHILDREN: usize = 2;
/// Good reports that end a trial.
const TRIAL_REPORTS: u32 = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Fading {
    value: f64,
    at: Duration,
}

impl Fading {
    fn get(&self, now: Duration) -> f64 {
        decayed(self.value, now.saturating_sub(self.at), COMPLAINT_HALF_LIFE)
    }
    fn add(&mut self, now: Duration, amount: f64) -> f64 {
        self.value = self.get(now) + amount;
        self.at = now;
        self.value
    }
}

/// What others think of a parent.
#[derive(Debug, Default)]
pub(super) struct Standing {
    slow: Fading,
    failures: Fading,
    witnesses: Vec<Slot>,
    demoted_until: Option<Duration>,
    /// Good reports that are still to come before it is trusted again.
    trial_left: u32,
    demotions: u32,
}

impl Standing {
    pub(super) fn is_demoted(&self, now: Duration) -> bool {
        self.demoted_until.is_some_and(|until| now < until)
    }

    /// How many children it may have now, if that is limited.
    pub(super) fn children_max(&self, now: Duration) -> Option<usize> {
        if self.is_demoted(now) {
            return Some(0);
        }
        (self.trial_left > 0).then_some(TRIAL_CHILDREN)
    }

    /// What part of a prediction to believe.
    pub(super) fn trust(&self, now: Duration) -> f64 {
        1.0 / (1.0 + self.failures.get(now))
    }

    /// A child gets `ratio` of what it gets from others, or of what is fair; true: demoted now.
    pub(super) fn compared(&mut self, now: Duration, child: Slot, ratio: f64) -> bool {
        if ratio < SLOW_RATIO {
            self.witness(child);
            let slow = self.slow.add(now, 1.0);
            return slow >= SLOW_SAMPLES && self.demote(now);
        }
        // What one child likes, another may dislike: it weighs the same.
        self.slow.add(now, -1.0);
        self.slow.value = self.slow.value.max(0.0);
        if ratio >= GOOD_RATIO && !self.is_demoted(now) {
            self.trial_left = self.trial_left.saturating_sub(1);
        }
        false
    }

    /// It failed a child; true: demoted now.
    pub(super) fn failed(&mut self, now: Duration, child: Slot) -> bool {
        self.witness(child);
        self.failures.add(now, 1.0) >= FAILURES_MAX && self.demote(now)
    }

    fn witness(&mut self, child: Slot) {
        if !self.witnesses.contains(&child) {
            if self.witnesses.len() >= WITNESSES_MAX {
                self.witnesses.remove(0);
            }
            self.witnesses.push(child);
        }
    }

    fn demote(&mut self, now: Duration) -> bool {
        if self.witnesses.len() < WITNESSES_NEEDED || self.is_demoted(now) {
            return false;
        }
        let doublings = self.demotions.min(PROBATION_DOUBLINGS_MAX);
        self.demoted_until = Some(now + PROBATION * (1 << doublings));
        self.demotions += 1;
        self.trial_left = TRIAL_REPORTS;
        self.slow = Fading::default();
        self.failures = Fading::default();
        self.witnesses.clear();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn one_child_that_complains_demotes_nobody_and_two_do() {
        let mut standing = Standing::default();
        for at in 0..100 {
            assert!(!standing.failed(S * at, 7));
            assert!(!standing.compared(S * at, 7, 0.01));
        }
        assert!(standing.failed(S * 100, 8));
        assert_eq!(standing.children_max(S * 100), Some(0));
    }

    #[test]
    fn a_demoted_parent_comes_back_on_trial_and_a_relapse_lasts_longer() {
        let mut standing = Standing::default();
        let slow = |standing: &mut Standing, from: Duration| {
            (0..10).any(|child| standing.compared(from, child % 2, 0.1))
        };
        assert!(slow(&mut standing, S));
        assert!(standing.is_demoted(S + PROBATION - Duration::from_millis(1)));
        let back = S + PROBATION;
        assert_eq!(standing.children_max(back), Some(TRIAL_CHILDREN));
        assert!(slow(&mut standing, back));
        assert!(standing.is_demoted(back + PROBATION * 2 - Duration::from_millis(1)));
        let back = back + PROBATION * 2;
        for _ in 0..TRIAL_REPORTS {
            standing.compared(back, 1, 0.9);
        }
        assert_eq!(standing.children_max(back), None);
    }
}
