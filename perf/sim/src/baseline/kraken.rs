//! Kraken, from its published rules: a random regular graph of ten connections, rarest piece first, an
//! announcement to the tracker every 3 s that names up to 50 peers (those with the whole blob first), and
//! an origin that fetches the blob from the source before it seeds it.
//!
//! A blob belongs to three origins. Not published, and chosen for speed: only one of them fetches it from
//! the source, which is so read once, and when it was pushed through Kraken all three have it; nodes learn
//! at once that the origin is ready.

use std::time::Duration;

use super::mesh;
use super::{Input, Outcome};

/// The settings of a Kraken cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// What each agent and each origin send, and what each agent receives, at most, in bytes per second.
    pub cap_bytes_per_s: Option<f64>,
    /// Whether the origins have the blob already, as after a push through Kraken's proxy.
    pub origin_warm: bool,
    /// Neighbours of a peer.
    pub connections: usize,
    /// Requests that wait over one connection; with as few missing pieces the endgame begins.
    pub pipeline: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            cap_bytes_per_s: None,
            origin_warm: false,
            connections: 10,
            pipeline: 3,
        }
    }
}

/// The cap of the published benchmark: 300 MB/s.
pub const PUBLISHED_CAP_BYTES_PER_S: f64 = 300e6;

const PIECE_BYTES: u64 = 4 << 20;
const ORIGINS: u32 = 3;
const HANDOUT: usize = 50;
const ANNOUNCE: Duration = Duration::from_secs(3);

/// How many pieces the origin fetches from the source at a time: enough to fill its link.
const ORIGIN_PIECES_AT_ONCE: u32 = 8;

/// One blob under Kraken's rules.
#[must_use]
pub fn run(input: &Input, rules: &Rules) -> Outcome {
    let mesh = mesh::Rules {
        policy: "Kraken",
        piece_bytes: PIECE_BYTES,
        neighbours_max: rules.connections,
        initiated_max: rules.connections,
        handout: HANDOUT,
        announce: ANNOUNCE,
        complete_first: true,
        pipeline: rules.pipeline,
        endgame_pieces: rules.pipeline as u32,
        random_pieces: 0,
        choking: None,
        seeds: ORIGINS,
        seed_whole_first: true,
        seed_warm: rules.origin_warm,
        seed_pieces_at_once: ORIGIN_PIECES_AT_ONCE,
    };
    let Some(cap) = rules.cap_bytes_per_s else {
        return mesh::run(input, &mesh);
    };
    let mut capped = input.clone();
    for node in &mut capped.nodes {
        node.up_bytes_per_s = node.up_bytes_per_s.min(cap);
        node.down_bytes_per_s = node.down_bytes_per_s.min(cap);
    }
    mesh::run(&capped, &mesh)
}
