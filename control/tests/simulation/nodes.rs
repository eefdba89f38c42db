//! What simulated nodes do: connect, announce, fetch, ask.

use std::collections::VecDeque;
use std::time::Duration;

use pantala_control::Labels;
use pantala_control::core::message::NodeInfo;
use pantala_control::core::{Core, FromNode, TaskReport};
use pantala_wire::{BlobDigest, PieceIndex, PieceRun, PieceSet};

use crate::model::{Download, PIECE, SOURCE, Sim};

impl Sim {
    pub(crate) fn connect(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let info = NodeInfo {
            address: ([127, 0, 0, 1], index as u16 + 1).into(),
            labels: Labels {
                rack: format!("rack {}", index / 8),
                ..Labels::default()
            },
            resumed: node.resumed,
            ..NodeInfo::default()
        };
        let id = node.id;
        let fresh = !node.resumed;
        node.connected = true;
        node.resumed = true;
        node.reconnect_at = None;
        if fresh {
            self.referee.leases.retain(|_, lease| lease.0 != id);
        }
        let mut out = Vec::new();
        let is_in = self.core.joined(self.now, id, info, &mut out);
        assert_eq!(
            is_in,
            !self.referee.shut_out.contains(&id),
            "seed {}",
            self.seed
        );
        self.receive(out);
        if !is_in {
            self.nodes[index].connected = false;
            return;
        }
        let mut holdings = Vec::new();
        for (digest, download) in &mut self.nodes[index].downloads {
            let mut fetching = PieceSet::empty(download.held.piece_count());
            for &piece in &download.fetching {
                fetching.insert(PieceIndex(piece));
            }
            download.leases.clear();
            download.fetching.clear();
            download.ask_at = Some(self.now);
            download.opened = true;
            holdings.push(TaskReport {
                digest: *digest,
                size_bytes: u64::from(download.held.piece_count()) * PIECE,
                has_source: true,
                wanted: download.open,
                complete: download.complete,
                held: download.held.runs(),
                fetching: fetching.runs(),
            });
        }
        let last = true;
        self.send(index, FromNode::Announce { holdings, last });
    }

    pub(crate) fn disconnect(&mut self, index: usize, back_in: Duration) {
        let node = &mut self.nodes[index];
        if node.connected {
            node.connected = false;
            let id = node.id;
            self.core.left(self.now, id);
            // After the grace the core may give its leases to others.
            let until = self.now + self.config.reconnect_grace;
            for lease in self.referee.leases.values_mut().filter(|l| l.0 == id) {
                lease.1 = lease.1.min(until);
            }
        }
        self.nodes[index].reconnect_at = Some(self.now + back_in);
    }

    pub(crate) fn crash(&mut self, index: usize) {
        let back_in = Duration::from_millis(self.rng.below(5000));
        self.disconnect(index, back_in);
        let node = &mut self.nodes[index];
        node.resumed = false;
        for download in node.downloads.values_mut() {
            download.fetching.clear();
            download.leases.clear();
            download.parents.clear();
        }
    }

    pub(crate) fn restart_control(&mut self) {
        self.core = Core::new(self.config.clone(), self.now);
        self.referee.leases.clear();
        self.referee.shut_out.clear();
        for index in 0..self.nodes.len() {
            let back_in = Duration::from_millis(self.rng.below(1500));
            self.nodes[index].connected = false;
            self.nodes[index].reconnect_at = Some(self.now + back_in);
        }
    }

    pub(crate) fn start_download(&mut self, index: usize, digest: BlobDigest) {
        let count = self.piece_count(&digest);
        self.nodes[index].downloads.insert(
            digest,
            Download {
                held: PieceSet::empty(count),
                complete: false,
                open: true,
                leases: Vec::new(),
                fetching: VecDeque::new(),
                parents: Vec::new(),
                ask_at: Some(self.now),
                opened: false,
            },
        );
    }

    /// One node does a little of what it has to do for one of its blobs.
    pub(crate) fn work(&mut self, at: usize, digest: BlobDigest) {
        let now = self.now;
        let node = &self.nodes[at];
        let (connected, count) = (node.connected, self.piece_count(&digest));
        let download = &node.downloads[&digest];
        if download.complete || !download.open {
            return;
        }
        if connected && !download.opened {
            let held = download.held.runs();
            if held.is_empty() && self.rng.below(3) == 0 {
                return self.send(at, FromNode::AskOpening { digest });
            }
            self.nodes[at].downloads.get_mut(&digest).unwrap().opened = true;
            self.send(
                at,
                FromNode::OpenTask {
                    digest,
                    size_bytes: u64::from(count) * PIECE,
                    has_source: true,
                    held,
                    complete: false,
                },
            );
        }
        // From a parent: any piece that one of them holds.
        let download = &self.nodes[at].downloads[&digest];
        let mut missing: Vec<u32> = (0..count)
            .filter(|&piece| !download.held.contains(PieceIndex(piece)))
            .collect();
        let parents: Vec<&PieceSet> = download
            .parents
            .iter()
            .filter_map(|parent| Some(&self.nodes[self.by_id[parent]].downloads.get(&digest)?.held))
            .collect();
        let found = missing
            .iter()
            .copied()
            .find(|&piece| parents.iter().any(|held| held.contains(PieceIndex(piece))));
        if let Some(piece) = found {
            self.got(at, digest, piece, false);
            missing.retain(|&other| other != piece);
        }
        // From the source, under a lease that has not ended.
        let download = self.nodes[at].downloads.get_mut(&digest).unwrap();
        if download.leases.iter().all(|l| l.1 <= now) {
            download.fetching.clear();
        }
        if connected && let Some(piece) = download.fetching.pop_front() {
            if !download.held.contains(PieceIndex(piece)) {
                *self.source_reads.entry((digest, piece)).or_default() += 1;
            }
            self.got(at, digest, piece, true);
            missing.retain(|&other| other != piece);
        }
        if missing.is_empty() {
            let download = self.nodes[at].downloads.get_mut(&digest).unwrap();
            download.complete = true;
            download.open = false;
            download.leases.clear();
            self.send(
                at,
                FromNode::Holding {
                    digest,
                    runs: Vec::new(),
                    complete: true,
                },
            );
            return;
        }
        let download = self.nodes[at].downloads.get_mut(&digest).unwrap();
        if connected && download.fetching.is_empty() && download.ask_at.is_none_or(|at| at <= now) {
            download.ask_at = Some(now + Duration::from_secs(5));
            let mut wanted = PieceSet::empty(count);
            for &piece in &missing {
                wanted.insert(PieceIndex(piece));
            }
            if self.rng.one_in(2) {
                let host = SOURCE.to_owned();
                self.send(at, FromNode::SourceHost { digest, host });
            }
            let urgent = missing[self.rng.below(missing.len() as u64) as usize];
            let urgent = self.rng.one_in(2).then_some(PieceIndex(urgent));
            self.send(
                at,
                FromNode::AskLease {
                    digest,
                    wanted: wanted.runs(),
                    urgent,
                },
            );
        }
    }

    pub(crate) fn got(&mut self, index: usize, digest: BlobDigest, piece: u32, from_source: bool) {
        let download = self.nodes[index].downloads.get_mut(&digest).unwrap();
        download.held.insert(PieceIndex(piece));
        let runs = vec![PieceRun {
            first: piece,
            count: 1,
        }];
        let message = if from_source {
            let expires = self.now + self.config.lease_ttl;
            for lease in &mut download.leases {
                lease.1 = expires;
            }
            FromNode::Fetched {
                digest,
                pieces: runs,
            }
        } else {
            FromNode::Holding {
                digest,
                runs,
                complete: false,
            }
        };
        self.send(index, message);
    }
}
