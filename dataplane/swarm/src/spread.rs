//! Choices that differ from node to node and are the same on every replay.

/// Mixes a node's seed with what is chosen among (the finaliser of SplitMix64).
pub(crate) fn spread(seed: u64, value: u64) -> u64 {
    let mut z = seed ^ value.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Rounds of a draw after which everybody has drawn everything, however large the swarm.
const DRAW_ROUNDS_MAX: u32 = 32;

/// Whether the node with `seed` has drawn `value` up to this round, of `sharing_count` nodes that
/// share what there is. In the first round, every other value has been drawn by somebody, on average;
/// in each further one by twice as many.
pub(crate) fn is_drawn(seed: u64, value: u32, sharing_count: u32, round: u32) -> bool {
    let chance = u64::MAX / 2 / u64::from(sharing_count.max(1));
    let chance = chance.saturating_mul(1 << round.min(DRAW_ROUNDS_MAX));
    spread(seed, u64::from(value)) <= chance
}
