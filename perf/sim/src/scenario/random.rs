//! Small scenarios with faults, drawn from a seed: a million steps of them are run at each change.

use crate::rng::Rng;

use super::{Fault, FaultKind, Group, Habit, Messages, Outage, Pull, Racks, Registry, Scenario};

/// Nodes of a random scenario at most: enough for every kind of meeting, few enough to be fast.
const NODES_MAX: u64 = 14;
/// Pieces of a blob in a random scenario at most.
const PIECES_MAX: u64 = 24;
const PIECE: u64 = 1 << 20;

/// The random scenario of `seed`.
pub fn random(seed: u64) -> Scenario {
    let mut rng = Rng::new(seed);
    let calm = rng.chance(0.25);
    let blob_count = rng.range(1, 2);
    let blobs = (0..blob_count)
        .map(|_| rng.range(1, PIECES_MAX) * PIECE - rng.below(PIECE))
        .collect();
    let node_count = rng.range(1, NODES_MAX);
    let mut groups: Vec<Group> = (0..node_count)
        .map(|_| group(&mut rng, blob_count, calm))
        .collect();
    // One at least is honest, has a source, and stays.
    groups[0].habit = Habit::Honest;
    groups[0].fault = None;
    groups[0].has_source = true;
    let messages = Messages {
        delay_ms: rng.pick(&[0.1, 0.5, 2.0, 20.0]),
        jitter_ms: rng.pick(&[0.0, 0.2, 5.0]),
        control_loss: if calm {
            0.0
        } else {
            rng.pick(&[0.0, 0.0, 0.002, 0.02])
        },
        peer_loss: if calm {
            0.0
        } else {
            rng.pick(&[0.0, 0.0, 0.002, 0.01])
        },
    };
    let racks = rng.chance(0.3).then(|| Racks {
        nodes: rng.range(1, 5) as u32,
        mbit: rng.pick(&[500.0, 2_000.0, 20_000.0]),
        per_zone: rng.below(3) as u32,
        zone_mbit: rng.pick(&[0.0, 500.0, 5_000.0]),
        mixed: rng.chance(0.5),
    });
    let mut outages = Vec::new();
    if !calm && rng.chance(0.3) {
        outages.push(Outage {
            at_s: rng.unit() * 3.0,
            for_s: rng.pick(&[0.05, 0.5, 3.0, 30.0]),
            restart: rng.chance(0.7),
        });
    }
    Scenario {
        name: format!("random {seed}"),
        seed,
        limit_s: 600.0,
        quantum_ms: rng.pick(&[0.0, 0.0, 1.0]),
        share_every_ms: rng.pick(&[0.0, 0.0, 1.0]),
        registry: Registry {
            mbit: rng.pick(&[50.0, 200.0, 1_000.0, 10_000.0]),
            first_byte_ms: rng.pick(&[1.0, 20.0, 200.0]),
            requests_per_s: if calm {
                0.0
            } else {
                rng.pick(&[0.0, 0.0, 20.0, 100.0])
            },
            retry_after_s: rng.pick(&[0.2, 1.0, 3.0]),
        },
        messages,
        racks,
        blobs,
        groups,
        outages,
    }
}

fn group(rng: &mut Rng, blob_count: u64, calm: bool) -> Group {
    let mut pulls = Vec::new();
    for blob in 0..blob_count {
        if rng.chance(0.8) {
            pulls.push(Pull {
                blob: blob as u32,
                at_s: rng.pick(&[0.0, 0.0, 0.3, 2.0]),
                spread_s: rng.pick(&[0.0, 0.01, 1.0]),
                prefetch: rng.chance(0.3),
            });
        }
    }
    let habits = [
        Habit::WrongBytes,
        Habit::Forges,
        Habit::Boasts,
        Habit::Stalls,
    ];
    let habit = match !calm && rng.chance(0.12) {
        true => rng.pick(&habits),
        false => Habit::Honest,
    };
    let fault = rng.chance(0.25).then(|| Fault {
        at_s: rng.unit() * 2.0,
        spread_s: 0.0,
        part: 1.0,
        kind: match (calm, rng.below(5)) {
            (true, _) | (_, 0) => FaultKind::Slow {
                factor: rng.pick(&[0.01, 0.1, 0.5]),
                down: true,
            },
            (_, 1) => FaultKind::Crash { back_s: None },
            (_, 2) => FaultKind::Crash {
                back_s: Some(rng.unit() * 5.0),
            },
            (_, 3) => FaultKind::Death,
            _ => FaultKind::SessionLoss,
        },
    });
    Group {
        count: 1,
        up_mbit: rng.pick(&[100.0, 1_000.0, 10_000.0]),
        down_mbit: rng.pick(&[100.0, 1_000.0, 10_000.0]),
        pulls,
        draws: None,
        habit,
        fault,
        has_source: calm || rng.chance(0.9),
    }
}
