//! How a download ends: verified, or given up.

use pantala_wire::{NodeId, PieceIndex, PieceRun, PieceSet};

use crate::audit::Check;
use crate::download::Download;
use crate::parents::Link;
use crate::spread::is_drawn;
use crate::{Action, Author, Blame, FailReason, Recheck, RequestId, State};

/// Keeps the draw of an audit apart from other choices made by the same seed.
const AUDIT_SALT: u64 = 0x6175_6469;
/// A request for no more pieces than this is let finish though nobody wants them any more.
const FINISHED_PIECES_MAX: u32 = 2;

impl Download {
    /// One round of decisions: everything that can be set going now is.
    pub(crate) fn decide(&mut self) {
        self.wake = None;
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        if self.demand.refresh(&self.held) {
            self.pieces_opened();
            self.cancel_unwanted();
        }
        if self.demand.missing().is_empty() {
            self.progressed_at = self.now;
        } else {
            self.satisfied_since = None;
        }
        self.expire();
        self.keep_parents();
        self.parents.share_out_bulk(&self.config);
        self.fetch_urgent();
        self.fetch_bulk();
        self.hedge();
        self.fetch_from_source();
        self.check_whole();
        self.judge();
        // Last, for what was just begun has deadlines too.
        self.note_deadlines();
        if matches!(self.state, State::Failed(_)) {
            self.wake = None;
        }
    }

    /// Stops what nobody waits for any more, unless it will be over in a moment: the bytes of a
    /// piece that is cut off have left the source for nothing, and a client that reads small ranges
    /// is back for the next one at once.
    fn cancel_unwanted(&mut self) {
        let wanted = |run: PieceRun| {
            run.range()
                .any(|piece| self.demand.missing().contains(PieceIndex(piece)))
        };
        let unwanted: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, request)| request.run.count > FINISHED_PIECES_MAX && !wanted(request.run))
            .map(|(id, _)| id)
            .collect();
        for id in unwanted {
            self.cancel(id);
        }
    }

    fn check_whole(&mut self) {
        if self.state == State::Complete || matches!(self.state, State::Failed(_)) {
            return;
        }
        if !self.held.is_full() {
            self.state = State::Running;
            return;
        }
        self.state = State::Verifying;
        match self.audit.check {
            Check::Asked { .. } => {}
            Check::Open => self.ask_verify(),
            Check::Auditing => self.step_audit(),
        }
    }

    fn ask_verify(&mut self) {
        self.audit.check = Check::Asked { stale: false };
        self.actions.push_back(Action::Verify);
    }

    /// A piece was lost: what is known of the whole no longer counts.
    pub(crate) fn verification_outdated(&mut self) {
        if self.state == State::Complete {
            self.state = State::Running;
        }
        if let Check::Asked { stale } = &mut self.audit.check {
            *stale = true;
        }
    }

    pub(crate) fn verified(&mut self, ok: bool) {
        let Check::Asked { stale } = self.audit.check else {
            return;
        };
        self.audit.check = Check::Open;
        if stale {
            return;
        }
        if ok {
            self.release_all();
            self.state = State::Complete;
            self.actions.push_back(Action::Complete);
            return;
        }
        self.last_fault = "the blob's sha256 is wrong".into();
        if !self.audit.queue.is_empty() {
            // An audit was interrupted because the culprit seemed found; it goes on.
            self.audit.check = Check::Auditing;
        } else if self.audit.audits_count > 0 && self.audit.replaced_count == 0
            || self.audit.audits_count >= self.config.audits_max
        {
            self.fail(FailReason::SourceCorrupt);
        } else {
            self.audit.begin(&self.held);
        }
    }

    fn step_audit(&mut self) {
        if !self.origin.is_usable() {
            let why = match self.origin.dead_reason() {
                Some(FailReason::Source(detail)) => detail.clone(),
                Some(_) => "it refuses the credentials".into(),
                None => "the node has no credentials for it".into(),
            };
            return self.fail(FailReason::Unaudited(why));
        }
        if self.audit.is_ready_to_verify() {
            self.audit.tried();
            return self.ask_verify();
        }
        if self.origin.paused_until() > self.now {
            return self.wake_at(self.origin.paused_until());
        }
        let round = self.audit_round();
        let (seed, sharing_count) = (self.seed, self.leases.sharing_count);
        let drawn = move |piece| is_drawn(seed ^ AUDIT_SALT, piece, sharing_count, round);
        while self.audit.outstanding.len() < self.config.rechecks_in_flight_max.max(1) as usize {
            let Some(piece) = self.audit.next(drawn) else {
                break;
            };
            self.audit.outstanding.insert(piece, self.now);
            let piece = PieceIndex(piece);
            self.actions.push_back(Action::Recheck { piece });
        }
        self.progressed_at = self.now;
    }

    /// The round of the draw by which the nodes of a swarm share an audit out: all of them have the same
    /// wrong bytes, and each asking for each piece would read the source once a node. Who finds the
    /// liar tells control, and control all others.
    fn audit_round(&mut self) -> u32 {
        let patience = match self.leases.is_ruling() {
            true => self.config.audit_patience,
            false => self.config.audit_patience_alone,
        };
        let (round, since) = self.audit.draw.unwrap_or((0, self.now));
        let draw = match since + patience <= self.now {
            true => (round + 1, self.now),
            false => (round, since),
        };
        self.audit.draw = Some(draw);
        self.wake_at(draw.1 + patience);
        draw.0
    }

    pub(crate) fn rechecked(&mut self, piece: PieceIndex, outcome: Recheck) {
        let Some(since) = self.audit.outstanding.remove(&piece.0) else {
            return;
        };
        match outcome {
            Recheck::Same => self.origin.succeeded(),
            Recheck::Replaced { author } => {
                self.origin.succeeded();
                self.audit.replaced(piece.0, author);
                if let Author::Other(node) = author {
                    self.shut_out(node, Blame::FalseClaim(piece));
                }
            }
            Recheck::Failed(failure) => {
                self.audit.queue.push_front(piece.0);
                self.source_failed(&failure, since);
            }
        }
    }

    /// Whether anything or anybody can still help, and whether to wait any longer.
    fn judge(&mut self) {
        if self.state != State::Running || self.demand.missing().is_empty() {
            self.helpless_since = None;
            return;
        }
        let give_up_at = self.progressed_at + self.config.give_up_after;
        if give_up_at <= self.now {
            return self.fail(FailReason::Stuck {
                idle_s: self.config.give_up_after.as_secs(),
                last: self.last_fault.clone(),
            });
        }
        self.wake_at(give_up_at);
        let missing = self.demand.missing();
        let hopeful = self.origin.is_usable()
            || !self.requests.is_empty()
            || missing.iter().any(|p| self.parents.is_offered(p.0));
        if hopeful {
            self.helpless_since = None;
            return;
        }
        let lonely = !self.parents.iter().any(|(_, p)| match p.link {
            Link::Up | Link::Asked { .. } => true,
            Link::Idle { .. } => p.listed && !p.is_given_up(&self.config),
        });
        let patience = if lonely {
            self.config.lonely_patience
        } else {
            self.config.helpless_patience
        };
        let since = *self.helpless_since.get_or_insert(self.now);
        if since + patience <= self.now {
            let reason = self.origin.dead_reason().cloned();
            return self.fail(reason.unwrap_or_else(|| FailReason::NoSource {
                last: self.last_fault.clone(),
            }));
        }
        self.wake_at(since + patience);
    }

    pub(crate) fn fail(&mut self, reason: FailReason) {
        self.release_all();
        self.state = State::Failed(reason.clone());
        self.actions.push_back(Action::Fail { reason });
    }

    /// Lets go of everything that the shell holds for this download.
    fn release_all(&mut self) {
        let requests: Vec<RequestId> = self.requests.iter().map(|(id, _)| id).collect();
        for id in requests {
            self.cancel(id);
        }
        let linked: Vec<NodeId> = self
            .parents
            .iter()
            .filter(|(_, p)| p.is_linked())
            .map(|(id, _)| id)
            .collect();
        for id in linked {
            self.drop_parent(id, false, true);
        }
        self.return_idle_leases();
        self.audit.outstanding.clear();
        self.audit.queue.clear();
        self.partial.clear();
    }

    /// What is wrong with the books, if anything: for tests that drive a download and check after
    /// each step, with [`next_timeout`](Self::next_timeout), that nothing can wait for ever.
    #[doc(hidden)]
    pub fn inconsistency(&self) -> Option<String> {
        if matches!(self.state, State::Failed(_)) {
            return (!self.requests.is_empty()).then(|| "requests after the end".into());
        }
        if self.dirty || !self.actions.is_empty() {
            return None;
        }
        let mut missing = self.demand.missing().clone();
        for piece in self.held.iter() {
            if missing.remove(piece) {
                return Some(format!("piece {piece} is held and missing"));
            }
        }
        if !missing.is_empty() && self.wake.is_none() {
            return Some("pieces are missing and no timer runs".into());
        }
        if self.wake.is_some_and(|at| at <= self.now) {
            return Some("a timer is due that was acted on".into());
        }
        let mut offered = PieceSet::empty(self.layout.piece_count());
        for (id, parent) in self.parents.iter() {
            let carried = self.requests.of_parent(id).len() as u32;
            if carried != parent.outstanding_count {
                let counted = parent.outstanding_count;
                return Some(format!("{id:?} carries {carried}, counted {counted}"));
            }
            for piece in 0..self.layout.piece_count() {
                if parent.offers(piece) {
                    offered.insert(PieceIndex(piece));
                }
            }
        }
        (0..self.layout.piece_count())
            .find(|&p| offered.contains(PieceIndex(p)) != self.parents.is_offered(p))
            .map(|p| format!("piece {p}: offers and their count differ"))
    }
}
