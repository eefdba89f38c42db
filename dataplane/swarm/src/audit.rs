//! The end of a download: the sha256 of the whole, and the search for the piece that spoils it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
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
    /// Authors found false, here or by others: their pieces go first, then the sha256 is tried.
    suspects: BTreeSet<u16>,
    /// Pieces of suspects have been asked for again, or are to be, since the sha256 was tried.
    is_hot: bool,
    /// The round of the draw by which nodes share an audit out, and since when.
    pub(crate) draw: Option<(u32, Duration)>,
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
            suspects: BTreeSet::new(),
            is_hot: false,
            draw: None,
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

    /// Starts an audit of the pieces held: those of suspects first, then those that others vouch for,
    /// since what this node fetched itself can only be wrong if the source was.
    pub(crate) fn begin(&mut self, held: &PieceSet) {
        self.check = Check::Auditing;
        self.audits_count += 1;
        self.replaced_count = 0;
        self.draw = None;
        let (own, others): (Vec<u32>, Vec<u32>) = held
            .iter()
            .map(|piece| piece.0)
            .partition(|&piece| self.authors[piece as usize] == THIS);
        self.queue = others.into_iter().chain(own).collect();
        self.put_suspects_first();
    }

    fn is_suspect(&self, piece: u32) -> bool {
        self.suspects.contains(&self.authors[piece as usize])
    }

    fn put_suspects_first(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        let (first, rest): (Vec<u32>, Vec<u32>) =
            queue.into_iter().partition(|&piece| self.is_suspect(piece));
        self.is_hot |= !first.is_empty();
        self.queue = first.into_iter().chain(rest).collect();
    }

    /// The next piece to ask for again: of a suspect, else one that `drawn` says is this node's to ask
    /// for. `None` while the suspects' last ones are under way, and while nothing is drawn.
    pub(crate) fn next(&mut self, drawn: impl Fn(u32) -> bool) -> Option<u32> {
        let &first = self.queue.front()?;
        if self.is_suspect(first) {
            return self.queue.pop_front();
        }
        if self.is_hot {
            return None;
        }
        let at = self.queue.iter().position(|&piece| drawn(piece))?;
        self.queue.remove(at)
    }

    /// The piece was not what `author` said.
    pub(crate) fn replaced(&mut self, piece: u32, author: Author) {
        self.replaced_count += 1;
        self.authors[piece as usize] = THIS;
        if let Author::Other(node) = author {
            self.suspect(&[node]);
            self.is_hot = true;
        }
    }

    /// What these nodes have vouched for is to be looked at before all else.
    pub(crate) fn suspect(&mut self, nodes: &[NodeId]) {
        let before = self.suspects.len();
        for node in nodes {
            if let Some(at) = self.names.iter().position(|name| name == node)
                && let Ok(at) = u16::try_from(at)
            {
                self.suspects.insert(at.saturating_add(NAMED));
            }
        }
        if self.suspects.len() > before {
            self.put_suspects_first();
        }
    }

    /// Every piece that was to be asked for again before the sha256 is tried has been.
    pub(crate) fn is_ready_to_verify(&self) -> bool {
        let front = self.queue.front();
        let suspects_done = self.is_hot && front.is_none_or(|&piece| !self.is_suspect(piece));
        self.outstanding.is_empty() && (front.is_none() || suspects_done)
    }

    /// The sha256 is tried.
    pub(crate) fn tried(&mut self) {
        self.is_hot = false;
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
        let all = |_| true;
        assert_eq!((audit.next(all), audit.next(all)), (Some(1), Some(2)));
        audit.replaced(2, liar);
        assert_eq!(audit.next(all), Some(5));
        assert_eq!(audit.next(all), None);
        assert!(audit.is_ready_to_verify());
        audit.tried();
        assert_eq!(audit.next(all), Some(3));
        assert!(!audit.is_ready_to_verify());
    }

    #[test]
    fn a_liar_found_by_others_goes_before_what_was_drawn() {
        let liar = NodeId::new([9; 32]);
        let mut audit = Audit::new(4);
        for piece in 0..4 {
            let id = NodeId::new([if piece == 3 { 9 } else { 8 }; 32]);
            audit.set_author(PieceIndex(piece), Author::Other(id));
        }
        audit.begin(&PieceSet::full(4));
        assert_eq!(audit.next(|piece| piece == 2), Some(2));
        assert_eq!(audit.next(|_| false), None);
        assert!(!audit.is_ready_to_verify(), "others are still to be drawn");
        audit.suspect(&[NodeId::new([7; 32]), liar]);
        assert_eq!(audit.next(|_| false), Some(3));
        assert!(audit.is_ready_to_verify());
        // A liar of whose pieces none is here says nothing.
        audit.tried();
        audit.suspect(&[NodeId::new([7; 32])]);
        assert!(!audit.is_ready_to_verify());
    }
}
