//! Requests in flight: to parents one piece each, to the source a run of pieces.

use std::collections::BTreeMap;
use std::time::Duration;

use pantala_wire::{NodeId, PieceRun, Priority};

use crate::RequestId;

/// Whom a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Parent { parent: NodeId, first_group: u32 },
    Source { leased: bool },
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) target: Target,
    pub(crate) run: PieceRun,
    pub(crate) priority: Priority,
    pub(crate) started: Duration,
    pub(crate) progressed: Duration,
    /// Groups that it has brought.
    pub(crate) groups: u32,
}

impl Request {
    pub(crate) fn parent(&self) -> Option<NodeId> {
        match self.target {
            Target::Parent { parent, .. } => Some(parent),
            Target::Source { .. } => None,
        }
    }
}

/// Copies of a piece in flight at most: the second is the hedge.
pub(crate) const COPIES_MAX: usize = 2;

#[derive(Debug, Default)]
pub(crate) struct Requests {
    next: u64,
    table: BTreeMap<RequestId, Request>,
    copies: BTreeMap<u32, [Option<RequestId>; COPIES_MAX]>,
    /// Requests to parents in the table.
    to_parents_count: u32,
}

impl Requests {
    pub(crate) fn start(
        &mut self,
        target: Target,
        run: PieceRun,
        priority: Priority,
        now: Duration,
    ) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        for piece in run.range() {
            let slots = self.copies.entry(piece).or_default();
            if let Some(slot) = slots.iter_mut().find(|slot| slot.is_none()) {
                *slot = Some(id);
            } else {
                debug_assert!(false, "piece {piece} has {COPIES_MAX} copies already");
            }
        }
        self.to_parents_count += u32::from(matches!(target, Target::Parent { .. }));
        self.table.insert(
            id,
            Request {
                target,
                run,
                priority,
                started: now,
                progressed: now,
                groups: 0,
            },
        );
        id
    }

    /// Takes a request out of the books.
    pub(crate) fn end(&mut self, id: RequestId) -> Option<Request> {
        let request = self.table.remove(&id)?;
        self.to_parents_count -= u32::from(request.parent().is_some());
        for piece in request.run.range() {
            self.clear(piece, id);
        }
        Some(request)
    }

    fn clear(&mut self, piece: u32, id: RequestId) {
        if let Some(slots) = self.copies.get_mut(&piece) {
            for slot in slots.iter_mut().filter(|slot| **slot == Some(id)) {
                *slot = None;
            }
            if slots.iter().all(Option::is_none) {
                self.copies.remove(&piece);
            }
        }
    }

    /// Takes `piece` off every request that carries it, and returns these.
    pub(crate) fn take_piece(&mut self, piece: u32) -> impl Iterator<Item = RequestId> + use<> {
        self.copies
            .remove(&piece)
            .unwrap_or_default()
            .into_iter()
            .flatten()
    }

    /// The first piece that the request still has to bring.
    pub(crate) fn next_piece(&self, id: RequestId) -> Option<u32> {
        let run = self.table.get(&id)?.run;
        run.range()
            .find(|&piece| self.carriers(piece).any(|carrier| carrier == id))
    }

    /// The requests that are to bring `piece`.
    pub(crate) fn carriers(&self, piece: u32) -> impl Iterator<Item = RequestId> + use<> {
        self.copies
            .get(&piece)
            .copied()
            .unwrap_or_default()
            .into_iter()
            .flatten()
    }

    pub(crate) fn is_in_flight(&self, piece: u32) -> bool {
        self.copies.contains_key(&piece)
    }

    /// Pieces that travel twice.
    pub(crate) fn hedged_count(&self) -> u32 {
        let twice = |slots: &&[Option<RequestId>; COPIES_MAX]| slots.iter().all(Option::is_some);
        self.copies.values().filter(twice).count() as u32
    }

    pub(crate) fn get(&self, id: RequestId) -> Option<&Request> {
        self.table.get(&id)
    }
    pub(crate) fn get_mut(&mut self, id: RequestId) -> Option<&mut Request> {
        self.table.get_mut(&id)
    }
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RequestId, &Request)> {
        self.table.iter().map(|(id, request)| (*id, request))
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
    pub(crate) fn to_parents_count(&self) -> u32 {
        self.to_parents_count
    }
    pub(crate) fn to_source_count(&self, leased: bool) -> u32 {
        let target = Target::Source { leased };
        self.table.values().filter(|r| r.target == target).count() as u32
    }
    pub(crate) fn of_parent(&self, parent: NodeId) -> Vec<RequestId> {
        self.iter()
            .filter(|(_, request)| request.parent() == Some(parent))
            .map(|(id, _)| id)
            .collect()
    }
}
