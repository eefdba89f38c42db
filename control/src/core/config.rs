//! The times and bounds of the core.

use std::time::Duration;

/// Pieces in one lease at most. Others wait for the last piece of a run while its holder reads the
/// first ones, and a slow registry divided by many transfers gives each a few MiB/s: 8 MiB are a
/// wait of a second or two then, and of milliseconds on a fast one.
pub const LEASE_RUN_MAX: u32 = 8;
/// Bytes at the start of a blob of unknown size that one node may ask the source for: a lease of the
/// longest run, of pieces of the usual size.
pub const OPENING_BYTES: u64 = LEASE_RUN_MAX as u64 * pantala_wire::layout::PIECE_SIZE_MIN;
/// Openings at a time, some 100 bytes each: one lasts a round trip to the source.
pub const OPENINGS_MAX: usize = 64 * 1024;
/// Openings of one node at a time: the requests that it has under way at one source are fewer.
pub const OPENINGS_PER_NODE_MAX: usize = 64;
/// Leases of a task at a time, over all nodes. A source shared by many transfers finishes none of them
/// for long, and until a piece is whole nobody can pass it on: sixteen keep a fast source busy over its
/// first bytes' latency.
pub const LEASES_PER_TASK_MAX: usize = 16;
/// Pieces that all leases of a task should name together: with few nodes, longer runs make up for the
/// latency of each request.
pub const LEASED_PIECES_TARGET: u32 = 32;
/// Leases of one node on one task: enough to ask ahead of the source, too few to hoard a blob.
pub const LEASES_PER_MEMBER_MAX: usize = 8;
/// Parents that a node gets without asking for more: enough to outlive the failure of some.
pub const PARENTS_TARGET: usize = 8;
/// Below this many parents a node may crowd a parent that has [`CHILDREN_SOFT_MAX`] already.
pub const PARENTS_LOW: usize = 4;
/// Parents of one node on one task at most; a connection each.
pub const PARENTS_MAX: usize = 16;
/// Children that a parent takes readily.
pub const CHILDREN_SOFT_MAX: usize = 16;
/// Children that a parent takes at most, for nodes that would else have too few parents, or none
/// that holds what they need.
pub const CHILDREN_HARD_MAX: usize = 64;
/// Members looked at for one choice of parents: a task has thousands, and an event must stay cheap.
pub const CANDIDATES_MAX: usize = 64;
/// Nodes told of better parents, or of leases come free, because of one event.
pub const PUSHES_PER_EVENT_MAX: usize = 8;
/// Failed parents that are remembered for one node on one task.
pub const EXCLUDED_MAX: usize = 64;
/// Nodes shut out at a time; beyond it the oldest verdict lapses.
pub const SHUT_OUT_MAX: usize = 1024;

/// What a core is made with.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Makes choices between equals differ from cluster to cluster.
    pub seed: u64,
    /// How long a lease lasts without progress: longer than a slow source needs for one piece.
    pub lease_ttl: Duration,
    /// How long an opening lasts: longer than a slow source needs for the head of an answer, and no
    /// longer than the first reader of another node waits before that node goes to the source alone.
    pub opening_ttl: Duration,
    /// How long a node that lost its session keeps what it has.
    pub reconnect_grace: Duration,
    /// How long after the start leases wait for nodes that have not announced yet.
    pub start_grace: Duration,
    /// How long a parent that failed a child is not offered to that child.
    pub parent_exclusion: Duration,
    /// Shortest time after which a node that got no lease asks again.
    pub retry_min: Duration,
    /// Longest such time.
    pub retry_max: Duration,
    /// Nodes at most.
    pub nodes_max: usize,
    /// Tasks at most; beyond it the one that was idle longest is forgotten.
    pub tasks_max: usize,
    /// Memberships of nodes in tasks at most, some 200 bytes each.
    pub memberships_max: usize,
    /// Pieces of all tasks at most, 12 bytes each.
    pub pieces_max: u64,
    /// Bits of all incomplete holdings at most.
    pub holding_bits_max: u64,
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            lease_ttl: Duration::from_secs(30),
            opening_ttl: Duration::from_millis(2500),
            reconnect_grace: Duration::from_secs(1),
            start_grace: Duration::from_secs(2),
            parent_exclusion: Duration::from_secs(30),
            retry_min: Duration::from_millis(500),
            retry_max: Duration::from_secs(5),
            nodes_max: 16 * 1024,
            tasks_max: 64 * 1024,
            memberships_max: 1024 * 1024,
            pieces_max: 16 * 1024 * 1024,
            holding_bits_max: 1 << 31,
        }
    }
}
