//! Sets of pieces: a bitmap, and the runs it is sent as.

use crate::id::PieceIndex;

/// Pieces `first..first + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PieceRun {
    /// The first piece.
    pub first: u32,
    /// How many pieces.
    pub count: u32,
}

impl PieceRun {
    /// The pieces as a range of numbers.
    pub fn range(&self) -> std::ops::Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

/// Which pieces of a blob of `piece_count` pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceSet {
    words: Vec<u64>,
    piece_count: u32,
    set_count: u32,
}

impl PieceSet {
    /// No piece of a blob of `piece_count` pieces.
    pub fn empty(piece_count: u32) -> Self {
        Self {
            words: vec![0; piece_count.div_ceil(64) as usize],
            piece_count,
            set_count: 0,
        }
    }
    /// Every piece of a blob of `piece_count` pieces.
    pub fn full(piece_count: u32) -> Self {
        let mut set = Self::empty(piece_count);
        set.insert_run(PieceRun {
            first: 0,
            count: piece_count,
        });
        set
    }
    /// Pieces that the blob has.
    pub fn piece_count(&self) -> u32 {
        self.piece_count
    }
    /// Pieces in the set.
    pub fn len(&self) -> u32 {
        self.set_count
    }
    /// No piece is in the set.
    pub fn is_empty(&self) -> bool {
        self.set_count == 0
    }
    /// Every piece of the blob is in the set.
    pub fn is_full(&self) -> bool {
        self.set_count == self.piece_count
    }
    /// Whether `piece` is in the set; pieces past the blob's end never are.
    pub fn contains(&self, piece: PieceIndex) -> bool {
        piece.0 < self.piece_count && self.words[(piece.0 / 64) as usize] >> (piece.0 % 64) & 1 == 1
    }
    /// Adds `piece`; true if it is new. A piece past the blob's end is ignored.
    pub fn insert(&mut self, piece: PieceIndex) -> bool {
        let new = piece.0 < self.piece_count && !self.contains(piece);
        if new {
            self.words[(piece.0 / 64) as usize] |= 1 << (piece.0 % 64);
            self.set_count += 1;
        }
        new
    }
    /// Takes `piece` out; true if it was in.
    pub fn remove(&mut self, piece: PieceIndex) -> bool {
        let was_in = self.contains(piece);
        if was_in {
            self.words[(piece.0 / 64) as usize] &= !(1 << (piece.0 % 64));
            self.set_count -= 1;
        }
        was_in
    }
    /// Adds the pieces of `run` that the blob has.
    pub fn insert_run(&mut self, run: PieceRun) {
        let range = run.range();
        for piece in range.start..range.end.min(self.piece_count) {
            self.insert(PieceIndex(piece));
        }
    }
    /// The pieces in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    PieceIndex(index as u32 * 64 + bit)
                })
            })
        })
    }
    /// The set as maximal runs, ascending.
    pub fn runs(&self) -> Vec<PieceRun> {
        let mut runs: Vec<PieceRun> = Vec::new();
        for piece in self.iter() {
            match runs.last_mut() {
                Some(run) if run.first + run.count == piece.0 => run.count += 1,
                _ => runs.push(PieceRun {
                    first: piece.0,
                    count: 1,
                }),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_set_is_its_runs(count in 0u32..300, picks in proptest::collection::vec(0u32..400, 0..200)) {
            let mut set = PieceSet::empty(count);
            for &pick in &picks {
                set.insert(PieceIndex(pick));
            }
            let mut again = PieceSet::empty(count);
            for run in set.runs() {
                again.insert_run(run);
            }
            prop_assert_eq!(&again, &set);
            prop_assert_eq!(set.iter().count() as u32, set.len());
            for &pick in &picks {
                prop_assert_eq!(set.contains(PieceIndex(pick)), pick < count);
            }
            for &pick in &picks {
                set.remove(PieceIndex(pick));
            }
            prop_assert!(set.is_empty());
        }
    }

    #[test]
    fn a_hostile_run_is_clipped() {
        let mut set = PieceSet::empty(10);
        set.insert_run(PieceRun {
            first: 8,
            count: u32::MAX,
        });
        assert_eq!(set.len(), 2);
        set.insert_run(PieceRun {
            first: u32::MAX,
            count: u32::MAX,
        });
        assert_eq!(set.len(), 2);
    }
}
