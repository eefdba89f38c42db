//! A swarm like BitTorrent's: up to 50 neighbours, tit for tat every 10 s with four places and one by
//! chance, the rarest piece first after four random ones, and an endgame.
//!
//! A seed fetches the blob from the registry and gives each piece as soon as it has it. Chosen for speed:
//! a place that comes free is given away at once, not at the next choking.

use std::time::Duration;

use super::mesh;
use super::{Input, Outcome};

const NEIGHBOURS_MAX: usize = 50;

/// A peer asks fewer than it accepts: those who come later find room.
const INITIATED_MAX: usize = 30;

const HANDOUT: usize = 50;

/// How often a peer with room asks the tracker for more.
const ANNOUNCE: Duration = Duration::from_secs(30);

const REGULAR: usize = 4;
const OPTIMISTIC: usize = 1;
const CHOKE_EVERY: Duration = Duration::from_secs(10);
const PIPELINE: usize = 2;
const ENDGAME_PIECES: u32 = 8;
const RANDOM_PIECES: u32 = 4;
const SEED_PIECES_AT_ONCE: u32 = 8;

/// Torrents are made with about so many pieces.
const PIECES_AIM: u64 = 1500;
const PIECE_BYTES_MIN: u64 = 256 << 10;
const PIECE_BYTES_MAX: u64 = 16 << 20;

/// One blob in a swarm like BitTorrent's.
#[must_use]
pub fn run(input: &Input) -> Outcome {
    let piece_bytes = input.blob_bytes.div_ceil(PIECES_AIM).next_power_of_two();
    let rules = mesh::Rules {
        policy: "BitTorrent-like",
        piece_bytes: piece_bytes.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX),
        neighbours_max: NEIGHBOURS_MAX,
        initiated_max: INITIATED_MAX,
        handout: HANDOUT,
        announce: ANNOUNCE,
        complete_first: false,
        pipeline: PIPELINE,
        endgame_pieces: ENDGAME_PIECES,
        random_pieces: RANDOM_PIECES,
        choking: Some(mesh::Choking {
            regular: REGULAR,
            optimistic: OPTIMISTIC,
            every: CHOKE_EVERY,
        }),
        seeds: 1,
        seed_whole_first: false,
        seed_warm: false,
        seed_pieces_at_once: SEED_PIECES_AT_ONCE,
    };
    mesh::run(input, &rules)
}
