//! The core driven by a simulated cluster: one seed, virtual time, faults.
//!
//! The fault model: nodes crash and come back as new processes, lose their session and come back as
//! the same process, drop blobs, stop in the middle of a lease, report parents that failed, and
//! control itself restarts empty. Messages of one session arrive in order, at once or late.
//!
//! What is checked at every step stands in [`model::Referee`]; it knows only what went over the wire.

mod faults;
mod model;
mod nodes;
mod openings;
mod parents;
mod rules;
mod sources;

use std::collections::BTreeMap;

use pantala_control::core::config::CHILDREN_HARD_MAX;
use pantala_wire::NodeId;

use model::{Rng, Sim, SimNode, blob, id};

fn seeds(count: u64) -> impl Iterator<Item = u64> {
    // `PANTALA_SEED` replays the seed of a failed run, `PANTALA_SEEDS` says how many to try.
    let replay = std::env::var("PANTALA_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let count = std::env::var("PANTALA_SEEDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(count);
    let range = replay.map_or(0..count, |seed: u64| seed..seed + 1);
    range.inspect(|seed| println!("seed {seed}"))
}

#[test]
fn a_healthy_cluster_reads_every_piece_from_the_source_exactly_once() {
    for seed in seeds(30) {
        let mut rng = Rng(seed ^ 0xabc);
        let node_count = 1 + rng.below(40) as usize;
        let counts = [1 + rng.below(300) as u32, 1, 1 + rng.below(40) as u32];
        let mut sim = Sim::new(seed, node_count, &counts);
        sim.step();
        for (digest, _) in sim.blobs.clone() {
            for index in 0..node_count {
                // All at once, or one by one.
                if sim.rng.one_in(3) {
                    sim.step();
                }
                sim.start_download(index, digest);
            }
        }
        sim.finish(20_000);
        for (digest, count) in sim.blobs.clone() {
            for piece in 0..count {
                let key = (digest, piece);
                assert_eq!(
                    sim.source_reads.get(&key),
                    Some(&1),
                    "seed {seed}: piece {piece}"
                );
                assert_eq!(
                    sim.referee.granted.get(&key),
                    Some(&1),
                    "seed {seed}: piece {piece}"
                );
            }
        }
        // A late node takes nothing from the source.
        sim.nodes.push(SimNode {
            id: id(node_count),
            connected: false,
            resumed: false,
            reconnect_at: Some(sim.now),
            downloads: BTreeMap::new(),
            complained_at: None,
            is_out: false,
        });
        sim.step();
        let reads = sim.source_reads.clone();
        for (digest, _) in sim.blobs.clone() {
            sim.start_download(node_count, digest);
        }
        sim.finish(20_000);
        assert_eq!(
            sim.source_reads, reads,
            "seed {seed}: a late node went to the source"
        );
        sim.drain();
    }
}

#[test]
fn whatever_fails_leases_stay_disjoint_and_everybody_ends_up_with_the_blob() {
    for seed in seeds(120) {
        let mut rng = Rng(seed ^ 0xdef);
        let node_count = 2 + rng.below(20) as usize;
        let counts = [1 + rng.below(120) as u32, 1 + rng.below(60) as u32];
        let mut sim = Sim::new(seed, node_count, &counts);
        for _ in 0..1500 {
            if sim.rng.one_in(10) {
                let index = sim.rng.below(node_count as u64) as usize;
                let digest = sim.blobs[sim.rng.below(2) as usize].0;
                let node = &sim.nodes[index];
                if !node.is_out && !node.downloads.contains_key(&digest) {
                    sim.start_download(index, digest);
                }
            }
            if sim.rng.one_in(8) {
                sim.fault();
            }
            sim.step();
        }
        sim.finish(20_000);
        sim.drain();
    }
}

#[test]
fn control_that_restarts_in_mid_pull_costs_no_second_copy() {
    for seed in seeds(20) {
        let mut sim = Sim::new(seed, 10, &[200]);
        sim.step();
        for index in 0..10 {
            sim.start_download(index, blob(0));
        }
        for _ in 0..5 {
            sim.step();
        }
        sim.restart_control();
        sim.finish(20_000);
        let reads: u32 = sim.source_reads.values().sum();
        assert_eq!(reads, 200, "seed {seed}");
    }
}

#[test]
fn a_thousand_nodes_make_a_mesh_in_which_nobody_is_flooded() {
    let mut sim = Sim::new(1, 1000, &[40]);
    sim.step();
    for index in 0..1000 {
        sim.start_download(index, blob(0));
    }
    let mut children_max = 0;
    for _ in 0..4000 {
        if sim.is_done() {
            break;
        }
        sim.step();
        let mut children: BTreeMap<NodeId, usize> = BTreeMap::new();
        for node in &sim.nodes {
            for download in node.downloads.values().filter(|d| !d.complete) {
                for parent in &download.parents {
                    *children.entry(*parent).or_default() += 1;
                }
            }
        }
        children_max = children_max.max(children.values().copied().max().unwrap_or(0));
    }
    assert!(sim.is_done());
    assert!(children_max <= CHILDREN_HARD_MAX, "{children_max} children");
    let reads: u32 = sim.source_reads.values().sum();
    assert_eq!(reads, 40);
}
