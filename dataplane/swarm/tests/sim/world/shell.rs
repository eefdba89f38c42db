//! The shell around each core: feeds it, performs what it says, checks it after each step.

use super::*;

impl World {
    /// Feeds an input that was addressed to this life of the node.
    pub(super) fn deliver_now(&mut self, node: usize, input: Input) {
        match &input {
            Input::Lease { pieces, expires_in } => {
                self.nodes[node].asked_at = None;
                for piece in pieces.range() {
                    self.nodes[node]
                        .leases
                        .insert(piece, self.now + *expires_in);
                }
            }
            Input::LeaseWait { .. } => self.nodes[node].asked_at = None,
            Input::ControlUp | Input::ControlDown => self.nodes[node].asked_at = None,
            Input::RequestFailed { request, failure } => {
                let Some(live) = self.nodes[node].live.remove(request) else {
                    return;
                };
                if *failure == Failure::Lied {
                    let liar = live.parent.unwrap();
                    self.input(node, input);
                    assert!(
                        self.nodes[node].blamed.contains(&liar),
                        "a lie without blame"
                    );
                    return;
                }
            }
            Input::Verified { .. } => self.nodes[node].verifying = false,
            _ => {}
        }
        self.input(node, input);
    }

    pub(super) fn input(&mut self, node: usize, input: Input) {
        if self.trace {
            eprintln!("{:?} {node} < {input:?}", self.now);
        }
        self.nodes[node].core.handle(self.now, input);
        for _ in 0.. {
            let Some(action) = self.nodes[node].core.poll_action() else {
                break;
            };
            if self.hash_actions {
                format!("{:?} {node} {action:?}", self.now).hash(&mut self.hasher);
            }
            let now = self.now;
            if self.trace {
                eprintln!("{now:?} {node} > {action:?}");
            }
            self.nodes[node].check(now, &action);
            self.perform(node, action);
        }
        let core = &self.nodes[node].core;
        if self.rng_checks.chance(15)
            && let Some(wrong) = core.inconsistency()
        {
            panic!("node {node}: {wrong}");
        }
        let held = core.held().len() as usize;
        let stored = self.nodes[node].store.iter().flatten().count();
        assert!(
            matches!(core.state(), State::Failed(_)) || held == stored,
            "held {held} of {stored}"
        );
        let due = core.next_timeout();
        if due != self.nodes[node].tick_at {
            self.nodes[node].tick_at = due;
            if let Some(due) = due {
                assert!(due > self.now, "a timer in the past");
                let epoch = self.nodes[node].epoch;
                self.at(due, Event::Tick { node, epoch });
            }
        }
    }

    pub(super) fn perform(&mut self, node: usize, action: Action) {
        let delay = self.delay();
        let epoch = self.nodes[node].epoch;
        match action {
            Action::Subscribe { parent } => {
                let parent = node_index(parent);
                self.next_token += 1;
                let token = self.next_token;
                self.nodes[node].subscriptions.insert(parent, token);
                self.after(
                    delay,
                    Event::Subscribe {
                        child: node,
                        epoch,
                        parent,
                        token,
                    },
                );
            }
            Action::Unsubscribe { parent, .. } => {
                let parent = node_index(parent);
                self.nodes[node].subscriptions.remove(&parent);
                self.nodes[node].offered.remove(&parent);
                self.nodes[parent].children.remove(&node);
            }
            Action::Fetch {
                request,
                parent,
                piece,
                ..
            } => {
                let parent = node_index(parent);
                let carried = |l: &&crate::sim::nodes::Live| l.left.contains(&piece.0);
                if self.nodes[node].live.values().filter(carried).count() > 1 {
                    self.hedges += 1;
                }
                let piece = piece.0;
                self.after(
                    delay,
                    Event::PeerStep {
                        child: node,
                        epoch,
                        parent,
                        request,
                        piece,
                        step: 0,
                    },
                );
            }
            Action::FetchSource {
                request,
                pieces,
                leased,
                ..
            } => {
                self.alone_fetches += u32::from(!leased);
                let piece = pieces.first;
                let first_byte = self.rng.ms(5, 60);
                self.after(
                    first_byte,
                    Event::SourceStep {
                        node,
                        epoch,
                        request,
                        run: pieces,
                        piece,
                        step: 0,
                    },
                );
            }
            Action::AskLease { wanted, .. } => {
                self.after(
                    delay,
                    Event::Asked {
                        node,
                        epoch,
                        wanted,
                    },
                );
            }
            Action::ReturnLease { pieces } => self.after(delay, Event::Returned { node, pieces }),
            Action::Verify => {
                let ok = self.nodes[node]
                    .store
                    .iter()
                    .all(|s| s.is_some_and(|s| s.version == 0));
                self.deliver(node, Duration::from_millis(3), Input::Verified { ok });
            }
            Action::Recheck { piece } => {
                self.after(
                    delay,
                    Event::Recheck {
                        node,
                        epoch,
                        piece: piece.0,
                    },
                );
            }
            Action::Blame { node: culprit, .. } => {
                self.blames += 1;
                let habit = self.scenario.nodes[node_index(culprit)].habit;
                assert!(
                    matches!(habit, Habit::Lies | Habit::Forges),
                    "an honest node is blamed"
                );
                self.nodes[node_index(culprit)].children.remove(&node);
            }
            Action::Cancel { .. } | Action::Complete | Action::Fail { .. } => {}
        }
        if self.nodes[node].completed {
            self.tell_children(node, &[], true);
        }
    }
}
