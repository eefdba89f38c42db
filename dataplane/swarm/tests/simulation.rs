//! Thousands of small clusters, each drawn from a seed, run to their end and checked at each step.
//!
//! `PANTALA_SEED=n` replays the one scenario that failed; `PANTALA_SCENARIOS=n` runs more.

#![allow(
    unreachable_pub,
    reason = "a test's modules are reached from nowhere else"
)]

mod sim;

use sim::scenario::Scenario;
use sim::world::{Report, World};

/// Scenarios in a normal run: about ten seconds unoptimised.
const SCENARIOS_COUNT: u64 = 1000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Prints the seed of a run that panics.
struct Seed(u64);
impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with PANTALA_SEED={}", self.0);
        }
    }
}

fn run(seed: u64, hash_actions: bool) -> Report {
    let guard = Seed(seed);
    let mut world = World::new(Scenario::draw(seed));
    world.trace = number("PANTALA_SEED").is_some();
    world.hash_actions = hash_actions;
    let report = world.run();
    std::mem::forget(guard);
    report
}

#[test]
fn every_download_ends_and_none_breaks_a_rule() {
    if let Some(seed) = number("PANTALA_SEED") {
        println!("{:#?}", Scenario::draw(seed));
        let report = run(seed, false);
        println!("failed: {:?}, at {:?}", report.failed, report.ended_at);
        return;
    }
    let count = number("PANTALA_SCENARIOS").unwrap_or(SCENARIOS_COUNT);
    let mut source_pieces = 0;
    let (mut completed, mut failed, mut blames, mut hedges, mut alone) = (0, 0, 0, 0, 0);
    for seed in 0..count {
        let report = run(seed, false);
        completed += report.completed_count;
        failed += report.failed.len();
        blames += report.blames;
        hedges += report.hedges;
        alone += report.alone_fetches;
        source_pieces += report.source_pieces;
    }
    println!(
        "{completed} complete, {failed} failed, {blames} blames, {hedges} hedges, {alone} alone, {source_pieces} pieces from the source"
    );
    // A simulation that never gets where the rules bite proves nothing.
    assert!(completed > 0 && failed > 0 && blames > 0 && hedges > 0 && alone > 0);
}

#[test]
fn the_same_seed_gives_the_same_actions() {
    for seed in 0..50 {
        assert_eq!(
            run(seed, true).actions_hash,
            run(seed, true).actions_hash,
            "seed {seed}"
        );
    }
}
