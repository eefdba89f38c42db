//! The times and bounds of the core.

use std::time::Duration;

use super::member::Roll;

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
/// How much later a node's turn to fetch from the source comes for each halving of the uplink by which
/// it passes pieces on, while others wait: some pieces' time, so that those that keep up stay in turn.
pub const TURN_LAG: Duration = Duration::from_millis(100);
/// The most that anybody waits because of its uplink: a reader may wait for what only this node wants.
pub const TURN_LAG_MAX: Duration = Duration::from_secs(1);
/// Parents that a node gets without asking for more: enough to outlive the failure of some.
pub const PARENTS_TARGET: usize = 8;
/// Below this many parents a node may crowd a parent that has [`CHILDREN_SOFT_MAX`] already.
pub const PARENTS_LOW: usize = 4;
/// Parents of one node on one task at most; a connection each.
pub const PARENTS_MAX: usize = 16;
/// Of these, those of the child's own rack that do not hold the whole blob: a rack whose nodes had
/// only each other would wait for the same pieces together.
pub const PARENTS_NEAR_MAX: usize = 5;
/// What one child should get of its parent's uplink: 10 Gbit/s for 16 children. With eight parents, a
/// child then gets 5 Gbit/s when all are busy.
pub const CHILD_SHARE_BYTES_PER_S: f64 = 78_125_000.0;
/// Children in one task that the slowest parent takes readily.
pub const CHILDREN_MIN: usize = 2;
/// Children in one task that the fastest parent takes readily.
pub const CHILDREN_SOFT_MAX: usize = 64;
/// How many times as many a parent takes for nodes that would else have too few parents.
pub const HARD_FACTOR: usize = 4;
/// Children in one task that any parent takes at most; a stream of news each.
pub const CHILDREN_HARD_MAX: usize = 128;
/// Children that any parent takes, also a slow or demoted one, for nodes that lack a piece which nobody
/// else may have.
pub const CHILDREN_LAST: usize = 16;
/// Children of one node in all tasks together.
pub const CHILDREN_PER_NODE_MAX: usize = 4096;
/// Members looked at for one choice of parents, by the roll that they are drawn from: a task has
/// thousands, and an event must stay cheap. With eight to choose, five times as many find a good set.
pub(super) const CANDIDATES: [(Roll, usize); 5] = [
    (Roll::Seeds, 4),
    (Roll::Complete, 10),
    (Roll::Rack, 8),
    (Roll::Zone, 6),
    (Roll::All, 12),
];
/// Members of each roll that are looked at to find one that holds a certain piece.
pub const HOLDERS_SAMPLED: usize = 24;
/// How much more than another node a seed counts as a parent.
pub const SEED_FACTOR: f64 = 2.0;
/// Parents of a node whose speed is remembered, 16 bytes each: eight for each of eight downloads.
pub const PATHS_PER_NODE_MAX: usize = 64;
/// Paths in one report.
pub const PATHS_PER_REPORT_MAX: usize = PATHS_PER_NODE_MAX;
/// Longest time that one report covers; a node reports every two seconds, and a lost session delays it.
pub const PATH_BUSY_MAX: Duration = Duration::from_secs(60);
/// Fastest path that is believed: 800 Gbit/s, twice the fastest port there is.
pub const PATH_RATE_MAX: f64 = 1e11;
/// What an uplink is thought to be while nothing is known: 10 Gbit/s.
pub const UPLINK_PRIOR_BYTES_PER_S: f64 = 1.25e9;
/// The slowest uplink that is believed: 8 Mbit/s. Below it, a node is no parent worth a choice.
pub const UPLINK_MIN_BYTES_PER_S: f64 = 1e6;
/// Nodes told of better parents, or of leases come free, because of one event.
pub const PUSHES_PER_EVENT_MAX: usize = 8;
/// Children moved to other parents at once when theirs is demoted; the others are moved by their own
/// next report, two seconds later.
pub const DEMOTION_MOVES_MAX: usize = 32;
/// Tasks looked at to part one child from one parent.
pub const SHARED_TASKS_MAX: usize = 64;
/// Leases looked at to find a slow one: those that have brought nothing for longest.
pub const LEASES_COMPARED: usize = 4;
/// Tasks that the status tells of: those that most nodes wait for.
pub const ESTIMATES_MAX: usize = 32;
/// Members looked at for one estimate.
pub const ESTIMATE_SAMPLED: usize = 256;
/// Registry hosts that are told apart; a cluster has a handful.
pub const HOSTS_MAX: usize = 1024;
/// Of these, those that one node may bring up.
pub const HOSTS_PER_NODE_MAX: u32 = 64;
/// Longest name of a host: what DNS allows, and a port.
pub const HOST_NAME_LEN_MAX: usize = 262;
/// Leases on one host that may be under way at first: with 8 MiB each, enough to fill its links.
pub const HOST_LEASES_START: f64 = 64.0;
/// Leases on one host that may ever be under way.
pub const HOST_LEASES_MAX: f64 = 4096.0;
/// How long a host that complains without naming a time is left alone.
pub const HOST_PAUSE_DEFAULT: Duration = Duration::from_secs(2);
/// The longest pause that is heeded: a mistaken or false report must not stop a cluster for an hour.
pub const HOST_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Failed parents that are remembered for one node on one task.
pub const EXCLUDED_MAX: usize = 64;
/// False claims that one node may report in a minute; each costs a signature's verification, and two
/// nodes with one each shut a liar out.
pub const ACCUSATIONS_PER_MINUTE_MAX: u32 = 64;
/// Blobs that one node may announce in a minute: all that it may have, four times over.
pub const ANNOUNCEMENTS_PER_MINUTE_MAX: u32 = 64 * 1024;
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
    /// Nodes at most, some 700 bytes each, and 1 KiB where many paths have been measured.
    pub nodes_max: usize,
    /// Tasks at most; beyond it the one that was idle longest is forgotten.
    pub tasks_max: usize,
    /// Tasks of one node at most: one node that announces without end must not use up all memberships.
    pub tasks_per_node_max: usize,
    /// Memberships of nodes in tasks at most, some 500 bytes each and a bit for each piece.
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
            nodes_max: 128 * 1024,
            tasks_max: 64 * 1024,
            tasks_per_node_max: 16 * 1024,
            memberships_max: 4 * 1024 * 1024,
            pieces_max: 16 * 1024 * 1024,
            holding_bits_max: 1 << 33,
        }
    }
}
