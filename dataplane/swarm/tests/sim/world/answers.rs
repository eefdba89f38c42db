//! What peers, the source and control do, and the verdict at the end.

use super::*;

impl World {
    pub(super) fn subscribe_arrived(
        &mut self,
        child: usize,
        epoch: u32,
        parent: usize,
        token: u64,
    ) {
        if !self.current(child, epoch)
            || self.nodes[child].subscriptions.get(&parent) != Some(&token)
        {
            return;
        }
        let delay = self.delay();
        if !self.nodes[parent].alive {
            if self.scenario.nodes[parent].crashes_at.is_some_and(|c| c.1) {
                return; // no answer at all
            }
            let reason = Gone::Unreachable;
            return self.after(
                delay,
                Event::Gone {
                    child,
                    token,
                    parent,
                    reason,
                },
            );
        }
        self.nodes[parent].children.insert(child, token);
        let stored = self.nodes[parent].store.iter().enumerate();
        let pieces = stored.filter_map(|(p, s)| s.map(|_| p as u32)).collect();
        let complete = self.nodes[parent].completed;
        self.after(
            delay,
            Event::Have {
                child,
                token,
                parent,
                pieces,
                complete,
            },
        );
    }

    pub(super) fn tell_children(&mut self, parent: usize, pieces: &[u32], complete: bool) {
        for (child, token) in self.nodes[parent].children.clone() {
            // One delay for all, so that what was said first arrives first.
            let delay = Duration::from_millis(self.scenario.delay_ms_max);
            let pieces = pieces.to_vec();
            self.after(
                delay,
                Event::Have {
                    child,
                    token,
                    parent,
                    pieces,
                    complete,
                },
            );
        }
    }

    pub(super) fn upload_ended(&mut self, parent: usize, step: u32) {
        if step > 0 {
            let uploads = &mut self.nodes[parent].active_uploads;
            *uploads = uploads.saturating_sub(1);
        }
    }

    pub(super) fn peer_failed(&mut self, child: usize, request: RequestId, failure: Failure) {
        let delay = self.delay();
        self.deliver(child, delay, Input::RequestFailed { request, failure });
    }

    pub(super) fn peer_step(
        &mut self,
        child: usize,
        parent: usize,
        request: RequestId,
        piece: u32,
        step: u32,
    ) {
        let habit = self.scenario.nodes[parent].habit;
        if !self.nodes[child].live.contains_key(&request) {
            return self.upload_ended(parent, step);
        }
        if !self.nodes[parent].alive {
            if !self.scenario.nodes[parent].crashes_at.is_some_and(|c| c.1) {
                self.peer_failed(child, request, Failure::Unreachable);
            }
            return;
        }
        let Some(stored) = self.nodes[parent].store[piece as usize] else {
            self.upload_ended(parent, step);
            return self.peer_failed(child, request, Failure::NotHeld);
        };
        match habit {
            Habit::Busy if step == 0 && self.rng.chance(70) => {
                return self.peer_failed(child, request, Failure::Busy);
            }
            Habit::Forgets if step == 0 && self.rng.chance(30) => {
                return self.peer_failed(child, request, Failure::NotHeld);
            }
            Habit::Stalls if self.rng.chance(10) => return self.upload_ended(parent, step),
            Habit::Lies if step == 2 && self.rng.chance(50) => {
                self.upload_ended(parent, step);
                return self.peer_failed(child, request, Failure::Lied);
            }
            _ => {}
        }
        if let Author::Other(id) = stored.author
            && self.nodes[child].blamed.contains(&node_index(id))
        {
            self.upload_ended(parent, step);
            let detail = "its author is shut out".into();
            return self.peer_failed(child, request, Failure::Refused { detail });
        }
        if step == STEPS {
            self.upload_ended(parent, step);
            let author = match stored.author {
                Author::This => Author::Other(node_id(parent)),
                other => other,
            };
            let version = stored.version;
            return self.piece_arrived(child, request, piece, Stored { version, author }, true);
        }
        if step == 0 {
            self.nodes[parent].active_uploads += 1;
        } else {
            self.input(
                child,
                Input::Progress {
                    request,
                    groups: step * 4,
                },
            );
        }
        let uploads = self.nodes[parent].active_uploads.max(1);
        let slow = if habit == Habit::Slow { 30 } else { 1 };
        let took = self.scenario.peer_step * uploads * slow;
        let epoch = self.nodes[child].epoch;
        self.after(
            took,
            Event::PeerStep {
                child,
                epoch,
                parent,
                request,
                piece,
                step: step + 1,
            },
        );
    }

    /// A piece is verified and stored at `node`.
    pub(super) fn piece_arrived(
        &mut self,
        node: usize,
        request: RequestId,
        piece: u32,
        stored: Stored,
        last: bool,
    ) {
        let new = self.nodes[node].store[piece as usize].is_none();
        let author = stored.author;
        if new {
            self.nodes[node].store[piece as usize] = Some(stored);
        }
        if last {
            self.nodes[node].live.remove(&request);
        }
        for live in self.nodes[node].live.values_mut() {
            live.left.remove(&piece);
        }
        let from = Some(request);
        self.input(
            node,
            Input::PieceDone {
                request: from,
                piece: PieceIndex(piece),
                author,
            },
        );
        if last {
            self.input(node, Input::RequestDone { request });
        }
        if new {
            self.tell_children(node, &[piece], false);
            let delay = self.delay();
            self.after(
                delay,
                Event::Announced {
                    node,
                    pieces: vec![piece],
                },
            );
            if self.nodes[node].reader_at.is_some() {
                self.want(node);
            }
        }
    }

    pub(super) fn source_step(
        &mut self,
        node: usize,
        request: RequestId,
        run: PieceRun,
        piece: u32,
        step: u32,
    ) {
        let fault = self.scenario.source_fault(self.now);
        let failure = match fault {
            Some(SourceFault::Gone) => Some(Failure::Fatal("404".into())),
            Some(SourceFault::TooMany) => Some(Failure::Retry {
                after: Some(self.rng.ms(50, 1500)),
                detail: "429".into(),
            }),
            Some(SourceFault::Cut) if self.rng.chance(15) => Some(Failure::Retry {
                after: None,
                detail: "cut".into(),
            }),
            Some(SourceFault::Silent) => return,
            _ => None,
        };
        if let Some(failure) = failure {
            return self.deliver(
                node,
                Duration::ZERO,
                Input::RequestFailed { request, failure },
            );
        }
        let epoch = self.nodes[node].epoch;
        let slow = if fault == Some(SourceFault::Slow) {
            12
        } else {
            1
        };
        let took = self.scenario.source_step * slow;
        let (mut next, mut next_step) = (piece, step + 1);
        if step == STEPS {
            self.source_reads[piece as usize] += 1;
            let forges = self.scenario.nodes[node].habit == Habit::Forges;
            let version = if forges && self.rng.chance(50) {
                node as u32 + 1
            } else {
                0
            };
            let stored = Stored {
                version,
                author: Author::This,
            };
            let last = piece + 1 == run.range().end;
            self.piece_arrived(node, request, piece, stored, last);
            if last {
                return;
            }
            (next, next_step) = (piece + 1, 1);
        } else if step > 0 {
            let groups = (piece - run.first) * 16 + step * 4;
            self.input(node, Input::Progress { request, groups });
        }
        self.after(
            took,
            Event::SourceStep {
                node,
                epoch,
                request,
                run,
                piece: next,
                step: next_step,
            },
        );
    }

    pub(super) fn recheck(&mut self, node: usize, piece: u32) {
        let outcome = match self.scenario.source_fault(self.now) {
            Some(SourceFault::Gone) => Recheck::Failed(Failure::Fatal("404".into())),
            Some(SourceFault::TooMany) => Recheck::Failed(Failure::Retry {
                after: None,
                detail: "429".into(),
            }),
            Some(SourceFault::Silent) => return, // the core's own timer must strike
            _ => match &mut self.nodes[node].store[piece as usize] {
                Some(stored) if stored.version != 0 => {
                    let author = stored.author;
                    *stored = Stored {
                        version: 0,
                        author: Author::This,
                    };
                    Recheck::Replaced { author }
                }
                _ => Recheck::Same,
            },
        };
        self.input(
            node,
            Input::Rechecked {
                piece: PieceIndex(piece),
                outcome,
            },
        );
    }

    pub(super) fn control_asked(&mut self, node: usize, epoch: u32, wanted: &[PieceRun]) {
        if !self.control.up || !self.current(node, epoch) {
            return;
        }
        let now = self.now;
        let free = |control: &Control, piece: u32| {
            let leased = control
                .leases
                .get(&piece)
                .is_some_and(|(_, ends)| *ends > now);
            !leased && control.holders.get(&piece).is_none_or(BTreeSet::is_empty)
        };
        let pieces = wanted.iter().flat_map(|run| run.range());
        let first = pieces.clone().find(|&piece| free(&self.control, piece));
        let delay = self.delay();
        let Some(first) = first else {
            let retry_after = Duration::from_millis(200);
            return self.deliver(
                node,
                delay,
                Input::LeaseWait {
                    retry_after,
                    sharing_count: self.control.members.len() as u32,
                },
            );
        };
        let wanted: BTreeSet<u32> = pieces.collect();
        let count = (first..first + self.scenario.lease_pieces_max)
            .take_while(|p| wanted.contains(p) && free(&self.control, *p))
            .count() as u32;
        let expires_in = self.scenario.lease_time;
        for piece in first..first + count {
            // The node counts from when it hears of it, so control waits a little longer.
            let ends = now + expires_in + Duration::from_millis(100);
            self.control.leases.insert(piece, (node, ends));
        }
        let pieces = PieceRun { first, count };
        self.deliver(node, delay, Input::Lease { pieces, expires_in });
    }

    pub(super) fn push_parents(&mut self) {
        let members: Vec<usize> = self.control.members.iter().copied().collect();
        for &node in &members {
            // Racks of three.
            let others: Vec<Candidate> = members
                .iter()
                .filter(|m| **m != node)
                .map(|m| Candidate {
                    id: node_id(*m),
                    near: *m / 3 == node / 3,
                })
                .collect();
            let delay = self.delay();
            self.deliver(node, delay, Input::Parents(others));
        }
    }

    pub(super) fn check_end(mut self) -> Report {
        let recovers = self.scenario.source_recovers();
        let mut failed = Vec::new();
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            let plan = &self.scenario.nodes[index];
            if !node.alive {
                continue;
            }
            assert!(
                node.live.is_empty() && !node.verifying,
                "node {index} is not done"
            );
            // What a reader has read it no longer wants, though it may rot later.
            let reads_to = plan.reads.map_or(0, |(_, end)| end);
            let wants = |piece: u32| {
                plan.leaves_after.is_none()
                    && (plan.fill
                        || node
                            .reader_at
                            .is_some_and(|at| at <= piece && piece < reads_to))
            };
            let missing = (0..self.scenario.piece_count)
                .filter(|&p| wants(p) && node.store[p as usize].is_none())
                .count();
            match node.core.state() {
                State::Failed(reason) => {
                    let stuck = matches!(reason, pantala_swarm::FailReason::Stuck { .. });
                    assert!(!stuck, "node {index} was stuck: {reason}");
                    let good = recovers && plan.credential;
                    assert!(
                        !good,
                        "node {index} failed though the source recovers: {reason}"
                    );
                    failed.push((index, reason.to_string()));
                }
                state => {
                    assert_eq!(
                        missing, 0,
                        "node {index} ended {state:?} with pieces missing"
                    );
                    let whole = node.store.iter().all(Option::is_some);
                    assert!(
                        !whole || *state == State::Complete,
                        "node {index}: {state:?}"
                    );
                }
            }
        }
        if self.scenario.healthy {
            assert!(failed.is_empty(), "failures in a healthy cluster");
            assert_eq!(
                self.alone_fetches, 0,
                "a node acts alone in a healthy cluster"
            );
            assert!(
                self.source_reads.iter().all(|&n| n <= 1),
                "{:?}",
                self.source_reads
            );
        }
        Report {
            actions_hash: std::mem::take(&mut self.hasher).finish(),
            completed_count: self.nodes.iter().filter(|n| n.completed).count(),
            failed,
            source_pieces: self.source_reads.iter().sum(),
            alone_fetches: self.alone_fetches,
            blames: self.blames,
            hedges: self.hedges,
            ended_at: self.now,
        }
    }
}
