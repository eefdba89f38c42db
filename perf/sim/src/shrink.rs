//! Makes a scenario that breaks a rule small, while it still breaks that rule.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::check::{Mutation, Violation};
use crate::pantala::{Policy, Report, World};
use crate::scenario::{Messages, Scenario};

/// Runs of a shrink at most: each is short, and what is left after so many is small enough to read.
const RUNS_MAX: u32 = 400;
/// The smallest blob worth trying, one piece.
const PIECE: u64 = 1 << 20;

/// Runs a scenario; a panic of a core counts as a broken rule.
pub fn run(scenario: &Scenario, policy: &Policy, mutation: Mutation) -> Result<Report, Violation> {
    let world = || World::new(scenario.clone(), policy.clone(), mutation).run();
    match catch_unwind(AssertUnwindSafe(world)) {
        Ok(report) => match report.violation.clone() {
            Some(violation) => Err(violation),
            None => Ok(report),
        },
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(Violation {
                rule: "panic",
                text: text.unwrap_or_else(|| "a panic without words".to_owned()),
            })
        }
    }
}

/// The smallest scenario found that breaks the same rule, and how it breaks it.
pub fn shrink(
    scenario: &Scenario,
    policy: &Policy,
    mutation: Mutation,
    first: Violation,
) -> (Scenario, Violation) {
    let mut best = (scenario.clone(), first);
    let mut runs_left = RUNS_MAX;
    loop {
        let mut found = false;
        for smaller in smaller(&best.0) {
            if runs_left == 0 {
                return best;
            }
            runs_left -= 1;
            if let Err(violation) = run(&smaller, policy, mutation)
                && violation.rule == best.1.rule
            {
                best = (smaller, violation);
                found = true;
                break;
            }
        }
        if !found {
            return best;
        }
    }
}

/// Scenarios that are a little smaller, the boldest first.
fn smaller(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    let mut add = |change: &dyn Fn(&mut Scenario)| {
        let mut other = scenario.clone();
        change(&mut other);
        if other != *scenario && other.validate().is_ok() {
            all.push(other);
        }
    };
    let groups = scenario.groups.len();
    if groups > 3 {
        add(&|s| s.groups.truncate(groups.div_ceil(2)));
        add(&|s| drop(s.groups.drain(..groups / 2)));
    }
    for at in 0..groups {
        if groups > 1 {
            add(&|s| drop(s.groups.remove(at)));
        }
        add(&|s| s.groups[at].count = s.groups[at].count.div_ceil(2));
    }
    add(&|s| s.outages.clear());
    add(&|s| s.messages = Messages::default());
    add(&|s| s.racks = None);
    add(&|s| s.registry.requests_per_s = 0.0);
    for at in 0..groups {
        add(&|s| s.groups[at].fault = None);
        add(&|s| s.groups[at].habit = Default::default());
        add(&|s| {
            s.groups[at].pulls.pop();
        });
        add(&|s| {
            for pull in &mut s.groups[at].pulls {
                (pull.at_s, pull.spread_s, pull.prefetch) = (0.0, 0.0, false);
            }
        });
        add(&|s| {
            (s.groups[at].up_mbit, s.groups[at].down_mbit) = (1_000.0, 1_000.0);
            s.groups[at].has_source = true;
        });
    }
    for at in 0..scenario.blobs.len() {
        add(&|s| s.blobs[at] = (s.blobs[at] / 2).div_ceil(PIECE).max(1) * PIECE);
        add(&|s| s.blobs[at] = s.blobs[at].saturating_sub(PIECE).div_ceil(PIECE).max(1) * PIECE);
    }
    add(&|s| (s.quantum_ms, s.share_every_ms) = (0.0, 0.0));
    all
}
