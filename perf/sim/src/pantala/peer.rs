//! What nodes do for each other: the twin of the node's peer service and of its fetches from parents.

use std::collections::VecDeque;
use std::rc::Rc;

use pantala_swarm::{Author, Failure, Gone, Input, RequestId};
use pantala_wire::{GROUP_SIZE, PieceIndex, PieceRun};

use super::node::{Child, Line, Live, NOBODY, Stored, Upload};
use super::queue::{Event, PeerMessage};
use super::{FlowUse, HAVE_INTERVAL, World};
use crate::scenario::Habit;

/// Pieces sent at the same time, for page faults, for waiting clients and for the rest; as in the node.
const SENDS_MAX: [usize; 3] = [16, 32, 32];
/// Requests of all peers at once, sent or waiting for a turn; as in the node.
const REQUESTS_MAX: usize = 512;

impl World {
    pub(super) fn peer_message(&mut self, from: u32, to: u32, epoch: u32, message: PeerMessage) {
        if !self.is_current(to, epoch) {
            return self.nobody_there(from, to, &message);
        }
        match message {
            PeerMessage::Subscribe { blob, token } => self.subscribed(to, from, blob, token),
            PeerMessage::Unsubscribe { blob, token } => {
                if let Some(stored) = self.nodes[to as usize].stores.get_mut(&blob) {
                    stored
                        .children
                        .retain(|c| (c.node, c.token) != (from, token));
                }
            }
            PeerMessage::Fetch {
                blob,
                request,
                piece,
                first_group,
                priority,
            } => self.asked(
                to,
                Upload {
                    child: from,
                    blob,
                    request,
                    piece,
                    first_group,
                    priority,
                },
            ),
            PeerMessage::Cancel { blob, request } => self.upload_cancelled(to, from, blob, request),
            PeerMessage::Have {
                blob,
                token,
                runs,
                complete,
            } => self.heard_of(to, from, blob, token, &runs, complete),
            PeerMessage::Piece {
                blob,
                request,
                piece,
                bad,
                author,
            } => self.piece_came(to, from, blob, request, piece, bad, author),
            PeerMessage::Refusal {
                blob,
                request,
                failure,
            } => {
                self.counts.refusals += 1;
                self.request_failed(to, blob, request, failure);
            }
            PeerMessage::Gone {
                blob,
                token,
                reason,
            } => self.parent_gone(to, from, blob, token, reason),
        }
    }

    /// What was sent to a process that has ended: its machine says so, unless it is silent.
    fn nobody_there(&mut self, from: u32, to: u32, message: &PeerMessage) {
        let it = &self.nodes[to as usize];
        let is_silent = !it.alive && self.referee.is_dead(to);
        let is_for_parent = matches!(
            message,
            PeerMessage::Subscribe { .. } | PeerMessage::Fetch { .. }
        );
        if !is_silent && is_for_parent {
            let delay = self.delay(to, from);
            self.after(
                delay,
                Event::Broken {
                    child: from,
                    parent: to,
                },
            );
        }
    }

    fn subscribed(&mut self, parent: u32, child: u32, blob: u32, token: u64) {
        let piece_count = self.layouts[blob as usize].piece_count();
        let it = &mut self.nodes[parent as usize];
        let child_id_is_out = !it.shut_out.is_empty() && {
            let id = self.nodes[child as usize].id;
            self.nodes[parent as usize].shut_out.contains(&id)
        };
        if child_id_is_out {
            let reason = Gone::Refused;
            let message = PeerMessage::Gone {
                blob,
                token,
                reason,
            };
            return self.send(parent, child, message);
        }
        let stored = self.nodes[parent as usize]
            .stores
            .entry(blob)
            .or_insert_with(|| Stored::new(piece_count));
        stored.children.retain(|other| other.node != child);
        stored.children.push(Child {
            node: child,
            token,
            told_count: 0,
            told_complete: false,
        });
        self.tell_child(parent, blob, child);
    }

    /// Says at once, though it may be nothing, what is held.
    fn tell_child(&mut self, parent: u32, blob: u32, child: u32) {
        let it = &mut self.nodes[parent as usize];
        let boasts = it.habit == Habit::Boasts;
        let Some(stored) = it.stores.get_mut(&blob) else {
            return;
        };
        let runs: Rc<[PieceRun]> = stored.held.runs().into();
        let complete = stored.complete || boasts;
        let log_count = stored.log.len();
        let Some(entry) = stored.children.iter_mut().find(|c| c.node == child) else {
            return;
        };
        entry.told_count = log_count;
        entry.told_complete = complete;
        let token = entry.token;
        self.send_have(parent, child, blob, token, runs, complete);
    }

    fn send_have(
        &mut self,
        parent: u32,
        child: u32,
        blob: u32,
        token: u64,
        runs: Rc<[PieceRun]>,
        complete: bool,
    ) {
        let runs = self.referee.bent_have(runs);
        self.send(
            parent,
            child,
            PeerMessage::Have {
                blob,
                token,
                runs,
                complete,
            },
        );
    }

    /// The children are to hear of what is new, not before the pause after the last time is over.
    pub(super) fn schedule_tell(&mut self, node: u32, blob: u32) {
        let now = self.now;
        let Some(stored) = self.nodes[node as usize].stores.get_mut(&blob) else {
            return;
        };
        if stored.telling || stored.children.is_empty() {
            return;
        }
        stored.telling = true;
        let at = now.max(stored.told_at + HAVE_INTERVAL);
        self.queue.push(at, Event::Tell { node, blob });
    }

    pub(super) fn tell_children(&mut self, node: u32, blob: u32) {
        let now = self.now;
        let it = &mut self.nodes[node as usize];
        let (alive, boasts) = (it.alive, it.habit == Habit::Boasts);
        let Some(stored) = it.stores.get_mut(&blob) else {
            return;
        };
        stored.telling = false;
        stored.told_at = now;
        if !alive {
            return;
        }
        let (complete, log_count) = (stored.complete || boasts, stored.log.len());
        let mut news: Vec<(u32, u64, Rc<[PieceRun]>)> = Vec::new();
        // Most children have been told the same so far.
        let mut last: Option<(usize, Rc<[PieceRun]>)> = None;
        for child in &mut stored.children {
            if child.told_count == log_count && child.told_complete == complete {
                continue;
            }
            let runs = match &last {
                Some((from, runs)) if *from == child.told_count => Rc::clone(runs),
                _ => runs_of(&stored.log[child.told_count..]),
            };
            last = Some((child.told_count, Rc::clone(&runs)));
            child.told_count = log_count;
            child.told_complete = complete;
            news.push((child.node, child.token, runs));
        }
        for (child, token, runs) in news {
            self.send_have(node, child, blob, token, runs, complete);
        }
    }

    fn heard_of(
        &mut self,
        child: u32,
        parent: u32,
        blob: u32,
        token: u64,
        runs: &[PieceRun],
        complete: bool,
    ) {
        let id = self.nodes[parent as usize].id;
        let task = self.nodes[child as usize].tasks.get(&blob);
        if task.is_some_and(|task| task.subscriptions.get(&parent) == Some(&token)) {
            let input = Input::Have {
                parent: id,
                runs: runs.to_vec(),
                complete,
            };
            self.post(child, blob, input);
        }
    }

    pub(super) fn parent_gone(
        &mut self,
        child: u32,
        parent: u32,
        blob: u32,
        token: u64,
        reason: Gone,
    ) {
        let id = self.nodes[parent as usize].id;
        let Some(task) = self.nodes[child as usize].tasks.get_mut(&blob) else {
            return;
        };
        if task.subscriptions.get(&parent) != Some(&token) {
            return;
        }
        task.subscriptions.remove(&parent);
        if reason == Gone::Unreachable {
            let digest = self.digests[blob as usize];
            self.tell_control(
                child,
                pantala_control::core::FromNode::ParentFailed { digest, node: id },
            );
        }
        let input = Input::ParentGone { parent: id, reason };
        self.post(child, blob, input);
    }

    /// A request has arrived: it takes a turn, or waits for one.
    fn asked(&mut self, parent: u32, upload: Upload) {
        let it = &mut self.nodes[parent as usize];
        if it.habit == Habit::Stalls {
            return;
        }
        if it.server.places_used >= REQUESTS_MAX {
            return self.refuse(parent, &upload, Failure::Busy);
        }
        it.server.places_used += 1;
        let class = upload.class();
        if it.server.turns_used[class] < SENDS_MAX[class] {
            it.server.turns_used[class] += 1;
            self.take_turn(parent, upload);
        } else {
            it.server.waiting[class].push_back(upload);
        }
    }

    fn refuse(&mut self, parent: u32, upload: &Upload, failure: Failure) {
        let message = PeerMessage::Refusal {
            blob: upload.blob,
            request: upload.request,
            failure,
        };
        self.send(parent, upload.child, message);
    }

    fn take_turn(&mut self, parent: u32, upload: Upload) {
        let child = upload.child;
        let is_held = self.nodes[parent as usize].holds(upload.blob, upload.piece);
        if !self.referee.bent_holds(is_held) {
            self.refuse(parent, &upload, Failure::NotHeld);
            return self.turn_over(parent, upload.class());
        }
        self.check_promise(parent, &upload);
        let lines = &mut self.nodes[parent as usize].server.lines;
        lines.entry(child).or_default().queue.push_back(upload);
        self.send_next(parent, child);
    }

    /// A turn is free: whoever has waited longest takes it.
    fn turn_over(&mut self, parent: u32, class: usize) {
        let server = &mut self.nodes[parent as usize].server;
        server.places_used -= 1;
        match server.waiting[class].pop_front() {
            Some(next) => self.take_turn(parent, next),
            None => server.turns_used[class] -= 1,
        }
    }

    /// Sends the most urgent piece of a line, if none is on its way there.
    fn send_next(&mut self, parent: u32, child: u32) {
        let it = &mut self.nodes[parent as usize];
        let Some(line) = it.server.lines.get_mut(&child) else {
            return;
        };
        if line.active.is_some() {
            return;
        }
        let most_urgent = line.queue.iter().enumerate();
        let Some((at, _)) = most_urgent.min_by_key(|(at, upload)| (upload.priority, *at)) else {
            it.server.lines.remove(&child);
            return;
        };
        let Some(upload) = line.queue.remove(at) else {
            return;
        };
        let range = self.layouts[upload.blob as usize].piece_range(PieceIndex(upload.piece));
        let skipped = u64::from(upload.first_group) * GROUP_SIZE;
        let mut bytes = range.map_or(0, |range| range.len().saturating_sub(skipped));
        if it.habit == Habit::WrongBytes && self.referee.bent_verify() {
            // The first group shows it.
            bytes = bytes.min(GROUP_SIZE);
        }
        let path = self.topology.path(parent, child);
        let flow = self.net.start(self.now, &path, bytes.max(1));
        self.flows.insert(flow, FlowUse::Upload { parent, child });
        if let Some(line) = self.nodes[parent as usize].server.lines.get_mut(&child) {
            line.active = Some((flow, upload));
        }
    }

    pub(super) fn upload_finished(&mut self, parent: u32, child: u32) {
        let lines = &mut self.nodes[parent as usize].server.lines;
        let Some((_, upload)) = lines.get_mut(&child).and_then(|line| line.active.take()) else {
            return;
        };
        let it = &self.nodes[parent as usize];
        let (blob, request, piece) = (upload.blob, upload.request, upload.piece);
        let stored = it.stores.get(&blob);
        let lies = it.habit == Habit::WrongBytes;
        let message = if lies && self.referee.bent_verify() {
            let failure = Failure::Lied;
            PeerMessage::Refusal {
                blob,
                request,
                failure,
            }
        } else {
            PeerMessage::Piece {
                blob,
                request,
                piece,
                bad: lies || stored.is_some_and(|s| s.bad.contains(&piece)),
                author: stored
                    .and_then(|s| s.authors.get(&piece))
                    .copied()
                    .unwrap_or(NOBODY),
            }
        };
        self.send(parent, child, message);
        self.turn_over(parent, upload.class());
        self.send_next(parent, child);
    }

    #[expect(clippy::too_many_arguments, reason = "one message's fields")]
    fn piece_came(
        &mut self,
        child: u32,
        parent: u32,
        blob: u32,
        request: RequestId,
        piece: u32,
        bad: bool,
        author: u32,
    ) {
        let author_id = self.nodes.get(author as usize).map(|node| node.id);
        let it = &mut self.nodes[child as usize];
        let task = it.tasks.get_mut(&blob);
        let Some(Live::Parent { .. }) = task.and_then(|task| task.live.remove(&request)) else {
            self.counts.wasted_bytes += self.layouts[blob as usize].piece_size();
            return;
        };
        if author_id.is_some_and(|id| it.shut_out.contains(&id)) {
            let detail = "the author is shut out".to_owned();
            let failure = Failure::Refused { detail };
            return self.post(child, blob, Input::RequestFailed { request, failure });
        }
        let is_dup = it.holds(blob, piece);
        if is_dup {
            self.counts.wasted_bytes += self.layouts[blob as usize].piece_size();
        } else {
            self.counts.pieces_from_peers += 1;
            self.counts.arrived(self.now, false);
        }
        if self.has_forgers
            && let Some(stored) = it.stores.get_mut(&blob)
            && !is_dup
        {
            stored.relayers.insert(piece, parent);
        }
        self.hold(child, blob, piece, bad, author);
        let author = author_id.map_or(Author::Unknown, Author::Other);
        self.post(
            child,
            blob,
            Input::PieceDone {
                request: Some(request),
                piece: PieceIndex(piece),
                author,
            },
        );
        self.post(child, blob, Input::RequestDone { request });
    }

    fn upload_cancelled(&mut self, parent: u32, child: u32, blob: u32, request: RequestId) {
        let mine = |u: &Upload| u.child == child && u.blob == blob && u.request == request;
        let server = &mut self.nodes[parent as usize].server;
        for waiting in &mut server.waiting {
            let before = waiting.len();
            waiting.retain(|upload| !mine(upload));
            server.places_used -= before - waiting.len();
        }
        let Some(line) = server.lines.get_mut(&child) else {
            return;
        };
        if let Some(at) = line.queue.iter().position(mine) {
            let upload = line.queue.remove(at);
            if let Some(upload) = upload {
                self.turn_over(parent, upload.class());
            }
            return;
        }
        if let Some((flow, upload)) = line.active.take_if(|(_, upload)| mine(upload)) {
            self.flows.remove(&flow);
            self.counts.wasted_bytes += self.net.cancel(self.now, flow);
            self.turn_over(parent, upload.class());
            self.send_next(parent, child);
        }
    }

    /// Nothing goes from `parent` to `child` any more.
    pub(super) fn end_line(&mut self, parent: u32, child: u32) {
        let server = &mut self.nodes[parent as usize].server;
        for waiting in &mut server.waiting {
            let before = waiting.len();
            waiting.retain(|upload| upload.child != child);
            server.places_used -= before - waiting.len();
        }
        let Some(line) = server.lines.remove(&child) else {
            return;
        };
        let Line { queue, active } = line;
        if let Some((flow, upload)) = active {
            self.flows.remove(&flow);
            self.counts.wasted_bytes += self.net.cancel(self.now, flow);
            self.turn_over(parent, upload.class());
        }
        for upload in VecDeque::into_iter(queue) {
            self.turn_over(parent, upload.class());
        }
    }
}

/// Pieces as runs, in the order given.
fn runs_of(pieces: &[u32]) -> Rc<[PieceRun]> {
    let mut runs: Vec<PieceRun> = Vec::new();
    for &piece in pieces {
        match runs.last_mut() {
            Some(run) if run.first + run.count == piece => run.count += 1,
            _ => runs.push(PieceRun {
                first: piece,
                count: 1,
            }),
        }
    }
    runs.into()
}
