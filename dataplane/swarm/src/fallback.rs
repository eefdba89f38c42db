//! The source: with a lease where control rules, alone where it does not or where waiting has
//! gone on for too long.

use std::time::Duration;

use pantala_wire::{PieceIndex, PieceRun, PieceSet, Priority};

use crate::Action;
use crate::demand::Urgent;
use crate::download::Download;
use crate::lease::Ask;
use crate::requests::Target;
use crate::spread::{is_drawn, spread};

/// The pause before the next lease request when a lease was of no use: it keeps a control that
/// grants nonsense from making this node spin.
const USELESS_LEASE_PAUSE: Duration = Duration::from_millis(50);

/// Keeps the draw apart from other choices made by the same seed.
const DRAW_SALT: u64 = 0x6472_6177;

/// What this node may fetch without a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alone {
    /// Only what a reader has waited for too long.
    Overdue,
    /// What readers wait for.
    Urgent,
    /// The runs that were drawn for this node up to this round, and what is overdue.
    Drawn(u32),
    /// Everything.
    All,
}

impl Download {
    pub(crate) fn lease_granted(&mut self, run: PieceRun, expires_in: Duration) {
        let ends = self.now + expires_in;
        let mut surplus = PieceSet::empty(self.layout.piece_count());
        let mut useful = false;
        for piece in run.first..run.range().end.min(self.layout.piece_count()) {
            let known = self.leases.pieces.contains_key(&piece);
            let full = self.leases.pieces.len() >= self.config.leased_pieces_max as usize;
            let needed = !self.held.contains(PieceIndex(piece));
            if needed && (known || !full) && !expires_in.is_zero() && self.origin.is_usable() {
                self.leases.pieces.insert(piece, ends);
                useful = true;
            } else {
                surplus.insert(PieceIndex(piece));
            }
        }
        self.leases.answered(if useful {
            Ask::Idle
        } else {
            Ask::Wait {
                until: self.now + USELESS_LEASE_PAUSE,
            }
        });
        self.return_leases(&surplus);
    }

    pub(crate) fn lease_cut(&mut self, run: PieceRun) {
        for piece in run.first..run.range().end.min(self.layout.piece_count()) {
            self.leases.pieces.remove(&piece);
        }
    }

    fn return_leases(&mut self, pieces: &PieceSet) {
        for pieces in pieces.runs() {
            for piece in pieces.range() {
                self.leases.pieces.remove(&piece);
            }
            self.actions.push_back(Action::ReturnLease { pieces });
        }
    }

    /// Gives back every leased piece that is not on its way from the source.
    pub(crate) fn return_idle_leases(&mut self) {
        let mut idle = PieceSet::empty(self.layout.piece_count());
        for &piece in self.leases.pieces.keys() {
            if !self.is_leased_in_flight(piece) {
                idle.insert(PieceIndex(piece));
            }
        }
        self.return_leases(&idle);
    }

    fn is_leased_in_flight(&self, piece: u32) -> bool {
        self.requests
            .carriers(piece)
            .any(|id| self.requests.get(id).is_some_and(|r| r.parent().is_none()))
    }

    /// Gives back what is not needed (any more) or has run out.
    fn tidy_leases(&mut self) {
        let mut unneeded = PieceSet::empty(self.layout.piece_count());
        let mut ends = Vec::new();
        let mut overrun = false;
        for (&piece, &end) in &self.leases.pieces {
            let index = PieceIndex(piece);
            let in_flight = self.is_leased_in_flight(piece);
            let wanted = self.demand.missing().contains(index);
            let offered = self.parents.is_offered(piece);
            if !in_flight && (end <= self.now || offered || !wanted) {
                unneeded.insert(index);
                overrun |= wanted && !offered;
            } else if !in_flight {
                ends.push(end);
            }
        }
        if overrun && self.leases.ask == Ask::Idle {
            // A lease too short to be used.
            self.leases.ask = Ask::Wait {
                until: self.now + USELESS_LEASE_PAUSE,
            };
        }
        for end in ends {
            self.wake_at(end);
        }
        self.return_leases(&unneeded);
    }

    /// Everything that concerns the source.
    pub(crate) fn fetch_from_source(&mut self) {
        self.note_unserved();
        if !self.origin.is_usable() || self.demand.missing().is_empty() {
            return self.return_idle_leases();
        }
        self.tidy_leases();
        if self.origin.paused_until() > self.now {
            return self.wake_at(self.origin.paused_until());
        }
        if self.all_served {
            return;
        }
        let missing = self.demand.missing();
        self.all_served = !missing.iter().any(|piece| self.needs_source(piece.0));
        self.fetch_leased();
        self.ask_lease();
        self.fetch_alone();
    }

    /// Starts the clock of urgent pieces that nobody offers or fetches.
    fn note_unserved(&mut self) {
        let old = std::mem::take(&mut self.unserved);
        for urgent in self.demand.window() {
            let piece = urgent.piece;
            if !self.requests.is_in_flight(piece) && !self.parents.is_offered(piece) {
                let since = old.get(&piece).copied().unwrap_or(self.now);
                self.unserved.insert(piece, since);
            }
        }
    }

    /// A piece for which only the source is left.
    fn needs_source(&self, piece: u32) -> bool {
        self.is_open(piece) && !self.parents.is_offered(piece)
    }

    fn fetch_leased(&mut self) {
        while self.requests.to_source_count(true) < self.config.source_fetches_max {
            let usable =
                |piece: u32| self.leases.covers(piece, self.now) && self.needs_source(piece);
            let awaits = self.awaits_first_byte();
            let mut window = self.demand.window().iter();
            let urgent = window.find(|u| usable(u.piece) && (u.fresh || !awaits));
            if urgent.is_none() && awaits {
                return;
            }
            let start = match urgent {
                Some(urgent) => Some((urgent.piece, urgent.priority)),
                None => (self.leases.pieces.keys())
                    .find(|&&piece| usable(piece))
                    .map(|&piece| (piece, self.demand.background(PieceIndex(piece)))),
            };
            let Some((first, priority)) = start else {
                return;
            };
            let max = self.config.source_run_pieces_max.max(1);
            let count = (first..first.saturating_add(max))
                .take_while(|&piece| usable(piece))
                .count() as u32;
            self.start_source(PieceRun { first, count }, true, priority);
        }
    }

    /// A reader has had no byte yet, and the source was asked for its first and has not answered. To ask
    /// the source for more meanwhile would make that one wait longer.
    fn awaits_first_byte(&self) -> bool {
        let is_unanswered = |id| {
            let request = self.requests.get(id);
            request.is_some_and(|r| r.parent().is_none() && r.groups == 0)
        };
        self.demand
            .window()
            .iter()
            .any(|u| u.fresh && self.requests.carriers(u.piece).any(is_unanswered))
    }

    fn start_source(&mut self, pieces: PieceRun, leased: bool, priority: Priority) {
        let target = Target::Source { leased };
        let request = self.requests.start(target, pieces, priority, self.now);
        for piece in pieces.range() {
            self.unserved.remove(&piece);
        }
        self.actions.push_back(Action::FetchSource {
            request,
            pieces,
            leased,
            priority,
        });
    }

    fn ask_lease(&mut self) {
        if !self.leases.up || self.requests.to_source_count(true) >= self.config.source_fetches_max
        {
            return;
        }
        // Others may fetch at once what would only lie here.
        let urges = |u: &Urgent| u.fresh && self.needs_source(u.piece);
        if self.awaits_first_byte() && !self.demand.window().iter().any(urges) {
            return;
        }
        match self.leases.ask {
            Ask::Out { .. } => return,
            Ask::Wait { until } if until > self.now && !self.has_unasked_urgent() => {
                return self.wake_at(until);
            }
            Ask::Idle | Ask::Wait { .. } => {}
        }
        let wanted = self.wanted_from_control();
        let Some(urgent) = wanted.first().map(|run| PieceIndex(run.first)) else {
            return;
        };
        self.leases.ask = Ask::Out { since: self.now };
        self.leases.asked = PieceSet::empty(self.layout.piece_count());
        for &run in &wanted {
            self.leases.asked.insert_run(run);
        }
        // Those that the message had no room for were not worth more either.
        for urgent in self.demand.window() {
            self.leases.asked.insert(PieceIndex(urgent.piece));
        }
        self.actions.push_back(Action::AskLease { wanted, urgent });
    }

    /// A reader waits for a piece that control's "wait" was not about: it has moved, or the parent
    /// that offered the piece is gone.
    fn has_unasked_urgent(&self) -> bool {
        self.demand.window().iter().any(|u| {
            self.unserved.contains_key(&u.piece)
                && !self.leases.asked.contains(PieceIndex(u.piece))
                && !self.leases.pieces.contains_key(&u.piece)
        })
    }

    /// The pieces to ask a lease for, most urgent first.
    fn wanted_from_control(&self) -> Vec<PieceRun> {
        let max = self.config.ask_runs_max.max(1) as usize;
        let askable =
            |piece: u32| self.needs_source(piece) && !self.leases.pieces.contains_key(&piece);
        let mut runs: Vec<PieceRun> = Vec::new();
        let mut named = PieceSet::empty(self.layout.piece_count());
        let mut push = |piece: u32| -> bool {
            if !named.insert(PieceIndex(piece)) {
                return true;
            }
            if let Some(run) = runs.last_mut()
                && run.first + run.count == piece
            {
                run.count += 1;
            } else if runs.len() < max {
                runs.push(PieceRun {
                    first: piece,
                    count: 1,
                });
            } else {
                return false;
            }
            true
        };
        let window = self.demand.window().iter().map(|u| u.piece);
        // After the windows, onwards from where the first reader is, and round.
        let from = self.demand.window().first().map_or(0, |u| u.piece);
        let missing = self.demand.missing();
        let of = |priority| {
            let mine = move |p: &PieceIndex| self.demand.background(*p) == priority;
            let after = missing.iter().filter(move |p| p.0 >= from);
            let before = missing.iter().filter(move |p| p.0 < from);
            after.chain(before).filter(mine).map(|p| p.0)
        };
        for piece in window
            .chain(of(Priority::Bulk))
            .chain(of(Priority::Prefetch))
            .filter(|&piece| askable(piece))
        {
            if !push(piece) {
                break;
            }
        }
        runs
    }

    /// What may be fetched without a lease now.
    fn alone_mode(&mut self) -> Alone {
        let is_ruling = self.leases.is_ruling();
        if is_ruling {
            self.leases.draw = None;
        } else if self.parents.up_count() == 0 {
            return Alone::All;
        }
        let starved_at = self.progressed_at + self.config.starve_patience;
        if starved_at <= self.now {
            return Alone::All;
        }
        self.wake_at(starved_at);
        if !is_ruling {
            return Alone::Drawn(self.draw_round());
        }
        if let Ask::Out { since } = self.leases.ask {
            let impatient_at = since + self.config.control_patience;
            if impatient_at <= self.now {
                return Alone::Urgent;
            }
            self.wake_at(impatient_at);
        }
        Alone::Overdue
    }

    /// The round of the draw by which nodes without control share the source out among themselves. A
    /// round lasts until nothing new has appeared in the swarm for a while.
    fn draw_round(&mut self) -> u32 {
        let (round, since) = self.leases.draw.unwrap_or((0, self.now));
        let ends = since.max(self.grown_at) + self.config.draw_patience;
        let next = match ends <= self.now {
            true => (round + 1, self.now),
            false => (round, since),
        };
        self.leases.draw = Some(next);
        self.wake_at(next.1.max(self.grown_at) + self.config.draw_patience);
        next.0
    }

    /// Whether this node has drawn the run that `piece` lies in. A second copy of what two have drawn
    /// costs more than the rounds until all is drawn.
    fn is_drawn(&self, piece: u32, round: u32) -> bool {
        let run = piece / self.config.alone_run_pieces_max.max(1);
        let sharing_count = self.leases.sharing_count.max(self.parents.up_count() + 1);
        is_drawn(self.seed ^ DRAW_SALT, run, sharing_count, round)
    }

    fn fetch_alone(&mut self) {
        let mode = self.alone_mode();
        while self.requests.to_source_count(false) < self.config.alone_fetches_max {
            let Some((first, priority)) = self.next_alone(mode) else {
                return;
            };
            // While control rules, others are fetching the next ones.
            let max = match mode {
                Alone::All | Alone::Drawn(_) => self.config.alone_run_pieces_max.max(1),
                Alone::Urgent | Alone::Overdue => 1,
            };
            let count = 1
                + (first + 1..first.saturating_add(max))
                    .take_while(|&piece| self.may_begin_alone(piece, mode))
                    .count() as u32;
            self.start_source(PieceRun { first, count }, false, priority);
        }
    }

    fn next_alone(&mut self, mode: Alone) -> Option<(u32, Priority)> {
        for urgent in self.demand.window().to_vec() {
            // While control rules, only the piece that a reader stands at is worth a second copy.
            if mode != Alone::All && !urgent.head || !self.may_go_alone(urgent.piece, mode) {
                continue;
            }
            let is_due = match mode {
                Alone::Urgent | Alone::All => true,
                Alone::Drawn(round) => self.is_drawn(urgent.piece, round),
                Alone::Overdue => false,
            };
            let overdue_at = match self.unserved.get(&urgent.piece) {
                Some(&since) if !is_due => self.overdue_at(since, urgent.fresh),
                _ => self.now,
            };
            if overdue_at <= self.now {
                return Some((urgent.piece, urgent.priority));
            }
            self.wake_at(overdue_at);
        }
        if !matches!(mode, Alone::All | Alone::Drawn(_)) {
            return None;
        }
        // Nodes without control start at different places, and take from each other what the
        // others have fetched meanwhile.
        let from =
            (spread(self.seed, u64::MAX) % u64::from(self.layout.piece_count().max(1))) as u32;
        let missing = self.demand.missing();
        let needs = |p: &PieceIndex| self.may_begin_alone(p.0, mode);
        let piece = missing
            .iter()
            .filter(|p| p.0 >= from)
            .find(needs)
            .or_else(|| missing.iter().find(needs))?;
        Some((piece.0, self.demand.background(piece)))
    }

    /// A piece may be fetched alone, now or once it is overdue.
    fn may_go_alone(&self, piece: u32, mode: Alone) -> bool {
        let is_waited_for = mode != Alone::All && self.unserved.contains_key(&piece);
        is_waited_for && self.needs_source(piece) || self.may_begin_alone(piece, mode)
    }

    /// A piece may be fetched alone though no reader has waited for it.
    fn may_begin_alone(&self, piece: u32, mode: Alone) -> bool {
        let is_mine = match mode {
            Alone::All => true,
            Alone::Drawn(round) => self.is_drawn(piece, round),
            Alone::Overdue | Alone::Urgent => false,
        };
        is_mine && self.needs_source(piece)
    }

    /// When a piece that has been unserved since then has waited for too long. While other pieces
    /// keep appearing in the swarm, whoever fetches this one is given more time.
    fn overdue_at(&self, since: Duration, fresh: bool) -> Duration {
        let (patience, max) = if fresh {
            (self.config.first_wait_patience, self.config.first_wait_max)
        } else {
            (self.config.lease_wait_patience, self.config.lease_wait_max)
        };
        (since.max(self.grown_at) + patience).min(since + max)
    }
}
