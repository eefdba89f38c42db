//! Sets of pieces.

/// A set of the pieces of one blob.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    words: Vec<u64>,
    count: u32,
    held: u32,
}

impl Pieces {
    pub(super) fn none(count: u32) -> Self {
        Self {
            words: vec![0; count.div_ceil(u64::BITS) as usize],
            count,
            held: 0,
        }
    }

    pub(super) fn held(&self) -> u32 {
        self.held
    }

    pub(super) fn missing(&self) -> u32 {
        self.count - self.held
    }

    pub(super) fn is_full(&self) -> bool {
        self.held == self.count
    }

    pub(super) fn has(&self, piece: u32) -> bool {
        self.words[(piece / u64::BITS) as usize] >> (piece % u64::BITS) & 1 == 1
    }

    /// False when it was there.
    pub(super) fn insert(&mut self, piece: u32) -> bool {
        let word = &mut self.words[(piece / u64::BITS) as usize];
        let bit = 1 << (piece % u64::BITS);
        let new = *word & bit == 0;
        *word |= bit;
        self.held += u32::from(new);
        new
    }

    pub(super) fn remove(&mut self, piece: u32) {
        let word = &mut self.words[(piece / u64::BITS) as usize];
        let bit = 1 << (piece % u64::BITS);
        self.held -= u32::from(*word & bit != 0);
        *word &= !bit;
    }

    pub(super) fn fill(&mut self) {
        for piece in 0..self.count {
            self.insert(piece);
        }
    }

    /// Whether the other set has a piece that this one lacks.
    pub(super) fn wants(&self, other: &Self) -> bool {
        self.words
            .iter()
            .zip(&other.words)
            .any(|(mine, theirs)| theirs & !mine != 0)
    }

    /// The words of what another set offers and neither of these has.
    pub(super) fn offered<'a>(
        &'a self,
        asked: &'a Self,
        other: &'a Self,
    ) -> impl Iterator<Item = u64> + 'a {
        let mine = self.words.iter().zip(&asked.words);
        mine.zip(&other.words)
            .map(|((mine, asked), theirs)| theirs & !mine & !asked)
    }

    /// The first piece that neither this set nor the other has.
    pub(super) fn first_lacking(&self, asked: &Self) -> Option<u32> {
        let both = self.words.iter().zip(&asked.words).enumerate();
        let first = both
            .map(|(at, (mine, asked))| (at, !(mine | asked)))
            .find(|(_, lacking)| *lacking != 0);
        let (at, lacking) = first?;
        let piece = at as u32 * u64::BITS + lacking.trailing_zeros();
        (piece < self.count).then_some(piece)
    }
}

/// How a blob is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) piece_bytes: u64,
    pub(super) pieces: u32,
    blob_bytes: u64,
}

impl Cut {
    pub(super) fn new(blob_bytes: u64, piece_bytes: u64) -> Self {
        let pieces =
            u32::try_from(blob_bytes.div_ceil(piece_bytes)).expect("fewer than 2^32 pieces");
        Self {
            piece_bytes,
            pieces,
            blob_bytes,
        }
    }

    pub(super) fn bytes(&self, piece: u32) -> u64 {
        self.piece_bytes
            .min(self.blob_bytes - u64::from(piece) * self.piece_bytes)
    }
}
