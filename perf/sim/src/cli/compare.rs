//! A scenario as the baselines take it, and what each of them makes of it.

use std::time::Duration;

use crate::baseline::{self, Boundary, Fault, Input, NodeInput, Outcome};
use crate::network::Network;
use crate::pantala::Topology;
use crate::rng::Rng;
use crate::scenario::{BYTES_PER_MBIT, FaultKind, Scenario, millis, seconds};

/// The scenario for one blob, as far as the baselines know of such things: nobody lies there, no message
/// is lost and no control is away, which is to their favour.
pub(super) fn input_of(scenario: &Scenario, blob: u32) -> Input {
    let topology = Topology::new(scenario, &mut Network::new(Duration::ZERO));
    // The same draws in the same order as the world's, so that the same nodes fail.
    let mut rng = Rng::new(scenario.seed);
    let mut input = Input::uniform(
        0,
        scenario.blobs[blob as usize],
        scenario.registry.mbit * BYTES_PER_MBIT,
        0.0,
    );
    input.message_delay = millis(scenario.messages.delay_ms);
    input.seed = scenario.seed;
    input.step = millis(scenario.share_every_ms);
    input.until = seconds(scenario.limit_s);
    input.peak_window = Duration::from_millis(100);
    let mut index = 0;
    for group in &scenario.groups {
        for _ in 0..group.count {
            let pull = group.pulls.iter().find(|pull| pull.blob == blob);
            for other in &group.pulls {
                let late = rng.time(seconds(other.spread_s));
                if Some(other) == pull {
                    input.nodes.push(NodeInput {
                        up_bytes_per_s: group.up_mbit * BYTES_PER_MBIT,
                        down_bytes_per_s: group.down_mbit * BYTES_PER_MBIT,
                        rack: topology.rack(index),
                        zone: topology.zone(index),
                        arrival: seconds(other.at_s) + late,
                    });
                }
            }
            if let Some(fault) = &group.fault
                && rng.chance(fault.part)
            {
                let at = seconds(fault.at_s) + rng.time(seconds(fault.spread_s));
                let node = (input.nodes.len() as u32).saturating_sub(1);
                match fault.kind {
                    FaultKind::Slow { factor, .. } => input.faults.push(Fault::Slowed {
                        at,
                        node,
                        up_factor: factor,
                    }),
                    FaultKind::Crash { .. } | FaultKind::Death => {
                        input.faults.push(Fault::Died { at, node });
                    }
                    FaultKind::SessionLoss => {}
                }
            }
            index += 1;
        }
    }
    if let Some(racks) = &scenario.racks {
        let boundary = |mbit: f64| Boundary {
            in_bytes_per_s: mbit * BYTES_PER_MBIT,
            out_bytes_per_s: mbit * BYTES_PER_MBIT,
        };
        let rack_count = scenario.node_count().div_ceil(racks.nodes);
        input.racks = vec![boundary(racks.mbit); rack_count as usize];
        if racks.per_zone > 0 && racks.zone_mbit > 0.0 {
            let zone_count = rack_count.div_ceil(racks.per_zone);
            input.zones = vec![boundary(racks.zone_mbit); zone_count as usize];
        }
    }
    input
}

/// Every baseline on the same input.
pub(super) fn baselines(input: &Input) -> Vec<Outcome> {
    vec![
        baseline::registry_only::run(input),
        baseline::dragonfly::run(input, &Default::default()),
        baseline::kraken::run(input, &Default::default()),
        baseline::bittorrent::run(input),
    ]
}
