//! Control: whether it can be reached, what it was asked, what it granted.

use std::collections::BTreeMap;
use std::time::Duration;

use pantala_wire::PieceSet;

/// The one lease request that may be outstanding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    Idle,
    Out { since: Duration },
    Wait { until: Duration },
}

#[derive(Debug)]
pub(crate) struct Leases {
    /// The connection to control stands.
    pub(crate) up: bool,
    /// It left a request unanswered since it last spoke.
    pub(crate) mute: bool,
    pub(crate) ask: Ask,
    /// Nodes that could fetch the blob from the source, as control counted last.
    pub(crate) sharing_count: u32,
    /// While control does not rule: the round of the draw, and since when.
    pub(crate) draw: Option<(u32, Duration)>,
    /// The pieces that the last request named.
    pub(crate) asked: PieceSet,
    /// Leased pieces that are not held yet, and when each lease ends.
    pub(crate) pieces: BTreeMap<u32, Duration>,
}

impl Leases {
    pub(crate) fn new(piece_count: u32) -> Self {
        Self {
            up: false,
            mute: false,
            ask: Ask::Idle,
            sharing_count: 0,
            draw: None,
            asked: PieceSet::empty(piece_count),
            pieces: BTreeMap::new(),
        }
    }

    pub(crate) fn set_up(&mut self, up: bool) {
        self.up = up;
        self.mute = false;
        self.ask = Ask::Idle;
    }

    /// Control rules on who fetches what: it is there and it answers.
    pub(crate) fn is_ruling(&self) -> bool {
        self.up && !self.mute
    }

    /// Control spoke.
    pub(crate) fn answered(&mut self, next: Ask) {
        self.mute = false;
        self.ask = next;
    }

    /// The lease of `piece` holds at `now`.
    pub(crate) fn covers(&self, piece: u32, now: Duration) -> bool {
        self.pieces.get(&piece).is_some_and(|&ends| ends > now)
    }
}
