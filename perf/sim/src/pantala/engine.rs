//! What a node does for its own downloads: the twin of the node's engine.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pantala_control::core::FromNode;
use pantala_swarm::{Action, Author, Blame, Download, Failure, Gone, Input, ReaderId, RequestId};
use pantala_wire::{ByteRange, PieceIndex, PieceSet, Priority};

use super::node::{Live, Stored, Task};
use super::queue::{Event, PeerMessage, SourceAsk};
use super::{VERIFY_TIME, World};
use crate::check::Violation;
use crate::scenario::Habit;

/// The one reader of a download: a client that pulls the whole blob.
const READER: ReaderId = ReaderId(1);

impl World {
    /// A client asks for a blob.
    pub(super) fn pull(&mut self, node: u32, number: u32) {
        let now = self.now;
        let it = &mut self.nodes[node as usize];
        if !it.alive {
            return;
        }
        let state = &mut it.pulls[number as usize];
        if state.done.is_some() {
            return;
        }
        state.started.get_or_insert(now);
        let pull = state.pull.clone();
        if it.stores.get(&pull.blob).is_some_and(|s| s.complete) {
            return self.pull_ended(node, pull.blob, None);
        }
        self.open_task(node, pull.blob);
        let range = ByteRange::new(0, self.layouts[pull.blob as usize].blob_size());
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.get_mut(&pull.blob) else {
            return;
        };
        if pull.prefetch {
            let priority = Priority::Prefetch;
            task.inbox.push(Input::FetchAll { priority });
        } else if let Some(range) = range {
            let priority = Priority::Bulk;
            task.inbox.push(Input::FetchAll { priority });
            task.reader_at = Some(0);
            task.inbox.push(Input::Want {
                reader: READER,
                range,
                priority: Priority::Client,
            });
        }
        self.schedule_wake(node, pull.blob, now);
    }

    /// Starts a download where none runs.
    fn open_task(&mut self, node: u32, blob: u32) {
        let (now, layout) = (self.now, self.layouts[blob as usize]);
        let it = &mut self.nodes[node as usize];
        if it.tasks.contains_key(&blob) {
            return;
        }
        let piece_count = layout.piece_count();
        let stored = it
            .stores
            .entry(blob)
            .or_insert_with(|| Stored::new(piece_count));
        let head = it.id.as_bytes().first_chunk::<8>();
        let seed = head.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let config = self.policy.download.clone();
        let mut machine = Download::new(config, layout, stored.held.clone(), seed, now);
        let authors: Vec<(u32, u32)> = stored.authors.iter().map(|(p, a)| (*p, *a)).collect();
        for (piece, author) in authors {
            let author = match self.nodes.get(author as usize) {
                None => Author::Unknown,
                Some(_) if author == node => Author::This,
                Some(other) => Author::Other(other.id),
            };
            machine.set_author(PieceIndex(piece), author);
        }
        let it = &mut self.nodes[node as usize];
        let available = it.has_source;
        machine.handle(now, Input::SourceChanged { available });
        machine.handle(
            now,
            match it.session.connected {
                true => Input::ControlUp,
                false => Input::ControlDown,
            },
        );
        it.tasks.insert(
            blob,
            Task {
                machine,
                inbox: Vec::new(),
                wake_at: None,
                live: BTreeMap::new(),
                subscriptions: BTreeMap::new(),
                leased: PieceSet::empty(piece_count),
                reader_at: None,
                rechecking: BTreeSet::new(),
            },
        );
        self.open_at_control(node, blob);
        self.schedule_wake(node, blob, now);
    }

    /// Tells control that the blob is downloaded here.
    pub(super) fn open_at_control(&mut self, node: u32, blob: u32) {
        let it = &self.nodes[node as usize];
        let Some(stored) = it
            .stores
            .get(&blob)
            .filter(|_| it.tasks.contains_key(&blob))
        else {
            return;
        };
        let message = FromNode::OpenTask {
            digest: self.digests[blob as usize],
            size_bytes: self.layouts[blob as usize].blob_size(),
            has_source: it.has_source,
            held: stored.held.runs(),
            complete: stored.complete,
        };
        self.tell_control(node, message);
    }

    /// Something for a download.
    pub(super) fn post(&mut self, node: u32, blob: u32, input: Input) {
        let now = self.now;
        if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
            task.inbox.push(input);
            self.schedule_wake(node, blob, now);
        }
    }

    pub(super) fn post_all(&mut self, node: u32, input: &Input) {
        let blobs: Vec<u32> = self.nodes[node as usize].tasks.keys().copied().collect();
        for blob in blobs {
            self.post(node, blob, input.clone());
        }
    }

    fn schedule_wake(&mut self, node: u32, blob: u32, at: Duration) {
        let at = self.quantised(at.max(self.now));
        let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) else {
            return;
        };
        if task.wake_at.is_none_or(|wake| at < wake) {
            task.wake_at = Some(at);
            self.queue.push(at, Event::Wake { node, blob });
        }
    }

    /// The download takes its inputs and decides.
    pub(super) fn wake(&mut self, node: u32, blob: u32) {
        let now = self.now;
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.get_mut(&blob).filter(|t| t.wake_at == Some(now)) else {
            return;
        };
        task.wake_at = None;
        let due = task.machine.next_timeout().is_some_and(|at| at <= now);
        if due || !task.inbox.is_empty() {
            self.counts.inputs += task.inbox.len() as u64;
            if due {
                self.report_progress(node, blob);
            }
            let it = &mut self.nodes[node as usize];
            let Some(task) = it.tasks.get_mut(&blob) else {
                return;
            };
            for input in std::mem::take(&mut task.inbox) {
                task.machine.handle(now, input);
            }
            if due {
                task.machine.handle(now, Input::Tick);
            }
            self.move_reader(node, blob);
            self.perform_all(node, blob);
        }
        let it = &self.nodes[node as usize];
        if let Some(task) = it.tasks.get(&blob) {
            if let Some(at) = task.machine.next_timeout() {
                self.schedule_wake(node, blob, at);
            }
            self.check_task(node, blob);
        }
    }

    /// Says how far each request is. A fluid flow tells nothing by itself, and only deadlines ask.
    fn report_progress(&mut self, node: u32, blob: u32) {
        let mut progress: Vec<(RequestId, u32)> = Vec::new();
        let it = &self.nodes[node as usize];
        let Some(task) = it.tasks.get(&blob) else {
            return;
        };
        for (&request, live) in &task.live {
            let (flow, before) = match live {
                Live::Parent { parent, .. } => {
                    let line = self.nodes[*parent as usize].server.lines.get(&node);
                    let active = line.and_then(|line| line.active.as_ref());
                    let mine = |u: &super::node::Upload| u.request == request && u.blob == blob;
                    (active.filter(|(_, u)| mine(u)).map(|(flow, _)| *flow), 0)
                }
                Live::Source {
                    run, next, flow, ..
                } => (
                    *flow,
                    u64::from(next - run.first) * self.layouts[blob as usize].piece_size(),
                ),
            };
            let bytes = flow.and_then(|flow| self.net.delivered(flow)).unwrap_or(0);
            let groups = (before + bytes) / pantala_wire::GROUP_SIZE;
            if groups > 0 {
                progress.push((request, groups as u32));
            }
        }
        let now = self.now;
        if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
            for (request, groups) in progress {
                task.machine
                    .handle(now, Input::Progress { request, groups });
            }
        }
    }

    /// The client takes what is there at once, and then wants what comes next.
    fn move_reader(&mut self, node: u32, blob: u32) {
        let now = self.now;
        let it = &mut self.nodes[node as usize];
        let (Some(task), Some(stored)) = (it.tasks.get_mut(&blob), it.stores.get(&blob)) else {
            return;
        };
        let Some(at) = task.reader_at else {
            return;
        };
        let next = stored.first_missing(at);
        if next == at {
            return;
        }
        task.reader_at = Some(next);
        let layout = self.layouts[blob as usize];
        let start = u64::from(next) * layout.piece_size();
        let input = match ByteRange::new(start, layout.blob_size()) {
            Some(range) => Input::Want {
                reader: READER,
                range,
                priority: Priority::Client,
            },
            None => Input::Unwant { reader: READER },
        };
        task.machine.handle(now, input);
    }

    fn perform_all(&mut self, node: u32, blob: u32) {
        let mut actions = Vec::new();
        if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
            while let Some(action) = task.machine.poll_action() {
                actions.push(action);
            }
        }
        for action in actions {
            match action {
                Action::Complete => return self.completed(node, blob),
                Action::Fail { reason } => {
                    return self.pull_failed(node, blob, reason.to_string());
                }
                action => self.perform(node, blob, action),
            }
        }
    }

    fn perform(&mut self, node: u32, blob: u32, action: Action) {
        let epoch = self.nodes[node as usize].epoch;
        let digest = self.digests[blob as usize];
        match action {
            Action::Subscribe { parent } => self.subscribe(node, blob, parent),
            Action::Unsubscribe { parent, failed } => {
                if failed {
                    let node_id = parent;
                    self.tell_control(
                        node,
                        FromNode::ParentFailed {
                            digest,
                            node: node_id,
                        },
                    );
                }
                self.unsubscribe(node, blob, parent);
            }
            Action::Fetch {
                request,
                parent,
                piece,
                first_group,
                priority,
            } => self.fetch(node, blob, request, parent, piece.0, first_group, priority),
            Action::FetchSource {
                request,
                pieces,
                leased,
                ..
            } => {
                self.counts.alone_fetches += u64::from(!leased);
                let live = Live::Source {
                    run: pieces,
                    next: pieces.first,
                    flow: None,
                    leased,
                };
                if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
                    task.live.insert(request, live);
                }
                let ask = SourceAsk::Fetch { blob, request };
                let delay = self.delay(node, u32::MAX);
                self.after(delay, Event::SourceAsk { node, epoch, ask });
            }
            Action::Cancel { request } => self.cancel(node, blob, request),
            Action::AskLease { wanted, urgent } => {
                let urgent = Some(urgent);
                self.tell_control(
                    node,
                    FromNode::AskLease {
                        digest,
                        wanted,
                        urgent,
                    },
                );
            }
            Action::ReturnLease { pieces } => {
                if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
                    for piece in pieces.range() {
                        task.leased.remove(PieceIndex(piece));
                    }
                }
                let pieces = vec![pieces];
                self.tell_control(node, FromNode::ReturnLease { digest, pieces });
            }
            Action::Verify => self.after(VERIFY_TIME, Event::Verified { node, epoch, blob }),
            Action::Recheck { piece } => {
                let piece = piece.0;
                if let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) {
                    task.rechecking.insert(piece);
                }
                let ask = SourceAsk::Recheck { blob, piece };
                let delay = self.delay(node, u32::MAX);
                self.after(delay, Event::SourceAsk { node, epoch, ask });
            }
            Action::Blame { node: culprit, why } => self.blamed(culprit, why),
            Action::Complete | Action::Fail { .. } => {}
        }
    }

    fn blamed(&mut self, culprit: pantala_wire::NodeId, why: Blame) {
        self.counts.blames += 1;
        if let Some(&culprit) = self.by_id.get(&culprit) {
            let habit = self.nodes[culprit as usize].habit;
            if let Err(violation) = self.referee.blamed(habit, why) {
                self.breaks(violation);
            }
        }
    }

    fn subscribe(&mut self, node: u32, blob: u32, parent: pantala_wire::NodeId) {
        let Some(&to) = self.by_id.get(&parent) else {
            return;
        };
        self.next_token += 1;
        let token = self.next_token;
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.get_mut(&blob) else {
            return;
        };
        task.subscriptions.insert(to, token);
        if it.shut_out.contains(&parent) {
            let reason = Gone::Unreachable;
            return self.post(node, blob, Input::ParentGone { parent, reason });
        }
        let is_new = it.connections.insert(to);
        let epoch = self.nodes[to as usize].epoch;
        // A new connection takes one round trip before the first request can go.
        let shake = if is_new {
            self.delay(node, to) + self.delay(to, node)
        } else {
            Duration::ZERO
        };
        let delay = shake + self.delay(node, to);
        self.after(
            delay,
            Event::Peer {
                from: node,
                to,
                epoch,
                message: PeerMessage::Subscribe { blob, token },
            },
        );
    }

    fn unsubscribe(&mut self, node: u32, blob: u32, parent: pantala_wire::NodeId) {
        let Some(&to) = self.by_id.get(&parent) else {
            return;
        };
        let it = &mut self.nodes[node as usize];
        let token = it
            .tasks
            .get_mut(&blob)
            .and_then(|task| task.subscriptions.remove(&to));
        if let Some(token) = token {
            self.send(node, to, PeerMessage::Unsubscribe { blob, token });
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one action's fields")]
    fn fetch(
        &mut self,
        node: u32,
        blob: u32,
        request: RequestId,
        parent: pantala_wire::NodeId,
        piece: u32,
        first_group: u32,
        priority: Priority,
    ) {
        let Some(&to) = self.by_id.get(&parent) else {
            return;
        };
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.get_mut(&blob) else {
            return;
        };
        let same = |l: &Live| matches!(l, Live::Parent { piece: other, .. } if *other == piece);
        self.counts.hedges += u64::from(task.live.values().any(same));
        task.live
            .insert(request, Live::Parent { parent: to, piece });
        if !task.subscriptions.contains_key(&to) {
            self.breaks(Violation::new(
                "bounds",
                "a node asks who is no parent of its",
            ));
        }
        let message = PeerMessage::Fetch {
            blob,
            request,
            piece,
            first_group,
            priority,
        };
        self.send(node, to, message);
    }

    fn cancel(&mut self, node: u32, blob: u32, request: RequestId) {
        let it = &mut self.nodes[node as usize];
        let live = it
            .tasks
            .get_mut(&blob)
            .and_then(|task| task.live.remove(&request));
        match live {
            Some(Live::Parent { parent, .. }) => {
                self.send(node, parent, PeerMessage::Cancel { blob, request });
            }
            Some(Live::Source {
                flow: Some(flow), ..
            }) => {
                self.flows.remove(&flow);
                self.counts.wasted_bytes += self.net.cancel(self.now, flow);
            }
            Some(Live::Source { flow: None, .. }) | None => {}
        }
    }

    /// A request to a parent has failed.
    pub(super) fn request_failed(
        &mut self,
        node: u32,
        blob: u32,
        request: RequestId,
        failure: Failure,
    ) {
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.get_mut(&blob) else {
            return;
        };
        if task.live.remove(&request).is_some() {
            self.post(node, blob, Input::RequestFailed { request, failure });
        }
    }

    /// The sha256 of the whole is known.
    pub(super) fn verified(&mut self, node: u32, epoch: u32, blob: u32) {
        if !self.is_current(node, epoch) {
            return;
        }
        let it = &mut self.nodes[node as usize];
        let Some(stored) = it.stores.get_mut(&blob) else {
            return;
        };
        let ok = stored.bad.is_empty() || it.habit == Habit::Forges;
        stored.complete = ok && stored.held.is_full();
        if stored.complete {
            self.schedule_tell(node, blob);
        }
        self.post(node, blob, Input::Verified { ok });
    }

    fn completed(&mut self, node: u32, blob: u32) {
        let Some(stored) = self.nodes[node as usize].stores.get(&blob) else {
            return;
        };
        let is_honest = self.nodes[node as usize].habit == Habit::Honest;
        if is_honest && !stored.bad.is_empty() || !stored.held.is_full() {
            let text = format!("node {node} calls blob {blob} complete, which it is not");
            return self.breaks(Violation::new("verified", text));
        }
        self.retire(node, blob);
        self.pull_ended(node, blob, None);
    }

    fn pull_failed(&mut self, node: u32, blob: u32, why: String) {
        self.retire(node, blob);
        self.pull_ended(node, blob, Some(why));
    }

    /// The download's actor ends.
    fn retire(&mut self, node: u32, blob: u32) {
        let it = &mut self.nodes[node as usize];
        let Some(task) = it.tasks.remove(&blob) else {
            return;
        };
        let Some(stored) = it.stores.get(&blob) else {
            return;
        };
        let digest = self.digests[blob as usize];
        let (runs, complete) = (stored.held.runs(), stored.complete);
        for live in task.live.values() {
            if let Live::Source {
                flow: Some(flow), ..
            } = live
            {
                self.flows.remove(flow);
                self.counts.wasted_bytes += self.net.cancel(self.now, *flow);
            }
        }
        for (&parent, &token) in &task.subscriptions {
            self.send(node, parent, PeerMessage::Unsubscribe { blob, token });
        }
        self.tell_control(
            node,
            FromNode::Holding {
                digest,
                runs,
                complete,
            },
        );
        self.tell_control(node, FromNode::CloseTask { digest });
    }

    /// A client has its blob, or an error.
    pub(super) fn pull_ended(&mut self, node: u32, blob: u32, failed: Option<String>) {
        let now = self.now;
        let it = &mut self.nodes[node as usize];
        for state in it.pulls.iter_mut().filter(|s| s.pull.blob == blob) {
            if state.done.is_none() && state.started.is_some() {
                state.done = Some(now);
                state.failed.clone_from(&failed);
                self.open_pulls -= 1;
            }
        }
    }

    /// A piece is verified and stored.
    pub(super) fn hold(&mut self, node: u32, blob: u32, piece: u32, bad: bool, author: u32) {
        let has_forgers = self.has_forgers;
        let Some(stored) = self.nodes[node as usize].stores.get_mut(&blob) else {
            return;
        };
        if !stored.held.insert(PieceIndex(piece)) {
            return;
        }
        stored.log.push(piece);
        if has_forgers {
            stored.authors.insert(piece, author);
        }
        if bad {
            stored.bad.insert(piece);
        }
        self.schedule_tell(node, blob);
    }
}
