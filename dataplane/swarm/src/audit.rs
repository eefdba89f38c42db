//! The end of a download: the sha256 of the whole, and the search for the piece that spoils it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use pantala_wire::{NodeId, PieceIndex, PieceSet};

use crate::Author;

/// Where the check of the whole blob stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// Not asked for.
    Open,
    /// The shell computes the sha256; `stale` if a piece was lost since.
    Asked { stale: bool },
    /// The sha256 was wrong; pieces are asked for again.
    Auditing,
}

/// Numbers of the authors in `Audit::authors`.
const UNKNOWN: u16 = 0;
const THIS: u16 = 1;
/// The number of the first author named in `Audit::names`.
const NAMED: u16 = 2;

#[derive(Debug)]
pub(crate) struct Audit {
    pub(crate) check: Check,
    /// Author of each piece, as a number: a name for each would be 32 bytes a piece.
    authors: Vec<u16>,
    names: Vec<NodeId>,
    pub(crate) audits_count: u32,
    /// Pieces that this audit found wrong.
    pub(crate) replaced_count: u32,
    /// Pieces still to be asked for again.
    pub(crate) queue: VecDeque<u32>,
    /// Pieces asked for again, and since when.
    pub(crate) outstanding: BTreeMap<u32, Duration>,
    /// The author found false last: the rest of its pieces goes first, then the sha256 is tried.
    suspect: Option<u16>,
}

impl Audit {
    pub(crate) fn new(piece_count: u32) -> Self {
        Self {
            check: Check::Open,
            authors: vec![UNKNOWN; piece_count as usize],
            names: Vec::new(),
            audits_count: 0,
            replaced_count: 0,
            queue: VecDeque::new(),
            outstanding: BTreeMap::new(),
            suspect: None,
        }
    }

    fn number(&mut self, author: Author) -> u16 {
        match author {
            Author::Unknown => UNKNOWN,
            Author::This => THIS,
            Author::Other(id) => {
                let at = self.names.iter().position(|name| *name == id);
                let at = at.unwrap_or_else(|| {
                    self.names.push(id);
                    self.names.len() - 1
                });
                // More authors than numbers: the piece is audited all the same.
                u16::try_from(at).map_or(UNKNOWN, |at| at.saturating_add(NAMED))
            }
        }
    }

    pub(crate) fn set_author(&mut self, piece: PieceIndex, author: Author) {
        let number = self.number(author);
        if let Some(slot) = self.authors.get_mut(piece.0 as usize) {
            *slot = number;
        }
    }

    /// Starts an audit of the pieces held: those that others vouch for first, since what this node
    /// fetched itself can only be wrong if the source was.
    pub(crate) fn begin(&mut self, held: &PieceSet) {
        self.check = Check::Auditing;
        self.audits_count += 1;
        self.replaced_count = 0;
        self.suspect = None;
        let (own, others): (Vec<u32>, Vec<u32>) = held
            .iter()
            .map(|piece| piece.0)
            .partition(|&piece| self.authors[piece as usize] == THIS);
        self.queue = others.into_iter().chain(own).collect();
    }

    /// The next piece to ask for again; `None` while the suspect's last ones are under way.
    pub(crate) fn next(&mut self) -> Option<u32> {
        let &piece = self.queue.front()?;
        if self
            .suspect
            .is_some_and(|s| self.authors[piece as usize] != s)
        {
            return None;
        }
        self.queue.pop_front()
    }

    /// The piece was not what `author` said.
    pub(crate) fn replaced(&mut self, piece: u32, author: Author) {
        self.replaced_count += 1;
        self.authors[piece as usize] = THIS;
        if let Author::Other(_) = author {
            let suspect = self.number(author);
            self.suspect = Some(suspect);
            let (first, rest): (Vec<u32>, Vec<u32>) = self
                .queue
                .iter()
                .copied()
                .partition(|&p| self.authors[p as usize] == suspect);
            self.queue = first.into_iter().chain(rest).collect();
        }
    }

    /// Every piece that was to be asked for again before the sha256 is tried has been.
    pub(crate) fn is_ready_to_verify(&self) -> bool {
        let front = self.queue.front();
        let suspect_done = self
            .suspect
            .is_some_and(|s| front.is_none_or(|&piece| self.authors[piece as usize] != s));
        self.outstanding.is_empty() && (front.is_none() || suspect_done)
    }

    pub(crate) fn clear_suspect(&mut self) {
        self.suspect = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_pieces_are_audited_first_and_a_liars_rest_before_all() {
        let liar = Author::Other(NodeId::new([9; 32]));
        let honest = Author::Other(NodeId::new([8; 32]));
        let mut audit = Audit::new(6);
        for (piece, author) in [
            (0, Author::This),
            (1, honest),
            (2, liar),
            (3, honest),
            (4, Author::Unknown),
            (5, liar),
        ] {
            audit.set_author(PieceIndex(piece), author);
        }
        audit.begin(&PieceSet::full(6));
        assert_eq!(audit.queue, [1, 2, 3, 4, 5, 0]);
        assert_eq!((audit.next(), audit.next()), (Some(1), Some(2)));
        audit.replaced(2, liar);
        assert_eq!(audit.next(), Some(5));
        assert_eq!(audit.next(), None);
        assert!(audit.is_ready_to_verify());
        audit.clear_suspect();
        assert_eq!(audit.next(), Some(3));
        assert!(!audit.is_ready_to_verify());
    }
}
