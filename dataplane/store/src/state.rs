//! What is known of one blob's pieces: a plain state machine under the blob's lock.
//!
//! A group is *readable* when its bytes are on file and hashed; a piece is *held* when its groups
//! merged into its claim's digest and its record is written; a held piece never changes. What a
//! restart found is held but *unverified* until it has been read once. `generation` counts the
//! moments when something readable stopped being so: a reader that saw the same number before and
//! after its read knows that nothing was rewritten under it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use pantala_wire::tree::piece_digest;
use pantala_wire::{GROUP_SIZE, GroupDigest, PieceDigest, PieceIndex, PieceLayout, PieceSet};

use crate::error::StoreError;

/// A group of a piece that is not held.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    /// Of the bytes on file; absent while they are none or being written.
    digest: Option<GroupDigest>,
    /// Somebody writes it, or commits its piece: everybody else waits.
    busy: bool,
}

#[derive(Debug)]
struct Partial {
    groups: Vec<Group>,
    /// A failed sync has dropped it while somebody was at it: it goes when they are done, and what
    /// they wrote with it.
    dropped: bool,
}

impl Partial {
    fn is_busy(&self) -> bool {
        self.groups.iter().any(|group| group.busy)
    }

    fn digests(&self) -> Option<Vec<GroupDigest>> {
        self.groups.iter().map(|group| group.digest).collect()
    }
}

/// The right to write some groups, or to commit a piece, given back when done.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) piece: PieceIndex,
    groups: Range<usize>,
}

impl Turn {
    /// The groups, numbered in their piece.
    pub(crate) fn groups(&self) -> Range<usize> {
        self.groups.clone()
    }
}

/// Somebody else has the turn: wait until the state changes and ask again.
#[derive(Debug)]
pub(crate) struct Busy;

#[derive(Debug)]
pub(crate) struct State {
    layout: PieceLayout,
    pub(crate) held: PieceSet,
    /// Of those held, the ones not verified since they were found on disk.
    pub(crate) unverified: PieceSet,
    /// Being verified right now.
    pub(crate) verifying: HashSet<PieceIndex>,
    /// Committed, but not yet known to survive a crash; the value tells one commit from another.
    pub(crate) dirty: HashMap<PieceIndex, u64>,
    partial: HashMap<PieceIndex, Partial>,
    /// When each piece was last discarded, on the count of `discards`.
    discarded: HashMap<PieceIndex, u64>,
    pub(crate) discards: u64,
    pub(crate) generation: u64,
    pub(crate) complete: bool,
    commits: u64,
}

impl State {
    pub(crate) fn new(layout: PieceLayout, found: PieceSet, complete: bool) -> Self {
        Self {
            layout,
            unverified: found.clone(),
            held: found,
            verifying: HashSet::new(),
            dirty: HashMap::new(),
            partial: HashMap::new(),
            discarded: HashMap::new(),
            discards: 0,
            generation: 0,
            complete,
            commits: 0,
        }
    }

    /// What is left when the blob is closed: pieces in progress are forgotten.
    pub(crate) fn park(&mut self) -> Self {
        let layout = self.layout;
        let mut parked = std::mem::replace(
            self,
            Self::new(layout, PieceSet::empty(layout.piece_count()), false),
        );
        parked.partial = HashMap::new();
        parked.verifying = HashSet::new();
        parked
    }

    /// Takes the turn to write `groups` of `piece`, whose new digests are `digests`. Yields the runs
    /// that differ from what is on file already, each with its own turn; those stop being readable.
    pub(crate) fn begin_write(
        &mut self,
        piece: PieceIndex,
        first: usize,
        digests: &[GroupDigest],
    ) -> Result<Result<Vec<Turn>, Busy>, StoreError> {
        if self.held.contains(piece) {
            return Err(StoreError::AlreadyHeld(piece));
        }
        let count = self.layout.groups_in(piece) as usize;
        let partial = self.partial.entry(piece).or_insert_with(|| Partial {
            groups: vec![Group::default(); count],
            dropped: false,
        });
        let groups = &mut partial.groups[first..first + digests.len()];
        if partial.dropped || groups.iter().any(|group| group.busy) {
            return Ok(Err(Busy));
        }
        let mut turns: Vec<Turn> = Vec::new();
        for (at, (group, digest)) in groups.iter_mut().zip(digests).enumerate() {
            if group.digest == Some(*digest) {
                continue;
            }
            if group.digest.take().is_some() {
                self.generation += 1;
            }
            group.busy = true;
            let at = first + at;
            match turns.last_mut() {
                Some(turn) if turn.groups.end == at => turn.groups.end += 1,
                _ => turns.push(Turn {
                    piece,
                    groups: at..at + 1,
                }),
            }
        }
        Ok(Ok(turns))
    }

    /// Gives a writer's turn back; with digests, the groups are on file and become readable.
    /// False where they were dropped meanwhile.
    pub(crate) fn end_write(&mut self, turn: &Turn, digests: Option<&[GroupDigest]>) -> bool {
        let Some(partial) = self.partial.get_mut(&turn.piece) else {
            return false;
        };
        let digests = digests.filter(|_| !partial.dropped);
        for (at, group) in partial.groups[turn.groups.clone()].iter_mut().enumerate() {
            group.busy = false;
            group.digest = digests.and_then(|digests| digests.get(at).copied());
        }
        self.settle(turn.piece)
    }

    /// Takes a dropped piece out once nobody is at it; true where it is not dropped.
    fn settle(&mut self, piece: PieceIndex) -> bool {
        let Some(partial) = self.partial.get(&piece) else {
            return false;
        };
        let dropped = partial.dropped;
        if dropped && !partial.is_busy() {
            self.partial.remove(&piece);
        }
        !dropped
    }

    /// Takes the turn to commit `piece`; its groups stay readable and cannot be written.
    pub(crate) fn begin_commit(
        &mut self,
        piece: PieceIndex,
        claimed: &PieceDigest,
    ) -> Result<Result<(Turn, Vec<GroupDigest>), Busy>, StoreError> {
        let partial = self
            .partial
            .get_mut(&piece)
            .ok_or(StoreError::Unwritten(piece))?;
        if partial.is_busy() {
            return Ok(Err(Busy));
        }
        let digests = partial.digests().ok_or(StoreError::Unwritten(piece))?;
        let written = piece_digest(&digests).ok_or(StoreError::Unwritten(piece))?;
        if written != *claimed {
            return Err(StoreError::WrongDigest {
                piece,
                written,
                claimed: *claimed,
            });
        }
        for group in &mut partial.groups {
            group.busy = true;
        }
        let turn = Turn {
            piece,
            groups: 0..digests.len(),
        };
        Ok(Ok((turn, digests)))
    }

    /// Gives a commit's turn back; the piece is held where the record was written.
    /// False where it was dropped meanwhile.
    pub(crate) fn end_commit(&mut self, turn: &Turn, recorded: bool) -> bool {
        let Some(partial) = self.partial.get_mut(&turn.piece) else {
            return false;
        };
        if partial.dropped || !recorded {
            for group in &mut partial.groups {
                group.busy = false;
            }
            return self.settle(turn.piece);
        }
        self.partial.remove(&turn.piece);
        self.commits += 1;
        self.dirty.insert(turn.piece, self.commits);
        self.held.insert(turn.piece);
        true
    }

    /// Whether somebody writes or commits `piece`.
    pub(crate) fn is_busy(&self, piece: PieceIndex) -> bool {
        self.partial.get(&piece).is_some_and(Partial::is_busy)
    }

    /// Forgets `piece` and what was written of it.
    pub(crate) fn discard(&mut self, piece: PieceIndex) {
        let was_partial = self.partial.remove(&piece).is_some();
        self.unverified.remove(piece);
        self.dirty.remove(&piece);
        if self.held.remove(piece) {
            self.discards += 1;
            self.discarded.insert(piece, self.discards);
        } else if !was_partial {
            return;
        }
        self.generation += 1;
        self.complete = false;
    }

    /// Forgets whatever is not known to be on the disk: a sync has failed, and the kernel may have
    /// dropped any page written since the one before.
    pub(crate) fn discard_unsynced(&mut self) -> Vec<PieceIndex> {
        let pieces: Vec<PieceIndex> = self.dirty.keys().copied().collect();
        for piece in &pieces {
            self.discard(*piece);
        }
        self.partial.retain(|_, partial| partial.is_busy());
        for partial in self.partial.values_mut() {
            partial.dropped = true;
            for group in &mut partial.groups {
                group.digest = None;
            }
        }
        self.generation += 1;
        pieces
    }

    /// Bytes of the pieces that a crash would lose.
    pub(crate) fn unflushed_bytes(&self) -> u64 {
        let ranges = self
            .dirty
            .keys()
            .filter_map(|p| self.layout.piece_range(*p));
        ranges.map(|range| range.len()).sum()
    }

    /// Whether a held piece of the first `end` bytes was discarded after `discards` others had been.
    pub(crate) fn discarded_below(&self, end: u64, discards: u64) -> bool {
        self.discarded.iter().any(|(piece, at)| {
            *at > discards
                && self
                    .layout
                    .piece_range(*piece)
                    .is_some_and(|range| range.start() < end)
        })
    }

    /// The digest of what has been written of `piece`, where that is all of it.
    pub(crate) fn written_digest(&self, piece: PieceIndex) -> Option<PieceDigest> {
        piece_digest(&self.partial.get(&piece)?.digests()?)
    }

    /// The end of the readable bytes that start at `offset`, looked for up to `limit`.
    pub(crate) fn readable_to(&self, offset: u64, limit: u64) -> u64 {
        let limit = limit.min(self.layout.blob_size());
        if self.held.is_full() {
            return limit.max(offset);
        }
        let mut at = offset;
        while at < limit {
            let Some((piece, range)) = self
                .layout
                .piece_at(at)
                .and_then(|piece| Some((piece, self.layout.piece_range(piece)?)))
            else {
                break;
            };
            if self.held.contains(piece) {
                at = range.end();
                continue;
            }
            let Some(partial) = self.partial.get(&piece) else {
                break;
            };
            let first = ((at - range.start()) / GROUP_SIZE) as usize;
            let written = partial.groups[first..]
                .iter()
                .take_while(|group| group.digest.is_some())
                .count();
            if written == 0 {
                break;
            }
            at = (range.start() + (first + written) as u64 * GROUP_SIZE).min(range.end());
            if at < range.end() {
                break;
            }
        }
        at.min(limit).max(offset)
    }
}
