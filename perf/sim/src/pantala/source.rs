//! The registry, and what nodes fetch from it: the twin of the node's fetches from the source.

use pantala_control::core::FromNode;
use pantala_swarm::{Author, Failure, Input, Recheck};
use pantala_wire::{Claim, PieceDigest, PieceIndex, PieceRun};

use super::node::{Live, NOBODY};
use super::queue::{Event, SourceAsk};
use super::{FlowUse, World, key_of};
use crate::scenario::{Habit, millis, seconds};

impl World {
    /// A request is at the registry: taken, or one too many.
    pub(super) fn source_asked(&mut self, node: u32, epoch: u32, ask: SourceAsk) {
        let limit = self.scenario.registry.requests_per_s;
        let waited = (self.now - self.registry_at).as_secs_f64();
        self.registry_at = self.now;
        self.registry_tokens = (self.registry_tokens + waited * limit).min(limit.max(1.0));
        if limit > 0.0 && self.registry_tokens < 1.0 {
            let delay = self.delay(u32::MAX, node);
            return self.after(delay, Event::SourceRefusal { node, epoch, ask });
        }
        self.registry_tokens -= 1.0;
        let first_byte = millis(self.scenario.registry.first_byte_ms);
        self.after(first_byte, Event::SourceAnswer { node, epoch, ask });
    }

    pub(super) fn source_refused(&mut self, node: u32, epoch: u32, ask: SourceAsk) {
        if !self.is_current(node, epoch) {
            return;
        }
        let failure = Failure::Retry {
            after: Some(seconds(self.scenario.registry.retry_after_s)),
            detail: "429".to_owned(),
        };
        match ask {
            SourceAsk::Fetch { blob, request } => self.request_failed(node, blob, request, failure),
            SourceAsk::Recheck { blob, piece } => {
                self.rechecked(node, blob, piece, Recheck::Failed(failure));
            }
        }
    }

    /// The registry sends the next piece of an answer, if anybody still waits for it.
    pub(super) fn source_answers(&mut self, node: u32, epoch: u32, ask: SourceAsk) {
        if !self.is_current(node, epoch) {
            return;
        }
        let now = self.now;
        let it = &self.nodes[node as usize];
        let (blob, piece) = match ask {
            SourceAsk::Fetch { blob, request } => {
                let live = it.tasks.get(&blob).and_then(|t| t.live.get(&request));
                let Some(Live::Source { next, .. }) = live else {
                    return;
                };
                (blob, *next)
            }
            SourceAsk::Recheck { blob, piece } => (blob, piece),
        };
        let range = self.layouts[blob as usize].piece_range(PieceIndex(piece));
        let bytes = range.map_or(1, |range| range.len());
        let path = self.topology.path_from_registry(node);
        let flow = self.net.start(now, &path, bytes);
        self.flows
            .insert(flow, FlowUse::Source { node, epoch, ask });
        if let Some(request) = Self::request_of(ask)
            && let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob)
            && let Some(Live::Source { flow: slot, .. }) = task.live.get_mut(&request)
        {
            *slot = Some(flow);
        }
    }

    /// The last byte of a piece has left the network's links.
    pub(super) fn source_flowed(&mut self, node: u32, epoch: u32, ask: SourceAsk) {
        if !self.is_current(node, epoch) {
            return;
        }
        let delay = self.delay(u32::MAX, node);
        let (blob, request) = match ask {
            SourceAsk::Recheck { piece, .. } => {
                return self.after(
                    delay,
                    Event::SourcePiece {
                        node,
                        epoch,
                        ask,
                        piece,
                    },
                );
            }
            SourceAsk::Fetch { blob, request } => (blob, request),
        };
        let task = self.nodes[node as usize].tasks.get_mut(&blob);
        let Some(Live::Source {
            run, next, flow, ..
        }) = task.and_then(|task| task.live.get_mut(&request))
        else {
            return;
        };
        *flow = None;
        let piece = *next;
        *next += 1;
        let goes_on = *next < run.range().end;
        self.after(
            delay,
            Event::SourcePiece {
                node,
                epoch,
                ask,
                piece,
            },
        );
        if goes_on {
            self.source_answers(node, epoch, ask);
        }
    }

    pub(super) fn source_piece(&mut self, node: u32, epoch: u32, ask: SourceAsk, piece: u32) {
        if !self.is_current(node, epoch) {
            return;
        }
        let (blob, request) = match ask {
            SourceAsk::Fetch { blob, request } => (blob, request),
            SourceAsk::Recheck { blob, piece } => return self.compare(node, blob, piece),
        };
        let digest = self.digests[blob as usize];
        let bad = self.nodes[node as usize].habit == Habit::Forges;
        let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) else {
            return;
        };
        task.leased.remove(PieceIndex(piece));
        let ends = match task.live.get(&request) {
            Some(Live::Source { run, .. }) => piece + 1 == run.range().end,
            _ => {
                // Cancelled while its last byte was on its way.
                self.counts.wasted_bytes += self.layouts[blob as usize].piece_size();
                return;
            }
        };
        if ends {
            task.live.remove(&request);
        }
        self.counts.pieces_from_source += 1;
        self.counts.arrived(self.now, true);
        self.hold(node, blob, piece, bad, node);
        self.post(
            node,
            blob,
            Input::PieceDone {
                request: Some(request),
                piece: PieceIndex(piece),
                author: Author::This,
            },
        );
        let pieces = vec![PieceRun {
            first: piece,
            count: 1,
        }];
        self.tell_control(node, FromNode::Fetched { digest, pieces });
        if ends {
            self.post(node, blob, Input::RequestDone { request });
        }
    }

    /// A piece was asked for again: it is what is held, or takes its place.
    fn compare(&mut self, node: u32, blob: u32, piece: u32) {
        let digest = self.digests[blob as usize];
        let seed = self.scenario.seed;
        let forges = self.nodes[node as usize].habit == Habit::Forges;
        let Some(stored) = self.nodes[node as usize].stores.get_mut(&blob) else {
            return;
        };
        if forges || !stored.bad.remove(&piece) {
            return self.rechecked(node, blob, piece, Recheck::Same);
        }
        let author = stored.authors.insert(piece, node).unwrap_or(NOBODY);
        let relayer = stored.relayers.get(&piece).copied().unwrap_or(author);
        let Some(author_id) = self.nodes.get(author as usize).map(|n| n.id) else {
            let author = Author::Unknown;
            return self.rechecked(node, blob, piece, Recheck::Replaced { author });
        };
        let forged = PieceDigest([0xbd; 32]);
        let form = Claim::signed_form(&digest, PieceIndex(piece), &forged);
        let signature = key_of(seed, author).map(|key| key.sign(&form));
        let mut bytes = [0; 64];
        if let Some(signature) = signature {
            bytes.copy_from_slice(signature.as_ref());
        }
        let message = FromNode::FalseClaim {
            digest,
            piece: PieceIndex(piece),
            claim: Claim {
                piece_digest: forged,
                author: author_id,
                signature: bytes,
            },
            true_digest: PieceDigest([0x11; 32]),
            relayer: self.nodes[relayer as usize].id,
        };
        self.nodes[node as usize].accusations.push(message.clone());
        self.tell_control(node, message);
        let author = Author::Other(author_id);
        self.rechecked(node, blob, piece, Recheck::Replaced { author });
    }

    fn rechecked(&mut self, node: u32, blob: u32, piece: u32, outcome: Recheck) {
        let Some(task) = self.nodes[node as usize].tasks.get_mut(&blob) else {
            return;
        };
        if task.rechecking.remove(&piece) {
            let piece = PieceIndex(piece);
            self.post(node, blob, Input::Rechecked { piece, outcome });
        }
    }

    /// The share of its links that a slowed node still has.
    pub(super) fn slowed(&mut self, node: u32, factor: f64, down_too: bool) {
        let group = &self.scenario.groups[self.nodes[node as usize].group as usize];
        let down_factor = if down_too { factor } else { 1.0 };
        let (up, down) = (group.up_mbit * factor, group.down_mbit * down_factor);
        self.topology
            .slow_down(&mut self.net, self.now, node, up, down);
    }
}
