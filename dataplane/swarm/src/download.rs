//! The machine itself: what it knows, and how each input changes that.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use pantala_wire::{NodeId, PieceIndex, PieceLayout, PieceRun, PieceSet, Priority};

use crate::audit::Audit;
use crate::demand::Demand;
use crate::lease::{Ask, Leases};
use crate::origin::Origin;
use crate::parents::Parents;
use crate::requests::{Request, Requests, Target};
use crate::{
    Action, Author, Blame, Candidate, DownloadConfig, FailReason, Failure, Gone, Input, State,
};
use crate::{RequestId, plan::Plan};

/// Shortest and longest pause that control's `retry_after` is taken as: it must neither make a node
/// spin nor stop it. Zero means that something has come free: a longer pause would leave the source
/// idle between two leases.
const LEASE_WAIT_MIN: Duration = Duration::from_millis(1);
const LEASE_WAIT_MAX: Duration = Duration::from_secs(5);

/// The download of one blob.
///
/// Calling contract: [`handle`](Self::handle) for each input, then
/// [`poll_action`](Self::poll_action) until `None`, then [`next_timeout`](Self::next_timeout).
/// `now` never goes back. Report `ControlUp` and `SourceChanged` before the first `Want`: both
/// start as "no".
///
/// Once it has failed it takes no more input. Once it is complete it still takes `PieceLost`, and
/// repairs the piece if somebody wants it.
#[derive(Debug)]
pub struct Download {
    pub(crate) config: DownloadConfig,
    pub(crate) layout: PieceLayout,
    pub(crate) seed: u64,
    pub(crate) now: Duration,
    pub(crate) state: State,
    pub(crate) held: PieceSet,
    pub(crate) demand: Demand,
    pub(crate) parents: Parents,
    pub(crate) requests: Requests,
    pub(crate) plan: Plan,
    pub(crate) leases: Leases,
    pub(crate) origin: Origin,
    pub(crate) audit: Audit,
    /// Groups written of pieces whose request to a parent ended early.
    pub(crate) partial: BTreeMap<u32, u32>,
    /// Pieces on which parents disagreed: each is fetched whole from one parent.
    pub(crate) whole_only: PieceSet,
    /// Since when an urgent piece has been neither in flight nor offered.
    pub(crate) unserved: BTreeMap<u32, Duration>,
    /// A look through all missing pieces found none for which only the source is left; saves
    /// looking again with each piece of a large blob.
    pub(crate) all_served: bool,
    /// When a piece appeared last in the swarm.
    pub(crate) grown_at: Duration,
    /// When this download progressed last, or began to need something.
    pub(crate) progressed_at: Duration,
    /// Since when nothing and nobody can help.
    pub(crate) helpless_since: Option<Duration>,
    /// Since when nothing has been missing.
    pub(crate) satisfied_since: Option<Duration>,
    pub(crate) losses_count: u32,
    pub(crate) last_fault: String,
    pub(crate) actions: VecDeque<Action>,
    pub(crate) dirty: bool,
    pub(crate) wake: Option<Duration>,
}

impl Download {
    /// A download of a blob cut as `layout`, of which `held` is there. `seed` spreads the choices
    /// of nodes that are in the same situation: give each node another.
    pub fn new(
        config: DownloadConfig,
        layout: PieceLayout,
        held: PieceSet,
        seed: u64,
        now: Duration,
    ) -> Self {
        let piece_count = layout.piece_count();
        let held = if held.piece_count() == piece_count {
            held
        } else {
            PieceSet::empty(piece_count)
        };
        Self {
            demand: Demand::new(layout, config.lookahead_pieces.max(1)),
            parents: Parents::new(piece_count, seed),
            requests: Requests::default(),
            plan: Plan::default(),
            leases: Leases::new(piece_count),
            origin: Origin::new(),
            audit: Audit::new(piece_count),
            partial: BTreeMap::new(),
            whole_only: PieceSet::empty(piece_count),
            unserved: BTreeMap::new(),
            all_served: false,
            grown_at: now,
            progressed_at: now,
            helpless_since: None,
            satisfied_since: Some(now),
            losses_count: 0,
            last_fault: "nothing was tried yet".into(),
            actions: VecDeque::new(),
            dirty: true,
            wake: None,
            state: State::Running,
            config,
            layout,
            seed,
            now,
            held,
        }
    }

    /// Says who vouches for a piece held from the start.
    pub fn set_author(&mut self, piece: PieceIndex, author: Author) {
        self.audit.set_author(piece, author);
    }

    /// The next thing to do, or `None` when all is set going.
    pub fn poll_action(&mut self) -> Option<Action> {
        if self.actions.is_empty() && self.dirty {
            self.dirty = false;
            self.decide();
        }
        self.actions.pop_front()
    }

    /// When to call [`handle`](Self::handle) with [`Input::Tick`] if nothing else happens before;
    /// in the same time as `now`.
    pub fn next_timeout(&self) -> Option<Duration> {
        if self.dirty || !self.actions.is_empty() {
            return Some(self.now);
        }
        self.wake
    }

    /// Where the download stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The pieces held.
    pub fn held(&self) -> &PieceSet {
        &self.held
    }

    /// Takes in what happened at `now`, a time since an arbitrary but fixed moment.
    pub fn handle(&mut self, now: Duration, input: Input) {
        self.now = self.now.max(now);
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        self.dirty = true;
        match input {
            Input::Want {
                reader,
                range,
                priority,
            } => self.demand.want(reader, range, priority),
            Input::Unwant { reader } => self.demand.unwant(reader),
            Input::FetchAll { priority } => self.demand.fill(Some(priority.max(Priority::Bulk))),
            Input::FetchAllEnd => self.demand.fill(None),
            Input::ControlUp if !self.leases.up => self.leases.set_up(true),
            Input::ControlDown => self.leases.set_up(false),
            Input::Parents(candidates) => self.parents_listed(&candidates),
            Input::Have {
                parent,
                runs,
                complete,
            } => self.offered(parent, &runs, complete),
            Input::ParentGone { parent, reason } => self.parent_gone(parent, reason),
            Input::Lease { pieces, expires_in } => self.lease_granted(pieces, expires_in),
            Input::ShutOut(nodes) => self.audit.suspect(&nodes),
            Input::LeaseCut { pieces } => self.lease_cut(pieces),
            Input::LeaseWait {
                retry_after,
                sharing_count,
            } => {
                self.leases.sharing_count = sharing_count;
                let until = self.now + retry_after.clamp(LEASE_WAIT_MIN, LEASE_WAIT_MAX);
                self.leases.answered(Ask::Wait { until });
            }
            Input::Progress { request, groups } => self.progressed(request, groups),
            Input::PieceDone {
                request,
                piece,
                author,
            } => self.piece_done(request, piece, author),
            Input::RequestDone { request } => {
                // A request that ends with pieces owing has failed, whatever the shell calls it.
                let owing = Failure::Retry {
                    after: None,
                    detail: "the transfer ended before its last piece".into(),
                };
                self.request_failed(request, owing);
            }
            Input::RequestFailed { request, failure } => self.request_failed(request, failure),
            Input::SourceChanged { available } => self.origin.set_available(available),
            Input::StoreFailed { reason } => self.fail(FailReason::Store(reason)),
            Input::PieceLost { piece } => self.piece_lost(piece),
            Input::Verified { ok } => self.verified(ok),
            Input::Rechecked { piece, outcome } => self.rechecked(piece, outcome),
            Input::ControlUp | Input::Tick => {}
        }
    }

    fn parents_listed(&mut self, candidates: &[Candidate]) {
        self.parents.list(&self.config, candidates, self.now);
        self.make_room_for_listed();
    }

    fn offered(&mut self, parent: NodeId, runs: &[PieceRun], complete: bool) {
        let Some(new) = self.parents.offer(parent, runs, complete, self.now) else {
            return;
        };
        self.pieces_opened();
        if new
            .iter()
            .any(|&piece| !self.held.contains(PieceIndex(piece)))
        {
            self.grown_at = self.now;
        }
    }

    fn parent_gone(&mut self, parent: NodeId, reason: Gone) {
        if !self.parents.get(parent).is_some_and(|p| p.is_linked()) {
            return;
        }
        self.last_fault = format!("parent {}: {reason:?}", parent.short());
        match reason {
            Gone::Lied => self.blame_parent(parent),
            Gone::Dropped => self.drop_parent(parent, false, false),
            Gone::Unreachable | Gone::Closed | Gone::Refused => {
                self.drop_parent(parent, true, false);
            }
        }
    }

    fn progressed(&mut self, id: RequestId, groups: u32) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        // Only growth is progress, so that all progress comes to an end.
        if groups <= request.groups {
            return;
        }
        request.groups = groups;
        request.progressed = now;
        self.progressed_at = now;
        if let Some(parent) = request.parent().and_then(|id| self.parents.get_mut(id)) {
            parent.progressed = now;
        }
    }

    fn piece_done(&mut self, from: Option<RequestId>, piece: PieceIndex, author: Author) {
        let now = self.now;
        if piece.0 >= self.layout.piece_count() {
            return;
        }
        match from.and_then(|id| self.requests.get_mut(id)) {
            Some(request) => {
                request.progressed = now;
                match request.target {
                    Target::Parent { parent, .. } => {
                        if let Some(parent) = self.parents.get_mut(parent) {
                            parent.delivered(&self.config, now);
                        }
                    }
                    Target::Source { .. } => self.origin.succeeded(),
                }
            }
            None if self.held.contains(piece) => return,
            None => {}
        }
        for id in self.requests.take_piece(piece.0) {
            self.carrier_relieved(id, piece.0, from == Some(id));
        }
        self.partial.remove(&piece.0);
        self.leases.pieces.remove(&piece.0);
        if self.held.insert(piece) {
            self.audit.set_author(piece, author);
            self.demand.piece_held(piece);
            self.progressed_at = now;
        }
    }

    /// A request has one piece less to bring, because it has or because another did.
    fn carrier_relieved(&mut self, id: RequestId, piece: u32, brought_it: bool) {
        let next = self.requests.next_piece(id);
        let Some(request) = self.requests.get(id) else {
            return;
        };
        // What is left of an overrun lease may be another node's by now.
        let overrun = brought_it
            && request.target == (Target::Source { leased: true })
            && next.is_some_and(|next| !self.leases.covers(next, self.now));
        if next.is_some() && !overrun {
            return;
        }
        let at_its_end = brought_it && piece + 1 == request.run.range().end;
        self.end_request(id);
        if overrun {
            self.pieces_opened();
        }
        if !at_its_end {
            self.actions.push_back(Action::Cancel { request: id });
        }
    }

    /// Takes a request out of all books, and remembers what it has written.
    pub(crate) fn end_request(&mut self, id: RequestId) -> Option<Request> {
        let request = self.requests.end(id)?;
        if let Target::Parent {
            parent,
            first_group,
        } = request.target
        {
            let piece = request.run.first;
            if let Some(parent) = self.parents.get_mut(parent) {
                parent.request_ended(self.now);
            }
            let written = first_group + request.groups;
            let known = self.partial.get(&piece).copied().unwrap_or(0);
            // The last group is asked for again: a request for nothing would bring no digests.
            let useful = written.min(self.layout.groups_in(PieceIndex(piece)).saturating_sub(1));
            let keep = !self.held.contains(PieceIndex(piece))
                && !self.whole_only.contains(PieceIndex(piece));
            if keep && useful > known {
                self.partial.insert(piece, useful);
            }
        }
        Some(request)
    }

    /// Ends a request that the shell still works on.
    pub(crate) fn cancel(&mut self, id: RequestId) -> Option<Request> {
        let request = self.end_request(id)?;
        self.pieces_opened();
        self.actions.push_back(Action::Cancel { request: id });
        Some(request)
    }

    fn request_failed(&mut self, id: RequestId, failure: Failure) {
        let Some(request) = self.end_request(id) else {
            return;
        };
        self.pieces_opened();
        match request.target {
            Target::Parent { parent, .. } => {
                self.last_fault = format!("parent {}: {failure:?}", parent.short());
                self.parent_request_failed(parent, request.run.first, &failure);
            }
            Target::Source { .. } => self.source_failed(&failure, request.started),
        }
    }

    fn parent_request_failed(&mut self, parent: NodeId, piece: u32, failure: &Failure) {
        match failure {
            Failure::Unreachable | Failure::Stalled => self.drop_parent(parent, true, true),
            Failure::Busy => {
                if self.parents.busy(&self.config, parent, self.now) {
                    self.drop_parent(parent, true, true);
                }
            }
            Failure::NotHeld => self.parents.deny(parent, piece),
            Failure::Lied => {
                self.partial.remove(&piece);
                self.blame_parent(parent);
            }
            Failure::Conflict => {
                self.whole_only.insert(PieceIndex(piece));
                self.partial.remove(&piece);
                let others: Vec<RequestId> = self.requests.carriers(piece).collect();
                for other in others {
                    if self
                        .requests
                        .get(other)
                        .is_some_and(|r| r.parent().is_some())
                    {
                        self.cancel(other);
                    }
                }
            }
            Failure::Refused { .. }
            | Failure::Retry { .. }
            | Failure::Fatal(_)
            | Failure::Unauthorised => {
                self.parents.deny(parent, piece);
                let given_up = self.parents.get_mut(parent).is_some_and(|p| {
                    p.strikes += 1;
                    p.is_given_up(&self.config)
                });
                if given_up {
                    self.drop_parent(parent, true, true);
                }
            }
        }
    }

    pub(crate) fn source_failed(&mut self, failure: &Failure, started: Duration) {
        self.last_fault = match failure {
            Failure::Retry { detail, .. } | Failure::Fatal(detail) => format!("source: {detail}"),
            other => format!("source: {other:?}"),
        };
        self.origin.failed(&self.config, failure, started, self.now);
        // Another node may have a better way to the source.
        self.return_idle_leases();
    }

    /// Ends the subscription to a parent and all its requests.
    pub(crate) fn drop_parent(&mut self, parent: NodeId, strike: bool, tell_shell: bool) {
        for id in self.requests.of_parent(parent) {
            self.cancel(id);
        }
        if tell_shell && self.parents.get(parent).is_some_and(|p| p.is_linked()) {
            self.actions.push_back(Action::Unsubscribe {
                parent,
                failed: strike,
            });
        }
        self.parents.unlink(&self.config, parent, strike, self.now);
        self.pieces_opened();
    }

    /// Shuts a parent out that gave wrong data.
    fn blame_parent(&mut self, parent: NodeId) {
        // Groups that it sent may lie under any piece that it was bringing.
        let pieces: Vec<u32> = self
            .requests
            .of_parent(parent)
            .iter()
            .filter_map(|id| self.requests.get(*id).map(|r| r.run.first))
            .collect();
        self.shut_out(parent, Blame::WrongBytes);
        for piece in pieces {
            self.partial.remove(&piece);
        }
    }

    pub(crate) fn shut_out(&mut self, node: NodeId, why: Blame) {
        self.drop_parent(node, true, true);
        if !self.parents.is_shut_out(node) || why != Blame::WrongBytes {
            self.actions.push_back(Action::Blame { node, why });
        }
        self.parents.shut_out(&self.config, node, self.now);
    }

    fn piece_lost(&mut self, piece: PieceIndex) {
        if !self.held.remove(piece) {
            return;
        }
        self.losses_count += 1;
        if self.losses_count > self.config.losses_max {
            let count = self.losses_count;
            return self.fail(FailReason::Store(format!("{count} pieces rotted")));
        }
        self.partial.remove(&piece.0);
        self.demand.piece_lost();
        self.pieces_opened();
        self.verification_outdated();
    }

    /// Wakes the shell at `at` if nothing else happens before.
    pub(crate) fn wake_at(&mut self, at: Duration) {
        // An instant that has passed and was acted on already must not make the shell spin.
        if at > self.now {
            self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
        }
    }

    /// Pieces may have become open, or lost the last parent that offered them.
    pub(crate) fn pieces_opened(&mut self) {
        self.plan.dirty = true;
        self.all_served = false;
    }

    /// A wanted piece that is missing and not on its way.
    pub(crate) fn is_open(&self, piece: u32) -> bool {
        self.demand.missing().contains(PieceIndex(piece)) && !self.requests.is_in_flight(piece)
    }
}
