//! The bounds and patiences of a download.

use std::time::Duration;

/// Every limit of a [`Download`](crate::Download), with the reason for its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownloadConfig {
    /// Requests outstanding at one parent. Eight pieces of 1 MiB cover the bandwidth-delay product
    /// of 10 Gbit/s at 6 ms; a quarter of them is kept for urgent pieces.
    pub requests_per_parent_max: u32,
    /// Pieces in flight from all parents together; bounds what a download buffers. A quarter is
    /// kept for urgent pieces.
    pub requests_in_flight_max: u32,
    /// Bulk requests outstanding at all parents together, shared out evenly, one at least for each.
    /// What is asked for early waits in its parent's queue: then every hop of a piece through the swarm
    /// takes longer, and every child asks the first holder of a new piece for it before any other has a
    /// copy. Sixteen pieces of 1 MiB keep 10 Gbit/s busy for 13 ms, many round trips.
    pub bulk_in_flight_target: u32,
    /// Pieces ahead of a waiting reader that are fetched in order and before all bulk work. More
    /// would make every node of a swarm fetch the same pieces at the same time.
    pub lookahead_pieces: u32,
    /// Parents subscribed to at once: more add connections, not throughput.
    pub parents_max: u32,
    /// Candidates remembered from control's list, for when subscribed ones fail.
    pub candidates_max: u32,
    /// A parent that delivers nothing for so long while it owes something loses its requests.
    pub stall_timeout: Duration,
    /// An urgent request without progress for so long may be duplicated at another parent.
    pub hedge_after: Duration,
    /// Duplicates in flight at once: they are wasted work when the first copy wins.
    pub hedges_max: u32,
    /// A subscription that brings no `Have` for so long has failed.
    pub subscribe_timeout: Duration,
    /// The pause after a parent's first failure; it doubles with each further one.
    pub parent_retry: Duration,
    /// The longest pause after a parent's failures.
    pub parent_retry_max: Duration,
    /// The pause of a parent that said it is busy.
    pub busy_retry: Duration,
    /// Failures in a row after which a parent is left alone until control names it again.
    pub strikes_max: u32,
    /// A connected parent that had nothing to give for so long makes room for another candidate.
    pub rotate_after: Duration,
    /// Longest time that a node whose rack may get a piece by another waits before it asks outside.
    pub far_patience: Duration,
    /// Subscriptions end when nothing has been wanted for so long.
    pub unsubscribe_after: Duration,
    /// How long urgent pieces wait for control's answer to a lease request before this node
    /// goes to the source alone.
    pub control_patience: Duration,
    /// A lease request unanswered for so long is lost, and control counts as down until it speaks.
    pub ask_timeout: Duration,
    /// Runs of pieces named in one lease request: bounds the message.
    pub ask_runs_max: u32,
    /// Leased pieces held at once; what control grants above that goes back.
    pub leased_pieces_max: u32,
    /// How long an urgent piece that another node fetches from the source may stay unoffered, and
    /// no other piece appear in the swarm either, before this node fetches it alone.
    pub lease_wait_patience: Duration,
    /// The longest such wait, however the swarm grows meanwhile.
    pub lease_wait_max: Duration,
    /// The same for a reader that has had no byte yet. Going alone costs the source a piece, waiting
    /// too long costs it the whole blob: the client gives up and asks the source itself.
    pub first_wait_patience: Duration,
    /// The longest wait of such a reader. Below the 5 s after which nydusd gives a request up, with
    /// time left for the source to answer.
    pub first_wait_max: Duration,
    /// While control does not answer: without a new piece in the swarm for so long, twice as many nodes go
    /// to the source as before. Several times what the first piece of a run takes.
    pub draw_patience: Duration,
    /// Without any progress for so long, pieces nobody waits for are fetched alone too.
    pub starve_patience: Duration,
    /// Leased source fetches at once; more connections rarely make a registry faster.
    pub source_fetches_max: u32,
    /// Pieces in one source fetch: long enough that its first byte's latency hardly counts.
    pub source_run_pieces_max: u32,
    /// Fetches without a lease at once, besides the leased: what the node may do unasked.
    pub alone_fetches_max: u32,
    /// Pieces in a source fetch without a lease: short, since others may be fetching them too.
    pub alone_run_pieces_max: u32,
    /// A source fetch without progress for so long is cancelled. The source's own, shorter timeouts
    /// strike first; this is the backstop.
    pub source_stall_timeout: Duration,
    /// The pause after the source's first failure; it doubles with each further one.
    pub source_retry: Duration,
    /// The longest pause between tries at the source, whatever its `Retry-After` says.
    pub source_retry_max: Duration,
    /// Failures of the source in a row after which it counts as dead.
    pub source_retries_max: u32,
    /// How long to wait with no source, no parent and no candidate left before failing.
    pub lonely_patience: Duration,
    /// How long to wait with no source while parents are there but have nothing wanted.
    pub helpless_patience: Duration,
    /// A wanted piece and no progress of any kind for so long is a failure, whatever the cause.
    pub give_up_after: Duration,
    /// Pieces asked for again at once in an audit.
    pub rechecks_in_flight_max: u32,
    /// A recheck unanswered for so long has failed.
    pub recheck_timeout: Duration,
    /// Where others share an audit: after so long without a liar found, twice as many pieces are asked for
    /// again. Longer than it takes to ask the source, tell control, and hear from it.
    pub audit_patience: Duration,
    /// The same while control does not answer: nobody hears what others find.
    pub audit_patience_alone: Duration,
    /// Audits of a blob: one that is still wrong after two is wrong at the source.
    pub audits_max: u32,
    /// Held pieces found rotten before the disk is no longer trusted.
    pub losses_max: u32,
}

impl Default for DownloadConfig {
    fn default() -> Self {
        Self {
            requests_per_parent_max: 8,
            requests_in_flight_max: 64,
            bulk_in_flight_target: 16,
            lookahead_pieces: 32,
            parents_max: 16,
            candidates_max: 64,
            stall_timeout: Duration::from_secs(2),
            hedge_after: Duration::from_millis(500),
            hedges_max: 8,
            subscribe_timeout: Duration::from_secs(3),
            parent_retry: Duration::from_millis(500),
            parent_retry_max: Duration::from_secs(15),
            busy_retry: Duration::from_millis(50),
            strikes_max: 6,
            rotate_after: Duration::from_secs(5),
            far_patience: Duration::from_millis(100),
            unsubscribe_after: Duration::from_secs(30),
            control_patience: Duration::from_secs(1),
            ask_timeout: Duration::from_secs(2),
            ask_runs_max: 64,
            leased_pieces_max: 256,
            lease_wait_patience: Duration::from_secs(8),
            lease_wait_max: Duration::from_secs(30),
            first_wait_patience: Duration::from_millis(2500),
            first_wait_max: Duration::from_secs(3),
            draw_patience: Duration::from_millis(500),
            starve_patience: Duration::from_secs(15),
            source_fetches_max: 2,
            source_run_pieces_max: 32,
            alone_fetches_max: 2,
            alone_run_pieces_max: 8,
            source_stall_timeout: Duration::from_secs(5),
            source_retry: Duration::from_millis(250),
            source_retry_max: Duration::from_secs(20),
            source_retries_max: 6,
            lonely_patience: Duration::from_secs(1),
            helpless_patience: Duration::from_secs(10),
            give_up_after: Duration::from_secs(60),
            rechecks_in_flight_max: 4,
            recheck_timeout: Duration::from_secs(30),
            audit_patience: Duration::from_secs(2),
            audit_patience_alone: Duration::from_secs(15),
            audits_max: 2,
            losses_max: 256,
        }
    }
}
