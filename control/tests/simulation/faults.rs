//! What goes wrong.

use std::time::Duration;

use pantala_control::core::{FromNode, PathReport};
use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex, PieceRun};

use crate::model::{Rng, SOURCE, Sim, blob, id, key};

impl Sim {
    pub(crate) fn fault(&mut self) {
        let index = self.rng.below(self.nodes.len() as u64) as usize;
        let digest = self.blobs[self.rng.below(self.blobs.len() as u64) as usize].0;
        if self.nodes[index].is_out {
            return;
        }
        match self.rng.below(16) {
            0..=1 => self.crash(index),
            2..=3 => {
                let back_in = Duration::from_millis(self.rng.below(3000));
                self.disconnect(index, back_in);
            }
            4 => self.restart_control(),
            5 => {
                // Stops in the middle of its leases without a word.
                if let Some(download) = self.nodes[index].downloads.get_mut(&digest) {
                    download.fetching.clear();
                    download.ask_at = Some(self.now + Duration::from_secs(40));
                }
            }
            6 => {
                if let Some(download) = self.nodes[index].downloads.get_mut(&digest) {
                    let mut pieces: Vec<PieceRun> = download.leases.iter().map(|l| l.0).collect();
                    // Runs that go back are passed over: a list is ascending.
                    pieces.sort_by_key(|run| run.first);
                    download.fetching.clear();
                    download.leases.clear();
                    self.send(index, FromNode::ReturnLease { digest, pieces });
                }
            }
            7 => {
                // Evicted.
                if self.nodes[index]
                    .downloads
                    .get(&digest)
                    .is_some_and(|d| d.complete)
                {
                    self.nodes[index].downloads.remove(&digest);
                    self.send(index, FromNode::Dropped { digest });
                }
            }
            8 => {
                // Given up by its client.
                if self.nodes[index].downloads.remove(&digest).is_some() {
                    self.send(index, FromNode::CloseTask { digest });
                    self.send(index, FromNode::Dropped { digest });
                    let id = self.nodes[index].id;
                    self.referee
                        .leases
                        .retain(|key, lease| key.0 != digest || lease.0 != id);
                }
            }
            9..=10 => {
                let failed = self.nodes[index]
                    .downloads
                    .get(&digest)
                    .and_then(|d| d.parents.first().copied());
                if let Some(node) = failed {
                    self.nodes[index].complained_at = Some(self.now);
                    self.send(index, FromNode::ParentFailed { digest, node });
                }
            }
            11 => self.send_rubbish(index, digest),
            12 => self.limit_source(index),
            13..=14 => self.report_paths(index),
            _ => self.expose(index, digest),
        }
    }

    /// `liar` has signed what is not true, and two others find out.
    pub(crate) fn expose(&mut self, liar: usize, digest: BlobDigest) {
        let witnesses: Vec<usize> = (0..self.nodes.len())
            .filter(|&other| other != liar && self.nodes[other].connected)
            .take(2)
            .collect();
        let out_count = self.nodes.iter().filter(|n| n.is_out).count();
        if witnesses.len() < 2 || out_count * 3 > self.nodes.len() || !self.nodes[liar].connected {
            return;
        }
        let piece = PieceIndex(0);
        // Odd, so that it never is the true one.
        let piece_digest = PieceDigest([self.rng.next() as u8 | 1; 32]);
        let signed = key(liar).sign(&Claim::signed_form(&digest, piece, &piece_digest));
        let claim = Claim {
            piece_digest,
            author: id(liar),
            signature: signed.as_ref().try_into().unwrap(),
        };
        for witness in witnesses {
            self.send(
                witness,
                FromNode::FalseClaim {
                    digest,
                    piece,
                    claim,
                    true_digest: PieceDigest([0xee; 32]),
                    relayer: id(liar),
                },
            );
        }
        let node = &mut self.nodes[liar];
        // It may go on as if nothing had happened: control does not listen.
        node.is_out = true;
        node.downloads.clear();
        let id = node.id;
        assert!(
            self.referee.shut_out.contains(&id),
            "seed {}: the liar is in",
            self.seed
        );
        self.referee.leases.retain(|_, lease| lease.0 != id);
        self.disconnect(liar, Duration::from_millis(500));
    }

    /// The registry has had enough, or a node says so.
    fn limit_source(&mut self, index: usize) {
        let retry_after = match self.rng.below(3) {
            0 => None,
            1 => Some(Duration::from_millis(self.rng.below(3000))),
            _ => Some(Duration::MAX),
        };
        let host = SOURCE.to_owned();
        self.send(index, FromNode::SourceLimited { host, retry_after });
    }

    /// What a node got from others, true or not.
    fn report_paths(&mut self, index: usize) {
        let node = &self.nodes[index];
        let mut of: Vec<NodeId> = node
            .downloads
            .values()
            .flat_map(|download| download.parents.clone())
            .collect();
        of.push(id(self.rng.below(self.nodes.len() as u64) as usize));
        let reports = of
            .into_iter()
            .map(|node| PathReport {
                node,
                bytes: match self.rng.below(8) {
                    0 => u64::MAX,
                    1 => 0,
                    _ => self.rng.below(1 << 27),
                },
                busy: match self.rng.below(8) {
                    0 => Duration::ZERO,
                    1 => Duration::MAX,
                    _ => Duration::from_millis(self.rng.below(1000)),
                },
                failures: self.rng.below(3) as u32,
            })
            .collect();
        self.send(index, FromNode::Paths { reports });
    }

    /// Whatever a broken or hostile member can say within the schema.
    pub(crate) fn send_rubbish(&mut self, index: usize, digest: BlobDigest) {
        let run = |rng: &mut Rng| PieceRun {
            first: rng.next() as u32,
            count: rng.next() as u32,
        };
        let pieces = vec![run(&mut self.rng), run(&mut self.rng)];
        let messages = [
            FromNode::ReturnLease {
                digest: blob(999),
                pieces: pieces.clone(),
            },
            FromNode::Fetched {
                digest: blob(999),
                pieces: pieces.clone(),
            },
            // Of a blob that it may well have: pieces beyond its end, and a lease that it never had.
            FromNode::Holding {
                digest,
                runs: vec![PieceRun {
                    first: u32::MAX,
                    count: u32::MAX,
                }],
                complete: false,
            },
            FromNode::SourceHost {
                digest,
                host: "x".repeat(100_000),
            },
            FromNode::Dropped { digest: blob(998) },
            FromNode::ParentFailed {
                digest,
                node: id(5000),
            },
            FromNode::AskLease {
                digest: blob(997),
                wanted: pieces,
                urgent: Some(PieceIndex(u32::MAX)),
            },
        ];
        let pick = self.rng.below(messages.len() as u64) as usize;
        self.send(index, messages[pick].clone());
    }
}
