//! The machine itself.

use std::time::Duration;

use pantala_wire::{PieceIndex, PieceLayout, PieceSet};

use crate::{Action, Author, DownloadConfig, Input, State};

/// The download of one blob.
///
/// Calling contract: [`handle`](Self::handle) for each input, then
/// [`poll_action`](Self::poll_action) until `None`, then [`next_timeout`](Self::next_timeout).
/// `now` never goes back. Report `ControlUp` and `SourceChanged` before the first `Want`: both
/// start as "no".
#[derive(Debug)]
pub struct Download {
    held: PieceSet,
    state: State,
}

impl Download {
    /// A download of a blob cut as `layout`, of which `held` is there. `seed` spreads the choices
    /// of nodes that are in the same situation: give each node another.
    pub fn new(
        config: DownloadConfig,
        layout: PieceLayout,
        held: PieceSet,
        seed: u64,
        now: Duration,
    ) -> Self {
        let _ = (config, layout, seed, now);
        Self {
            held,
            state: State::Running,
        }
    }

    /// Says who vouches for a piece held from the start.
    pub fn set_author(&mut self, piece: PieceIndex, author: Author) {
        let _ = (piece, author);
    }

    /// Takes in what happened at `now`, a time since an arbitrary but fixed moment.
    pub fn handle(&mut self, now: Duration, input: Input) {
        let _ = (now, input);
    }

    /// The next thing to do, or `None` when all is set going.
    pub fn poll_action(&mut self) -> Option<Action> {
        None
    }

    /// When to call [`handle`](Self::handle) with [`Input::Tick`] if nothing else happens before;
    /// in the same time as `now`.
    pub fn next_timeout(&self) -> Option<Duration> {
        None
    }

    /// Where the download stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The pieces held.
    pub fn held(&self) -> &PieceSet {
        &self.held
    }
}
