//! Who wants which pieces, and how urgently.

use std::collections::BTreeMap;

use pantala_wire::{ByteRange, PieceIndex, PieceLayout, PieceRun, PieceSet, Priority};

use crate::ReaderId;

/// A missing piece in the window of a waiting reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Urgent {
    pub(crate) priority: Priority,
    /// Pieces between the reader's position and this one.
    pub(crate) distance: u32,
    pub(crate) piece: u32,
    /// The reader waits for this very piece: all before it are there.
    pub(crate) head: bool,
    /// The reader has had no byte yet: its client has a limit for how long that may take.
    pub(crate) fresh: bool,
}

#[derive(Debug)]
struct Reader {
    /// The piece it started at.
    origin: u32,
    first: u32,
    end: u32,
    priority: Priority,
}

/// All demand on a blob.
#[derive(Debug)]
pub(crate) struct Demand {
    layout: PieceLayout,
    lookahead_pieces: u32,
    readers: BTreeMap<ReaderId, Reader>,
    fill: Option<Priority>,
    /// Wanted pieces that are not held.
    missing: PieceSet,
    /// Pieces wanted as more than prefetch.
    bulk: PieceSet,
    window: Vec<Urgent>,
    sets_stale: bool,
    window_stale: bool,
}

impl Demand {
    pub(crate) fn new(layout: PieceLayout, lookahead_pieces: u32) -> Self {
        let none = PieceSet::empty(layout.piece_count());
        Self {
            layout,
            lookahead_pieces,
            readers: BTreeMap::new(),
            fill: None,
            missing: none.clone(),
            bulk: none,
            window: Vec::new(),
            sets_stale: false,
            window_stale: false,
        }
    }

    pub(crate) fn want(&mut self, id: ReaderId, range: ByteRange, priority: Priority) {
        let pieces = self.layout.pieces_of(range);
        let reader = Reader {
            origin: self.readers.get(&id).map_or(pieces.start, |r| r.origin),
            first: pieces.start,
            end: pieces.end,
            priority,
        };
        let old = self.readers.insert(id, reader);
        let same = old.is_some_and(|old| {
            (old.first, old.end, old.priority) == (pieces.start, pieces.end, priority)
        });
        self.sets_stale |= !same;
        self.window_stale |= !same;
    }

    pub(crate) fn unwant(&mut self, id: ReaderId) {
        if self.readers.remove(&id).is_some() {
            self.sets_stale = true;
            self.window_stale = true;
        }
    }

    pub(crate) fn fill(&mut self, priority: Option<Priority>) {
        if self.fill != priority {
            self.fill = priority;
            self.sets_stale = true;
        }
    }

    pub(crate) fn piece_held(&mut self, piece: PieceIndex) {
        self.missing.remove(piece);
        self.window_stale = true;
    }

    pub(crate) fn piece_lost(&mut self) {
        self.sets_stale = true;
        self.window_stale = true;
    }

    /// Brings the sets up to date; true if pieces became wanted or unwanted since the last time.
    pub(crate) fn refresh(&mut self, held: &PieceSet) -> bool {
        let changed = self.sets_stale;
        if self.sets_stale {
            self.sets_stale = false;
            self.rebuild_sets(held);
        }
        if self.window_stale {
            self.window_stale = false;
            self.rebuild_window(held);
        }
        changed
    }

    fn rebuild_sets(&mut self, held: &PieceSet) {
        let count = self.layout.piece_count();
        let mut bulk = PieceSet::empty(count);
        let mut wanted = PieceSet::empty(count);
        match self.fill {
            Some(Priority::Prefetch) => wanted = PieceSet::full(count),
            Some(_) => bulk = PieceSet::full(count),
            None => {}
        }
        for reader in self.readers.values() {
            let run = PieceRun {
                first: reader.first,
                count: reader.end - reader.first,
            };
            if reader.priority == Priority::Prefetch {
                wanted.insert_run(run);
            } else if !bulk.is_full() {
                bulk.insert_run(run);
            }
        }
        let mut missing = PieceSet::empty(count);
        for piece in bulk.iter().chain(wanted.iter()) {
            if !held.contains(piece) {
                missing.insert(piece);
            }
        }
        self.missing = missing;
        self.bulk = bulk;
    }

    fn rebuild_window(&mut self, held: &PieceSet) {
        self.window.clear();
        for reader in self.readers.values() {
            if reader.priority > Priority::Client {
                continue;
            }
            let end = reader
                .end
                .min(reader.first.saturating_add(self.lookahead_pieces));
            let mut head = true;
            for piece in reader.first..end {
                if !held.contains(PieceIndex(piece)) {
                    self.window.push(Urgent {
                        priority: reader.priority,
                        distance: piece - reader.first,
                        piece,
                        head,
                        fresh: head && piece == reader.origin,
                    });
                    head = false;
                }
            }
        }
        // One entry a piece: its most urgent, a head if it is anybody's.
        self.window
            .sort_unstable_by_key(|u| (u.piece, u.priority, u.distance));
        self.window.dedup_by(|later, kept| {
            let same = later.piece == kept.piece;
            kept.head |= same && later.head;
            kept.fresh |= same && later.fresh;
            same
        });
        self.window
            .sort_unstable_by_key(|u| (u.priority, u.distance, u.piece));
    }

    /// Missing pieces that somebody waits for, most urgent first.
    pub(crate) fn window(&self) -> &[Urgent] {
        &self.window
    }
    /// Wanted pieces that are not held.
    pub(crate) fn missing(&self) -> &PieceSet {
        &self.missing
    }
    /// The priority of a wanted piece outside of every window.
    pub(crate) fn background(&self, piece: PieceIndex) -> Priority {
        if self.bulk.contains(piece) {
            Priority::Bulk
        } else {
            Priority::Prefetch
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn demand() -> Demand {
        Demand::new(PieceLayout::new(10 * MIB).unwrap(), 3)
    }
    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start * MIB, end * MIB).unwrap()
    }
    fn pieces(demand: &Demand) -> Vec<u32> {
        demand.window().iter().map(|u| u.piece).collect()
    }

    #[test]
    fn a_fault_overtakes_clients_whose_windows_interleave() {
        let mut demand = demand();
        demand.want(ReaderId(1), range(0, 10), Priority::Client);
        demand.want(ReaderId(2), range(4, 10), Priority::Client);
        demand.want(ReaderId(3), range(8, 9), Priority::Fault);
        let mut held = PieceSet::empty(10);
        held.insert(PieceIndex(0));
        demand.refresh(&held);
        assert_eq!(pieces(&demand), [8, 4, 1, 5, 2, 6]);
        let heads: Vec<u32> = demand
            .window()
            .iter()
            .filter(|u| u.head)
            .map(|u| u.piece)
            .collect();
        assert_eq!(heads, [8, 4, 1]);
        assert_eq!(demand.missing().len(), 9);
    }

    #[test]
    fn nothing_is_wanted_when_readers_and_fill_are_gone() {
        let mut demand = demand();
        demand.want(ReaderId(1), range(2, 4), Priority::Client);
        demand.fill(Some(Priority::Prefetch));
        let held = PieceSet::empty(10);
        assert!(demand.refresh(&held));
        assert_eq!(demand.background(PieceIndex(3)), Priority::Bulk);
        assert_eq!(demand.background(PieceIndex(4)), Priority::Prefetch);
        demand.unwant(ReaderId(1));
        demand.fill(None);
        demand.refresh(&held);
        assert!(demand.missing().is_empty() && demand.window().is_empty());
        assert!(!demand.refresh(&held));
    }
}
