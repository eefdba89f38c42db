//! Every node pulls the whole blob from the registry: what happens without any of this.

use super::engine::{Engine, Happened};
use super::{Input, Outcome, Source};

/// All nodes share the registry's link fairly, and it never refuses one, however many there are.
#[must_use]
pub fn run(input: &Input) -> Outcome {
    let mut engine: Engine<u32, ()> = Engine::new(input, &[]);
    for node in engine.shuffled_nodes() {
        engine.at(input.nodes[node as usize].arrival, node);
    }
    let round_trip = input.message_delay * 2;
    while let Some(happened) = engine.next() {
        match happened {
            Happened::Timer(node) if engine.alive(node) => {
                engine.fetch(Source::Registry, node, input.blob_bytes, round_trip, ());
            }
            Happened::Arrived(transfer) => engine.finish(transfer.to),
            Happened::Timer(_) | Happened::Died(..) => {}
        }
    }
    engine.outcome("registry only")
}
