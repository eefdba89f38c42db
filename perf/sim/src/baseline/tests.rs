//! The policies against the bound, against themselves, and under faults.

use std::time::Duration;

use super::{
    Boundary, Fault, Input, Outcome, bittorrent, dragonfly, gbit_per_s, kraken, registry_only,
};
use crate::bound::{self, Supply};
use crate::rng::Rng;

const BLOB_BYTES: u64 = 200_000_000;

/// The seed or origin that a policy brings along sends as fast as the fastest node.
fn with_a_seed(input: &Input) -> Supply {
    let more_up_bytes_per_s = input
        .nodes
        .iter()
        .map(|node| node.up_bytes_per_s)
        .fold(0.0, f64::max);
    Supply {
        more_up_bytes_per_s,
        ..Supply::REGISTRY
    }
}

fn all(input: &Input) -> [Outcome; 4] {
    [
        registry_only::run(input),
        dragonfly::run(input, &dragonfly::Rules::default()),
        kraken::run(input, &kraken::Rules::default()),
        bittorrent::run(input),
    ]
}

/// Racks behind thin links, uplinks and downlinks of all kinds, and late arrivals.
fn mixed(seed: u64) -> Input {
    let mut rng = Rng::new(seed);
    let nodes = 5 + rng.below(40) as usize;
    let mut input = Input::uniform(nodes, BLOB_BYTES, gbit_per_s(10.0), gbit_per_s(10.0));
    input.seed = seed;
    for node in &mut input.nodes {
        node.up_bytes_per_s = gbit_per_s([1.0, 10.0, 25.0, 100.0][rng.below(4) as usize]);
        node.down_bytes_per_s = gbit_per_s([1.0, 10.0, 25.0][rng.below(3) as usize]);
        node.rack = rng.below(4) as u32;
        node.zone = node.rack / 2;
        node.arrival = rng.time(Duration::from_secs(2));
    }
    let thin = Boundary {
        in_bytes_per_s: gbit_per_s(5.0),
        out_bytes_per_s: gbit_per_s(5.0),
    };
    input.racks = vec![thin; 4];
    input.zones = vec![
        Boundary {
            in_bytes_per_s: f64::INFINITY,
            ..thin
        };
        2
    ];
    input
}

#[test]
fn every_node_finishes_and_nobody_beats_the_bound() {
    for seed in 0..12 {
        let input = mixed(seed);
        let bound = bound::makespan(&input, with_a_seed(&input)).makespan();
        for outcome in all(&input) {
            let makespan = outcome
                .makespan()
                .unwrap_or_else(|| panic!("seed {seed}: {} hangs", outcome.policy));
            assert!(
                makespan >= bound,
                "seed {seed}: {} took {makespan:?}, the bound is {bound:?}",
                outcome.policy
            );
            assert!(
                outcome.copies(BLOB_BYTES) >= 1.0 - 1e-9,
                "seed {seed}: {}",
                outcome.policy
            );
            assert!(outcome.registry_peak_bytes_per_s <= input.registry_bytes_per_s * 1.001);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_outcome() {
    let input = mixed(7);
    assert_eq!(all(&input), all(&input));
}

#[test]
fn the_living_finish_though_others_die_or_slow_down() {
    for seed in 0..12 {
        let mut input = mixed(seed);
        for node in 0..input.nodes.len() as u32 {
            let at = Duration::from_millis(u64::from(node) * 40);
            match node % 5 {
                0 => input.faults.push(Fault::Died { at, node }),
                1 => input.faults.push(Fault::Slowed {
                    at,
                    node,
                    up_factor: 0.05,
                }),
                _ => {}
            }
        }
        let bound = bound::makespan(&input, with_a_seed(&input)).makespan();
        for outcome in all(&input) {
            let makespan = outcome
                .makespan()
                .unwrap_or_else(|| panic!("seed {seed}: {} hangs", outcome.policy));
            assert!(makespan >= bound, "seed {seed}: {}", outcome.policy);
            let died = outcome.died.iter().filter(|died| **died).count();
            assert!(
                died <= input.nodes.len().div_ceil(5),
                "seed {seed}: {}",
                outcome.policy
            );
        }
    }
}

#[test]
fn everybody_from_the_registry_takes_as_long_as_its_link_needs() {
    let input = Input::uniform(50, 500_000_000, gbit_per_s(10.0), gbit_per_s(6.0));
    let outcome = registry_only::run(&input);
    let makespan = outcome.makespan().unwrap();
    assert!(
        (makespan.as_secs_f64() - 20.001).abs() < 0.001,
        "{makespan:?}"
    );
    assert_eq!(outcome.registry_bytes, 50 * 500_000_000);
    assert_eq!(outcome.rack_crossing_bytes, 0);
}

#[test]
fn swarms_read_the_registry_once_and_much_faster() {
    let input = Input::uniform(50, 500_000_000, gbit_per_s(10.0), gbit_per_s(6.0));
    let [registry, swarms @ ..] = all(&input);
    for outcome in swarms {
        assert!(
            outcome.makespan().unwrap() * 2 < registry.makespan().unwrap(),
            "{}",
            outcome.policy
        );
        assert!(
            (outcome.copies(input.blob_bytes) - 1.0).abs() < 1e-6,
            "{}",
            outcome.policy
        );
    }
}

#[test]
fn pieces_of_dragonfly_follow_the_published_formula() {
    let mib = 1 << 20;
    assert_eq!(dragonfly::piece_bytes(500_000_000), 4 * mib);
    assert_eq!(dragonfly::piece_bytes(3_000_000_000), 8 * mib);
    assert_eq!(dragonfly::piece_bytes(100_000_000_000), 64 * mib);
}

#[test]
fn a_capped_kraken_is_no_faster_than_its_cap() {
    let input = Input::uniform(60, 300_000_000, gbit_per_s(10.0), gbit_per_s(10.0));
    let rules = kraken::Rules {
        cap_bytes_per_s: Some(30e6),
        origin_warm: true,
        ..kraken::Rules::default()
    };
    let outcome = kraken::run(&input, &rules);
    assert!(outcome.quantile(0.0).unwrap() >= Duration::from_secs(10));
    assert_eq!(outcome.registry_bytes, 0);
}

#[test]
fn no_nodes_and_no_bytes_are_no_work() {
    for input in [
        Input::uniform(0, BLOB_BYTES, 1e9, 1e9),
        Input::uniform(3, 0, 1e9, 1e9),
    ] {
        for outcome in all(&input) {
            assert!(outcome.makespan().is_some(), "{}", outcome.policy);
            assert_eq!(outcome.registry_bytes, 0, "{}", outcome.policy);
        }
    }
}
