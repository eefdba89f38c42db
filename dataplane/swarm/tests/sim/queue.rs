//! What can happen, and the order in which it does: by time, then as it was queued.

use std::time::Duration;

use pantala_swarm::{Gone, Input, RequestId};
use pantala_wire::PieceRun;

pub enum Event {
    Tick {
        node: usize,
        epoch: u32,
    },
    Join {
        node: usize,
    },
    Leave {
        node: usize,
    },
    Crash {
        node: usize,
        silent: bool,
    },
    Lose {
        node: usize,
    },
    Deliver {
        node: usize,
        epoch: u32,
        input: Input,
    },
    Subscribe {
        child: usize,
        epoch: u32,
        parent: usize,
        token: u64,
    },
    Have {
        child: usize,
        token: u64,
        parent: usize,
        pieces: Vec<u32>,
        complete: bool,
    },
    Gone {
        child: usize,
        token: u64,
        parent: usize,
        reason: Gone,
    },
    PeerStep {
        child: usize,
        epoch: u32,
        parent: usize,
        request: RequestId,
        piece: u32,
        step: u32,
    },
    SourceStep {
        node: usize,
        epoch: u32,
        request: RequestId,
        run: PieceRun,
        piece: u32,
        step: u32,
    },
    Recheck {
        node: usize,
        epoch: u32,
        piece: u32,
    },
    Asked {
        node: usize,
        epoch: u32,
        wanted: Vec<PieceRun>,
    },
    Returned {
        node: usize,
        pieces: PieceRun,
    },
    Announced {
        node: usize,
        pieces: Vec<u32>,
    },
    Buried {
        node: usize,
    },
    ControlDown {
        noticed: bool,
    },
    ControlUp,
}

pub struct Queued {
    pub at: Duration,
    pub seq: u64,
    pub event: Event,
}
impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}
